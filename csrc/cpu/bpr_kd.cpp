// bpr_kd on the CPU: margins, losses and coefficients block by block; table gradients grouped by the row they go to.
#include "cpu/loss_args.h"
#include "cpu/pair_grads.h"

namespace mmkd {

PairArgs pair_args(const OptTensor& teacher, int64_t batch, bool f64, double tau, bool bernoulli) {
  if (teacher) {
    check_dim(*teacher, "teacher_margin", 1);
    check_size(*teacher, "teacher_margin", 0, batch);
    check_type(*teacher, "teacher_margin", f64 ? ScalarType::Double : ScalarType::Float);
    MMKD_CHECK(teacher->is_contiguous(), "teacher_margin: expected a contiguous tensor");
  }
  MMKD_CHECK(tau > 0, "tau: expected > 0, got ", tau);
  PairArgs a{};
  a.f64 = f64;
  a.teacher = teacher ? teacher->const_data_ptr() : nullptr;
  a.tau = tau;
  a.bernoulli = bernoulli;
  return a;
}

namespace {

MarginArgs margin_args(const Tensor& user_emb, const Tensor& item_emb, const Tensor& users, const Tensor& pos,
                       const Tensor& neg) {
  check_pair_tables(user_emb, item_emb);
  check_dim(users, "users", 1);
  check_index(users, "users", 1, users.size(0));
  check_index(pos, "pos", 1, users.size(0));
  check_index(neg, "neg", 1, users.size(0));
  return {dtype_of(user_emb),        user_emb.const_data_ptr(),
          item_emb.const_data_ptr(), data<int64_t>(users),
          data<int64_t>(pos),        data<int64_t>(neg),
          user_emb.size(0),          item_emb.size(0),
          user_emb.size(1),          nullptr};
}

[[noreturn]] void fail_indices(const MarginArgs& a, const Tensor& users, const Tensor& pos, const Tensor& neg) {
  check_entries(users, "users", a.num_users);
  check_entries(pos, "pos", a.num_items);
  check_entries(neg, "neg", a.num_items);
  fail("users, pos, neg: changed while they were being read");
}

PairArgs args_of(const Tensor& margin, const OptTensor& teacher, double tau, bool bernoulli) {
  check_dim(margin, "margin", 1);
  MMKD_CHECK(margin.scalar_type() == ScalarType::Float || margin.scalar_type() == ScalarType::Double,
             "margin: expected float32 or float64, got ", torch::headeronly::toString(margin.scalar_type()));
  MMKD_CHECK(margin.is_contiguous(), "margin: expected a contiguous tensor");
  PairArgs a = pair_args(teacher, margin.numel(), margin.scalar_type() == ScalarType::Double, tau, bernoulli);
  a.margin = margin.const_data_ptr();
  return a;
}

// Both mean losses. first(begin, end) runs on a block before its losses are taken and says whether to go on.
template <class First>
std::tuple<Tensor, Tensor> losses(const PairArgs& a, const Tensor& margin, const First& first, bool& good) {
  const int64_t n = margin.numel(), blocks = num_blocks(n);
  const std::unique_ptr<double[]> bpr(new double[blocks]), pair(new double[blocks]);
  std::atomic<bool> all{true};
  for_chunks(blocks, [&](int64_t c) {
    const int64_t begin = c * kSamples, end = std::min(n, begin + kSamples);
    if (!first(begin, end)) return all.store(false);
    const PairLosses sums = MMKD_ON_ISA(bpr_kd_losses(a, begin, end));
    bpr[c] = sums.bpr;
    pair[c] = sums.pair;
  });
  good = all.load();
  if (!good) return {margin, margin};
  return {mean_of(bpr.get(), blocks, n, margin, a.f64), mean_of(pair.get(), blocks, n, margin, a.f64)};
}

void take_scales(PairArgs& a, const Tensor& grad_bpr, const Tensor& grad_pair, const Tensor& margin) {
  const double n = static_cast<double>(std::max<int64_t>(1, margin.numel()));
  a.scale_bpr = scalar_of(grad_bpr, "grad_bpr", margin.scalar_type()) / n;
  a.scale_pair = scalar_of(grad_pair, "grad_pair", margin.scalar_type()) / n;
}

std::tuple<Tensor, Tensor, Tensor> bpr_kd(Tensor user_emb, Tensor item_emb, Tensor users, Tensor pos, Tensor neg,
                                          OptTensor teacher_margin, double tau, bool bernoulli) {
  MarginArgs m = margin_args(user_emb, item_emb, users, pos, neg);
  Tensor margin = empty({users.numel()}, user_emb, accumulate_type(user_emb.scalar_type()));
  m.margin = margin.mutable_data_ptr();
  const PairArgs a = args_of(margin, teacher_margin, tau, bernoulli);
  bool good = true;
  auto [bpr, pair] = losses(a, margin, [&](int64_t b, int64_t e) { return MMKD_ON_ISA(bpr_margins(m, b, e)); }, good);
  if (!good) fail_indices(m, users, pos, neg);
  return {bpr, pair, margin};
}

std::tuple<Tensor, Tensor, Tensor> bpr_kd_backward(Tensor grad_bpr, Tensor grad_pair, Tensor user_emb, Tensor item_emb,
                                                   Tensor users, Tensor pos, Tensor neg, Tensor margin,
                                                   OptTensor teacher_margin, double tau, bool bernoulli, bool need_user,
                                                   bool need_item, bool need_teacher) {
  const MarginArgs m = margin_args(user_emb, item_emb, users, pos, neg);
  check_type(margin, "margin", accumulate_type(user_emb.scalar_type()));
  check_size(margin, "margin", 0, users.numel());
  PairArgs a = args_of(margin, teacher_margin, tau, bernoulli);
  take_scales(a, grad_bpr, grad_pair, margin);
  const int64_t n = users.numel(), blocks = num_blocks(n);
  Tensor grad_teacher = empty({need_teacher && teacher_margin ? n : 0}, margin);
  if (need_teacher && teacher_margin) a.grad_teacher = grad_teacher.mutable_data_ptr();
  const bool need_tables = need_user || need_item;
  const std::unique_ptr<char[]> weights(new char[need_tables ? 2 * n * (a.f64 ? 8 : 4) : 0]);
  const std::unique_ptr<int64_t[]> items(new int64_t[need_tables ? 2 * n : 0]);  // [B, 2]: observed, other
  if (need_tables) {
    a.grad_pair = weights.get();
    for (int64_t b = 0; b < n; ++b) items[2 * b] = m.pos[b], items[2 * b + 1] = m.neg[b];
  }
  PairGrads grads(tables_of(user_emb, item_emb), m.users, items.get(), n, 2, need_user, need_item);
  const int64_t tasks = need_tables ? grads.tasks() : 0;
  for_chunks(
      tasks + blocks,
      [&](int64_t c) {
        if (c < tasks) return grads.group(c);
        const int64_t begin = (c - tasks) * kSamples;
        MMKD_ON_ISA(bpr_kd_grads(a, begin, std::min(n, begin + kSamples)));
      },
      blocks == 1);
  if (!need_tables) return {empty({0}, user_emb), empty({0}, item_emb), grad_teacher};
  if (!grads.good()) fail_indices(m, users, pos, neg);
  auto [grad_user, grad_item] = grads.write(weights.get(), user_emb, item_emb);
  return {grad_user, grad_item, grad_teacher};
}

std::tuple<Tensor, Tensor> bpr_kd_scores(Tensor margin, OptTensor teacher_margin, double tau, bool bernoulli) {
  bool good = true;
  return losses(args_of(margin, teacher_margin, tau, bernoulli), margin, [](int64_t, int64_t) { return true; }, good);
}

std::tuple<Tensor, Tensor> bpr_kd_scores_backward(Tensor grad_bpr, Tensor grad_pair, Tensor margin,
                                                  OptTensor teacher_margin, double tau, bool bernoulli,
                                                  bool need_student, bool need_teacher) {
  PairArgs a = args_of(margin, teacher_margin, tau, bernoulli);
  take_scales(a, grad_bpr, grad_pair, margin);
  const int64_t n = margin.numel();
  Tensor grad = empty({need_student ? n : 0}, margin),
         grad_teacher = empty({need_teacher && teacher_margin ? n : 0}, margin);
  if (need_student) a.grad_margin = grad.mutable_data_ptr();
  if (need_teacher && teacher_margin) a.grad_teacher = grad_teacher.mutable_data_ptr();
  for_chunks(num_blocks(n),
             [&](int64_t c) { MMKD_ON_ISA(bpr_kd_grads(a, c * kSamples, std::min(n, (c + 1) * kSamples))); });
  return {grad, grad_teacher};
}

}  // namespace
}  // namespace mmkd

STABLE_TORCH_LIBRARY_IMPL(mmkd, CPU, m) {
  m.impl("bpr_kd", TORCH_BOX(&mmkd::bpr_kd));
  m.impl("bpr_kd_backward", TORCH_BOX(&mmkd::bpr_kd_backward));
  m.impl("bpr_kd_scores", TORCH_BOX(&mmkd::bpr_kd_scores));
  m.impl("bpr_kd_scores_backward", TORCH_BOX(&mmkd::bpr_kd_scores_backward));
}
