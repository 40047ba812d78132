// bpr_kd on the CPU: margins, losses and coefficients by kernel; table gradients as one sparse product each.
#include "cpu/bpr_kd_kernel.h"
#include "cpu/loss_tables.h"
#include "cpu/scatter.h"

namespace mmkd {
namespace {

void check_batch(const Tensor& user_emb, const Tensor& item_emb, const Tensor& users, const Tensor& pos,
                 const Tensor& neg) {
  check_tables(user_emb, item_emb);
  for (const auto& [ids, name, bound] : {std::tuple{&users, "users", user_emb.size(0)},
                                         std::tuple{&pos, "pos", item_emb.size(0)},
                                         std::tuple{&neg, "neg", item_emb.size(0)}}) {
    check_dim(*ids, name, 1);
    check_size(*ids, name, 0, users.numel());
    check_ids(*ids, name, bound);
  }
}

PairArgs pair_args(const Tensor& margin, const OptTensor& teacher, double tau, bool bernoulli) {
  if (teacher) check_vector(*teacher, "teacher_margin", margin.numel(), margin.scalar_type());
  MMKD_CHECK(tau > 0, "tau: expected > 0, got ", tau);
  PairArgs a{};
  a.f64 = margin.scalar_type() == ScalarType::Double;
  a.margin = margin.const_data_ptr();
  a.teacher = teacher ? teacher->const_data_ptr() : nullptr;
  a.tau = tau;
  a.bernoulli = bernoulli;
  return a;
}

std::tuple<Tensor, Tensor> losses(const Tensor& margin, const OptTensor& teacher, double tau, bool bernoulli) {
  const int64_t n = margin.numel();
  PairArgs a = pair_args(margin, teacher, tau, bernoulli);
  Tensor bpr = empty({n}, margin), pair = empty({n}, margin);
  a.bpr = bpr.mutable_data_ptr();
  a.pair = pair.mutable_data_ptr();
  for_range(n, kSampleGrain, [&](int64_t begin, int64_t end) { MMKD_ON_ISA(bpr_kd_losses(a, begin, end)); });
  return {mean_of(bpr, n), mean_of(pair, n)};
}

struct MarginGrads {
  Tensor student, teacher;
};

MarginGrads margin_grads(const Tensor& grad_bpr, const Tensor& grad_pair, const Tensor& margin, const OptTensor& teacher,
                         double tau, bool bernoulli, bool need_student, bool need_teacher) {
  const int64_t n = margin.numel();
  PairArgs a = pair_args(margin, teacher, tau, bernoulli);
  a.scale_bpr = n ? scalar_of(grad_bpr) / static_cast<double>(n) : 0;
  a.scale_pair = n ? scalar_of(grad_pair) / static_cast<double>(n) : 0;
  MarginGrads out{empty({need_student ? n : 0}, margin), empty({need_teacher && teacher ? n : 0}, margin)};
  a.grad_margin = need_student ? out.student.mutable_data_ptr() : nullptr;
  a.grad_teacher = need_teacher && teacher ? out.teacher.mutable_data_ptr() : nullptr;
  for_range(n, kSampleGrain, [&](int64_t begin, int64_t end) { MMKD_ON_ISA(bpr_kd_grads(a, begin, end)); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> bpr_kd(Tensor user_emb, Tensor item_emb, Tensor users, Tensor pos, Tensor neg,
                                          OptTensor teacher_margin, double tau, bool bernoulli) {
  check_batch(user_emb, item_emb, users, pos, neg);
  Tensor margin = empty({users.numel()}, user_emb, accumulate_type(user_emb.scalar_type()));
  const MarginArgs a{dtype_of(user_emb),   user_emb.const_data_ptr(), item_emb.const_data_ptr(),
                     data<int64_t>(users), data<int64_t>(pos),        data<int64_t>(neg),
                     margin.mutable_data_ptr(), user_emb.size(1)};
  for_range(users.numel(), kSampleGrain, [&](int64_t begin, int64_t end) { MMKD_ON_ISA(bpr_margins(a, begin, end)); });
  auto [bpr, pair] = losses(margin, teacher_margin, tau, bernoulli);
  return {bpr, pair, margin};
}

template <class A>
Tensor user_grad(const A* c, const int64_t* users, const int64_t* pos, const int64_t* neg, int64_t n,
                 const Tensor& item_emb, int64_t num_users) {
  RowEntries<A> entries(2 * n);
  for (int64_t b = 0; b < n; ++b) {
    entries.target[2 * b] = entries.target[2 * b + 1] = users[b];
    entries.source[2 * b] = pos[b];
    entries.source[2 * b + 1] = neg[b];
    entries.coef[2 * b] = c[b];
    entries.coef[2 * b + 1] = -c[b];
  }
  return scatter_rows(entries, item_emb, num_users);
}

template <class A>
Tensor item_grad(const A* c, const int64_t* users, const int64_t* pos, const int64_t* neg, int64_t n,
                 const Tensor& user_emb, int64_t num_items) {
  RowEntries<A> entries(2 * n);
  for (int64_t b = 0; b < n; ++b) {
    entries.target[2 * b] = pos[b];
    entries.target[2 * b + 1] = neg[b];
    entries.source[2 * b] = entries.source[2 * b + 1] = users[b];
    entries.coef[2 * b] = c[b];
    entries.coef[2 * b + 1] = -c[b];
  }
  return scatter_rows(entries, user_emb, num_items);
}

std::tuple<Tensor, Tensor, Tensor> bpr_kd_backward(Tensor grad_bpr, Tensor grad_pair, Tensor user_emb, Tensor item_emb,
                                                   Tensor users, Tensor pos, Tensor neg, Tensor margin,
                                                   OptTensor teacher_margin, double tau, bool bernoulli, bool need_user,
                                                   bool need_item, bool need_teacher) {
  check_batch(user_emb, item_emb, users, pos, neg);
  check_vector(margin, "margin", users.numel(), accumulate_type(user_emb.scalar_type()));
  const MarginGrads g =
      margin_grads(grad_bpr, grad_pair, margin, teacher_margin, tau, bernoulli, need_user || need_item, need_teacher);
  Tensor grad_user = empty({0}, user_emb), grad_item = empty({0}, item_emb);
  const auto tables = [&](const auto* c) {
    const int64_t *u = data<int64_t>(users), *p = data<int64_t>(pos), *q = data<int64_t>(neg), n = users.numel();
    if (need_user) grad_user = user_grad(c, u, p, q, n, item_emb, user_emb.size(0));
    if (need_item) grad_item = item_grad(c, u, p, q, n, user_emb, item_emb.size(0));
  };
  if (margin.scalar_type() == ScalarType::Double) {
    tables(data<double>(g.student));
  } else {
    tables(data<float>(g.student));
  }
  return {grad_user, grad_item, g.teacher};
}

void check_margin(const Tensor& margin) {
  check_dim(margin, "margin", 1);
  MMKD_CHECK(margin.scalar_type() == ScalarType::Float || margin.scalar_type() == ScalarType::Double,
             "margin: expected float32 or float64, got ", torch::headeronly::toString(margin.scalar_type()));
  MMKD_CHECK(margin.is_contiguous(), "margin: expected a contiguous tensor");
}

std::tuple<Tensor, Tensor> bpr_kd_scores(Tensor margin, OptTensor teacher_margin, double tau, bool bernoulli) {
  check_margin(margin);
  return losses(margin, teacher_margin, tau, bernoulli);
}

std::tuple<Tensor, Tensor> bpr_kd_scores_backward(Tensor grad_bpr, Tensor grad_pair, Tensor margin,
                                                  OptTensor teacher_margin, double tau, bool bernoulli,
                                                  bool need_student, bool need_teacher) {
  check_margin(margin);
  const MarginGrads g =
      margin_grads(grad_bpr, grad_pair, margin, teacher_margin, tau, bernoulli, need_student, need_teacher);
  return {g.student, g.teacher};
}

}  // namespace
}  // namespace mmkd

STABLE_TORCH_LIBRARY_IMPL(mmkd, CPU, m) {
  m.impl("bpr_kd", TORCH_BOX(&mmkd::bpr_kd));
  m.impl("bpr_kd_backward", TORCH_BOX(&mmkd::bpr_kd_backward));
  m.impl("bpr_kd_scores", TORCH_BOX(&mmkd::bpr_kd_scores));
  m.impl("bpr_kd_scores_backward", TORCH_BOX(&mmkd::bpr_kd_scores_backward));
}
