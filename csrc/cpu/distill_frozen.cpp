// distill_frozen on the CPU: the student's losses straight from the constants of a collapsed teacher. A few samples at
// a time the teacher is asked, the losses are taken and what they want of the teacher goes into the gradient of Z, so
// that rows are read once and no row of the teacher's features, or of their gradient, is kept.
#include "cpu/distill_frozen.h"

#include "cpu/distill_losses.h"
#include "cpu/frozen_args.h"

namespace mmkd {
namespace {

// The gradients of Z by the samples, then by the rows of EmbKD.
int64_t tasks_of(int64_t blocks) { return std::min(kFrozenGroups, blocks); }

template <class T>
class Frozen {
 public:
  static constexpr int64_t samples_at_once = kFrozenChunk;
  static constexpr bool keeps_stats = false;

  // args: margin, logits and their gradients are there, null where not wanted. sums: null, or [tasks, M, e, d].
  Frozen(const FrozenArgs& args, T* sums) : args_(args), sums_(sums) {
    const int64_t rows = args.modalities * args.d;
    static_assert(kSamples <= 3 * kFrozenChunk, "rows of EmbKD take no more scratch than samples: e each, not 3 e");
    heads_ = frozen_scratch(args, kFrozenChunk);
    targets_ = heads_ + 3 * kFrozenChunk * rows;
    grads_ = targets_ + kSamples * rows;
    stats_ = grads_ + kSamples * rows;
    elements_ = stats_ + kSamples * (1 + 2 * args.modalities);
  }

  // What a thread has for a task.
  struct Work {
    Scratch scratch;
    T* sum;  // the task's, or null

    explicit operator bool() const { return static_cast<bool>(scratch); }
    T* at(int64_t element) const { return reinterpret_cast<T*>(scratch.get()) + element; }
  };

  int64_t tasks(int64_t blocks) const { return tasks_of(blocks); }

  Work begin(int64_t task) {
    const int64_t size = args_.modalities * args_.e * args_.d;
    Work work{Scratch(elements_ * static_cast<int64_t>(sizeof(T)), failed_), sums_ ? sums_ + task * size : nullptr};
    if (sums_) std::fill_n(work.sum, size, T(0));
    return work;
  }

  void before(const Work& work, int64_t begin, int64_t end) const {
    if (!args_.margin && !args_.logits) return;
    const FrozenArgs a = samples_at(work, begin);
    MMKD_ON_ISA(frozen_samples(a, begin, end, work.at(0)));
  }

  void after(const Work& work, int64_t begin, int64_t end) const {
    if (!work.sum || (!args_.grad_margin && !args_.grad_logits)) return;
    const FrozenArgs a = samples_at(work, begin);
    MMKD_ON_ISA(frozen_sample_grads(a, begin, end, work.at(0), work.sum));
  }

  double emb(const Work& work, EmbKDArgs emb, int64_t begin, int64_t end) const {
    FrozenArgs a = args_;
    a.target_rows = end - begin;
    a.first_target = begin;
    a.targets = work.at(targets_);
    a.grad_targets = work.at(grads_);
    MMKD_ON_ISA(frozen_targets(a, begin, end));
    emb.teachers = work.at(targets_);
    emb.grad_teachers = work.sum ? work.at(grads_) : nullptr;
    emb.student = static_cast<const T*>(emb.student) + begin * emb.d;
    if (emb.grad_student) emb.grad_student = static_cast<T*>(emb.grad_student) + begin * emb.d;
    emb.stats = work.at(stats_);
    emb.n = end - begin;
    const double sum = MMKD_ON_ISA(emb_kd_losses(emb, 0, end - begin));
    if (work.sum) MMKD_ON_ISA(frozen_target_grads(a, begin, end, work.at(0), work.sum));
    return sum;
  }

  const std::atomic<bool>& failed() const { return failed_; }

 private:
  FrozenArgs samples_at(const Work& work, int64_t begin) const {
    FrozenArgs a = args_;
    a.head_rows = kFrozenChunk;
    a.first_head = begin;
    a.heads = work.at(heads_);
    a.joint_kept = true;
    return a;
  }

