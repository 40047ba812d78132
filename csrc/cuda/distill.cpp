// distill for CUDA tensors: all losses and their gradients by one kernel.
#include "cuda/distill_kernel.h"
#include "cuda/loss_tables.h"

namespace mmkd::cuda {
namespace {

// [.., batch (, k)] in the accumulator type.
void check_teacher(const OptTensor& t, const char* name, int64_t dim, const ListArgs& a, ScalarType acc) {
  MMKD_CHECK(t, name, ": expected a tensor where its loss has a weight, got none");
  check_dim(*t, name, dim);
  check_like(*t, name, acc);
  check_size(*t, name, dim == 1 ? 0 : 1, a.batch);
  if (dim == 3) check_size(*t, name, 2, a.k);
}

void check_weights(const Tensor& t, const char* name, int64_t modalities, ScalarType acc) {
  check_dim(t, name, 1);
  check_size(t, name, 0, modalities);
  check_like(t, name, acc);
}

ListArgs list_of(const Tensor& table, int64_t num_users, const Tensor& users, const Tensor& candidates,
                 const Tensor& nodes) {
  check_table(table, "table");
  MMKD_CHECK(num_users >= 0 && num_users <= table.size(0), "num_users: expected 0 to ", table.size(0), ", got ",
             num_users);
  check_index(users, "users");
  check_index(candidates, "candidates", 2);
  check_size(candidates, "candidates", 0, users.numel());
  check_index(nodes, "nodes");
  MMKD_CHECK(candidates.size(1) >= 2, "candidates: expected K >= 2, got K = ", candidates.size(1));
  ListArgs a{};
  a.dtype = dtype_of(table);
  a.users = data<int64_t>(users);
  a.candidates = data<int64_t>(candidates);
  a.batch = users.numel();
  a.k = candidates.size(1);
  a.d = table.size(1);
  a.num_users = num_users;
  a.num_items = table.size(0) - num_users;
  a.user_emb = table.const_data_ptr();
  a.item_emb = static_cast<const char*>(a.user_emb) + num_users * a.d * table.element_size();
  return a;
}

// Nodes and targets of EmbKD; `stats` is theirs.
EmbArgs emb_of(const Tensor& table, const Tensor& nodes, const OptTensor& targets, const Tensor& weights,
               double gamma) {
  MMKD_CHECK(targets, "targets: expected a tensor where EmbKD has a weight, got none");
  check_dim(*targets, "targets", 3);
  check_like(*targets, "targets", table.scalar_type());
  check_size(*targets, "targets", 1, nodes.numel());
  check_size(*targets, "targets", 2, table.size(1));
  check_weights(weights, "emb_weights", targets->size(0), accumulate_type(table.scalar_type()));
  MMKD_CHECK(gamma >= 1, "gamma: expected >= 1, got ", gamma);
  EmbArgs a{};
  a.dtype = dtype_of(table);
  a.student = table.const_data_ptr();
  a.teachers = targets->const_data_ptr();
  a.weights = weights.const_data_ptr();
  a.n = nodes.numel();
  a.d = table.size(1);
  a.modalities = targets->size(0);
  a.gamma = gamma;
  return a;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> distill_all(
    Tensor table, int64_t num_users, Tensor users, Tensor candidates, OptTensor teacher_margin,
    OptTensor teacher_logits, Tensor nodes, OptTensor targets, Tensor list_weights, Tensor emb_weights, double bpr,
    double pair, double list, double emb, double pair_tau, bool bernoulli, double alpha, double beta, double list_tau,
    bool coupled, double gamma, bool need_table, bool need_margin, bool need_logits, bool need_targets) {
  const ScalarType acc = accumulate_type(table.scalar_type());
  DistillArgs a{};
  a.list = list_of(table, num_users, users, candidates, nodes);
  MMKD_CHECK(pair_tau > 0, "pair_tau: expected > 0, got ", pair_tau);
  MMKD_CHECK(list_tau > 0, "list_tau: expected > 0, got ", list_tau);
  MMKD_CHECK(!need_table || !deterministic(),
             "distill: its gradient is added by atomics, in no fixed order; under "
             "torch.use_deterministic_algorithms(True) call mmkd.ops.distill_loss, which takes other kernels then");
  if (pair != 0) check_teacher(teacher_margin, "teacher_margin", 1, a.list, acc);
  if (list != 0) {
    check_teacher(teacher_logits, "teacher_logits", 3, a.list, acc);
    check_weights(list_weights, "list_weights", teacher_logits->size(0), acc);
    a.list.teacher = teacher_logits->const_data_ptr();
    a.list.modalities = teacher_logits->size(0);
  }
  if (emb != 0) a.emb = emb_of(table, nodes, targets, emb_weights, gamma);
  a.list.weight = list_weights.const_data_ptr();
  a.list.alpha = alpha;
  a.list.beta = beta;
  a.list.tau = list_tau;
  a.list.coupled = coupled;
  a.list.wide = emb != 0 ? wide_rows(a.list.d, table, *targets) : wide_rows(a.list.d, table);
  a.nodes = data<int64_t>(nodes);
  a.num_rows = table.size(0);
  a.margin = pointer(teacher_margin);
  a.bpr = bpr;
  a.pair = pair;
  a.by_list = list;
  a.by_emb = emb;
  a.pair_tau = pair_tau;
  a.bernoulli = bernoulli;
  need_margin = need_margin && pair != 0;
  need_logits = need_logits && list != 0;
  need_targets = need_targets && emb != 0;
  const Device device(table);
  const int64_t blocks = distill_blocks(a);
  Tensor loss = scalar(table, acc, blocks == 0), terms = blocks ? empty({4}, table, acc) : zeros({4}, table, acc);
  Tensor partial = empty({blocks, 4}, table, acc), ticket = zeros({1}, table, ScalarType::Int);
  Tensor scratch =
      distill_fits(a) ? nothing(table) : empty({distill_sample_blocks(a), kDistillWarps, 2 * a.list.k}, table, acc);
  Tensor stats = empty({a.emb.n, 1 + 2 * a.emb.modalities}, table, acc), grad = accumulator(table, need_table);
  Tensor margin = need_margin ? empty({a.list.batch}, table, acc) : empty({0}, table, acc);
  Tensor logits = need_logits ? empty({a.list.modalities, a.list.batch, a.list.k}, table, acc) : empty({0}, table, acc);
  Tensor aims = need_targets ? empty({a.emb.modalities, a.emb.n, a.emb.d}, table) : nothing(table);
  a.emb.stats = stats.mutable_data_ptr();
  a.scratch = pointer(scratch, !distill_fits(a));
  a.partial = partial.mutable_data_ptr();
  a.ticket = static_cast<unsigned*>(ticket.mutable_data_ptr());
  a.loss = loss.mutable_data_ptr();
  a.terms = terms.mutable_data_ptr();
  a.grad_table = pointer(grad, need_table);
  a.grad_margin = pointer(margin, need_margin);
  a.grad_logits = pointer(logits, need_logits);
  a.grad_targets = pointer(aims, need_targets);
  distill(a, device.stream());
  return {loss, terms, cast(grad, table.scalar_type()), margin, logits, aims};
}

}  // namespace
}  // namespace mmkd::cuda

MMKD_CUDA_IMPL(m) { m.impl("distill", TORCH_BOX(&mmkd::cuda::distill_all)); }
