// distill on the CPU: all losses of the student, from what the teacher says of the batch.
#include "cpu/distill_losses.h"

namespace mmkd {
namespace {

// A teacher's outputs as tensors.
struct Given {
  static constexpr int64_t samples_at_once = kSamples;
  static constexpr bool keeps_stats = true;
  const void* targets;
  void* grad_targets;  // null: not wanted

  int64_t tasks(int64_t blocks) const { return blocks; }
  bool begin(int64_t) const { return true; }
  void before(bool, int64_t, int64_t) const {}
  void after(bool, int64_t, int64_t) const {}
  double emb(bool, EmbKDArgs a, int64_t begin, int64_t end) const {
    a.teachers = targets;
    a.grad_teachers = grad_targets;
    return MMKD_ON_ISA(emb_kd_losses(a, begin, end));
  }
};

void check_targets(const Tensor& targets, const Tensor& table, const Tensor& nodes) {
  check_dim(targets, "targets", 3);
  check_type(targets, "targets", table.scalar_type());
  check_size(targets, "targets", 1, nodes.size(0));
  check_size(targets, "targets", 2, table.size(1));
  MMKD_CHECK(targets.is_contiguous(), "targets: expected a contiguous tensor");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> distill(
    Tensor table, int64_t num_users, Tensor users, Tensor candidates, OptTensor teacher_margin,
    OptTensor teacher_logits, Tensor nodes, OptTensor targets, Tensor list_weights, Tensor emb_weights, double bpr,
    double pair, double list, double emb, double pair_tau, bool bernoulli, double alpha, double beta, double list_tau,
    bool coupled, double gamma, bool need_table, bool need_margin, bool need_logits, bool need_targets) {
  MMKD_CHECK(emb == 0 || targets, "targets: expected a tensor where EmbKD has a weight, got none");
  if (emb != 0) check_dim(*targets, "targets", 3);
  const Inputs in{table,
                  users,
                  candidates,
                  nodes,
                  teacher_margin,
                  teacher_logits,
                  list_weights,
                  emb_weights,
                  num_users,
                  emb != 0 ? targets->size(0) : 0,
                  {bpr, pair, list, emb},
                  pair_tau,
                  bernoulli,
                  alpha,
                  beta,
                  list_tau,
                  coupled,
                  gamma,
                  need_table,
                  need_margin && teacher_margin && pair != 0,
                  need_logits && teacher_logits && list != 0};
  check_inputs(in);
  if (emb != 0) check_targets(*targets, table, nodes);
  const auto like = [&](bool wanted, const OptTensor& t) {
    if (!wanted) return empty({0}, table);
    return t->dim() == 1 ? empty({t->size(0)}, table) : empty({t->size(0), t->size(1), t->size(2)}, table);
  };
  Gradients grads{need_table ? empty({table.size(0), table.size(1)}, table) : empty({0}, table),
                  like(in.need_margin, teacher_margin), like(in.need_logits, teacher_logits)};
  need_targets = need_targets && targets && emb != 0;
  Tensor grad_targets = like(need_targets, targets);
  Given given{emb != 0 ? targets->const_data_ptr() : nullptr, need_targets ? grad_targets.mutable_data_ptr() : nullptr};
  auto [total, terms] = table.scalar_type() == ScalarType::Double ? Distilled<double, Given>(in, grads, given).run()
                                                                  : Distilled<float, Given>(in, grads, given).run();
  return {total, terms, grads.table, grads.margin, grads.logits, grad_targets};
}

}  // namespace
}  // namespace mmkd

STABLE_TORCH_LIBRARY_IMPL(mmkd, CPU, m) { m.impl("distill", TORCH_BOX(&mmkd::distill)); }