  const FrozenArgs args_;
  T* const sums_;
  int64_t heads_, targets_, grads_, stats_, elements_;  // where in a thread's scratch they begin, and its size
  std::atomic<bool> failed_{false};
};

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> run(const Inputs& in, FrozenArgs a, const Tensor& state, Tensor& margin,
                                               Tensor& logits, bool need_state) {
  const Tensor state_t = frozen_state_t(a, state);
  const bool pair = in.by.pair != 0, list = in.by.list != 0;
  Gradients grads{in.need_table ? empty({in.table.size(0), in.table.size(1)}, in.table) : empty({0}, in.table),
                  empty({in.need_margin ? a.batch : 0}, in.table),
                  empty({in.need_logits ? a.modalities : 0, a.batch, a.list}, in.table)};
  a.state_t = state_t.const_data_ptr();
  a.margin = pair || list ? margin.mutable_data_ptr() : nullptr;
  a.logits = pair || list ? logits.mutable_data_ptr() : nullptr;
  a.grad_margin = in.need_margin ? grads.margin.const_data_ptr() : nullptr;
  a.grad_logits = in.need_logits ? grads.logits.const_data_ptr() : nullptr;
  const int64_t samples = in.of_pairs() ? tasks_of(num_blocks(a.batch)) : 0;
  const int64_t groups = need_state ? samples + (in.by.emb != 0 ? tasks_of(num_blocks(in.nodes.size(0))) : 0) : 0;
  Tensor sums = empty({groups, a.modalities, a.e, a.d}, in.table);
  Frozen<T> teacher(a, need_state ? mutable_data<T>(sums) : nullptr);
  auto [total, terms] = Distilled<T, Frozen<T>>(in, grads, teacher).run();
  check_memory(teacher.failed(), "distill_frozen");
  Tensor grad_state = need_state ? empty({a.modalities, a.e, a.d}, in.table) : empty({0}, in.table);
  if (need_state) add_in_order(sums.const_data_ptr(), groups, grad_state);
  return {total, terms, grads.table, grad_state};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> distill_frozen(
    Tensor table, int64_t num_users, Tensor users, Tensor candidates, Tensor nodes, Tensor content, Tensor design,
    Tensor ids, Tensor omega, Tensor state, Tensor asked, Tensor listed, int64_t first_item, Tensor list_weights,
    Tensor emb_weights, double bpr, double pair, double list, double emb, double pair_tau, bool bernoulli, double alpha,
    double beta, double list_tau, bool coupled, double gamma, bool need_table, bool need_state) {
  check_type(content, "content", table.scalar_type());
  FrozenArgs a = frozen_args(content, design, ids, omega, state, asked, "asked", listed, "listed", first_item);
  check_dim(users, "users", 1);
  check_dim(candidates, "candidates", 2);
  check_dim(nodes, "nodes", 1);
  check_size(content, "content", 2, table.size(1));
  check_size(listed, "listed", 0, users.size(0));
  check_size(listed, "listed", 1, list != 0 ? candidates.size(1) : 0);
  MMKD_CHECK(a.num_targets == (emb != 0 ? nodes.numel() : 0), "asked: expected 3 ids for each of the ", a.batch,
             " users and one for each of the ", emb != 0 ? nodes.numel() : 0, " nodes, got ", asked.numel());
  MMKD_CHECK(emb == 0 || a.modalities <= kMostTeachers, "content: expected at most ", kMostTeachers,
             " modalities where EmbKD has a weight, got ", a.modalities);
  Tensor margin = empty({a.batch}, table), logits = empty({a.modalities, a.batch, a.list}, table);
  const OptTensor of_margin(margin), of_logits(logits);
  const Inputs in{table,
                  users,
                  candidates,
                  nodes,
                  of_margin,
                  of_logits,
                  list_weights,
                  emb_weights,
                  num_users,
                  a.modalities,
                  {bpr, pair, list, emb},
                  pair_tau,
                  bernoulli,
                  alpha,
                  beta,
                  list_tau,
                  coupled,
                  gamma,
                  need_table,
                  need_state && pair != 0,
                  need_state && list != 0};
  check_inputs(in);
  return a.dtype == DType::f64 ? run<double>(in, a, state, margin, logits, need_state)
                               : run<float>(in, a, state, margin, logits, need_state);
}

}  // namespace mmkd

STABLE_TORCH_LIBRARY_IMPL(mmkd, CPU, m) { m.impl("distill_frozen", TORCH_BOX(&mmkd::distill_frozen)); }
