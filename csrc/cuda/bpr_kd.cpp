// bpr_kd for CUDA tensors: one kernel forward, one backward.
#include "cuda/bpr_kd_kernel.h"
#include "cuda/loss_tables.h"
#include "cuda/scatter.h"

namespace mmkd::cuda {
namespace {

void check_vector(const Tensor& t, const char* name, int64_t size, ScalarType type) {
  check_dim(t, name, 1);
  check_size(t, name, 0, size);
  check_like(t, name, type);
}

BprArgs loss_args(int64_t batch, const OptTensor& teacher, double tau, bool bernoulli, ScalarType acc) {
  if (teacher) check_vector(*teacher, "teacher_margin", batch, acc);
  MMKD_CHECK(tau > 0, "tau: expected > 0, got ", tau);
  BprArgs a{};
  a.dtype = acc == ScalarType::Double ? DType::f64 : DType::f32;
  a.teacher = pointer(teacher);
  a.batch = batch;
  a.tau = tau;
  a.bernoulli = bernoulli;
  return a;
}

BprArgs table_args(const Tensor& user_emb, const Tensor& item_emb, const Tensor& users, const Tensor& pos,
                   const Tensor& neg, const OptTensor& teacher, double tau, bool bernoulli) {
  check_tables(user_emb, item_emb);
  for (const auto& [t, name] : {std::pair{&users, "users"}, std::pair{&pos, "pos"}, std::pair{&neg, "neg"}}) {
    check_index(*t, name);
    check_size(*t, name, 0, users.numel());
  }
  BprArgs a = loss_args(users.numel(), teacher, tau, bernoulli, accumulate_type(user_emb.scalar_type()));
  a.dtype = dtype_of(user_emb);
  a.user_emb = user_emb.const_data_ptr();
  a.item_emb = item_emb.const_data_ptr();
  a.users = data<int64_t>(users);
  a.pos = data<int64_t>(pos);
  a.neg = data<int64_t>(neg);
  a.num_users = user_emb.size(0);
  a.num_items = item_emb.size(0);
  a.d = user_emb.size(1);
  a.wide = wide_rows(a.d, user_emb, item_emb);
  return a;
}

void check_margin(const Tensor& margin) {
  check_dim(margin, "margin", 1);
  check_dense(margin, "margin");
  MMKD_CHECK(margin.scalar_type() == ScalarType::Float || margin.scalar_type() == ScalarType::Double,
             "margin: expected float32 or float64, got ", torch::headeronly::toString(margin.scalar_type()));
}

std::pair<Tensor, Tensor> losses(const BprArgs& a, BprForward f, const Tensor& like, const Device& device) {
  const ScalarType acc = accumulate_type(like.scalar_type());
  Tensor bpr = scalar(like, acc, a.batch == 0), pair = scalar(like, acc, a.batch == 0);
  Tensor partial = empty({bpr_blocks(a), 2}, like, acc), ticket = zeros({1}, like, ScalarType::Int);
  f.partial = partial.mutable_data_ptr();
  f.ticket = static_cast<unsigned*>(ticket.mutable_data_ptr());
  f.bpr = bpr.mutable_data_ptr();
  f.pair = pair.mutable_data_ptr();
  bpr_forward(a, f, device.stream());
  return {bpr, pair};
}

std::tuple<Tensor, Tensor, Tensor> bpr_kd(Tensor user_emb, Tensor item_emb, Tensor users, Tensor pos, Tensor neg,
                                          OptTensor teacher_margin, double tau, bool bernoulli) {
  const BprArgs a = table_args(user_emb, item_emb, users, pos, neg, teacher_margin, tau, bernoulli);
  const Device device(user_emb);
  Tensor margin = empty({a.batch}, user_emb, accumulate_type(user_emb.scalar_type()));
  BprForward f{};
  f.margin = margin.mutable_data_ptr();
  auto [bpr, pair] = losses(a, f, user_emb, device);
  return {bpr, pair, margin};
}

std::tuple<Tensor, Tensor, Tensor> bpr_kd_backward(Tensor grad_bpr, Tensor grad_pair, Tensor user_emb, Tensor item_emb,
                                                   Tensor users, Tensor pos, Tensor neg, Tensor margin,
                                                   OptTensor teacher_margin, double tau, bool bernoulli, bool need_user,
                                                   bool need_item, bool need_teacher) {
  const BprArgs a = table_args(user_emb, item_emb, users, pos, neg, teacher_margin, tau, bernoulli);
  const Device device(user_emb);
  const ScalarType type = user_emb.scalar_type(), acc = accumulate_type(type);
  check_vector(margin, "margin", a.batch, acc);
  const bool by_teacher = need_teacher && teacher_margin, sorted = deterministic() && (need_user || need_item);
  Tensor grad_teacher = by_teacher ? empty({a.batch}, margin) : nothing(margin);
  Tensor user = accumulator(user_emb, need_user && !sorted), item = accumulator(item_emb, need_item && !sorted);
  Tensor coef = sorted ? empty({a.batch, 2}, margin) : nothing(margin);
  Tensor pairs = sorted ? empty({a.batch, 2}, users) : nothing(users);
  BprBackward g{};
  g.margin = margin.const_data_ptr();
  g.grad_bpr = scalar_of(grad_bpr, "grad_bpr", acc);
  g.grad_pair = scalar_of(grad_pair, "grad_pair", acc);
  g.grad_user = pointer(user, need_user && !sorted);
  g.grad_item = pointer(item, need_item && !sorted);
  g.grad_teacher = pointer(grad_teacher, by_teacher);
  g.coef = pointer(coef, sorted);
  g.pairs = static_cast<int64_t*>(pointer(pairs, sorted));
  bpr_backward(a, g, device.stream());
  if (sorted) {
    if (need_user) user = user_gradient(coef, user_emb, item_emb, users, pairs, device);
    if (need_item) item = item_gradient(coef, user_emb, item_emb, users, pairs, device);
  }
  return {cast(user, type), cast(item, type), grad_teacher};
}

std::tuple<Tensor, Tensor> bpr_kd_scores(Tensor margin, OptTensor teacher_margin, double tau, bool bernoulli) {
  check_margin(margin);
  const Device device(margin);
  BprForward f{};
  f.given = margin.const_data_ptr();
  return losses(loss_args(margin.numel(), teacher_margin, tau, bernoulli, margin.scalar_type()), f, margin, device);
}

std::tuple<Tensor, Tensor> bpr_kd_scores_backward(Tensor grad_bpr, Tensor grad_pair, Tensor margin,
                                                  OptTensor teacher_margin, double tau, bool bernoulli,
                                                  bool need_student, bool need_teacher) {
  check_margin(margin);
  const Device device(margin);
  const ScalarType acc = margin.scalar_type();
  const BprArgs a = loss_args(margin.numel(), teacher_margin, tau, bernoulli, acc);
  const bool by_teacher = need_teacher && teacher_margin;
  Tensor student = need_student ? empty({a.batch}, margin) : nothing(margin);
  Tensor teacher = by_teacher ? empty({a.batch}, margin) : nothing(margin);
  BprBackward g{};
  g.margin = margin.const_data_ptr();
  g.grad_bpr = scalar_of(grad_bpr, "grad_bpr", acc);
  g.grad_pair = scalar_of(grad_pair, "grad_pair", acc);
  g.grad_margin = pointer(student, need_student);
  g.grad_teacher = pointer(teacher, by_teacher);
  bpr_backward(a, g, device.stream());
  return {student, teacher};
}

}  // namespace
}  // namespace mmkd::cuda

MMKD_CUDA_IMPL(m) {
  m.impl("bpr_kd", TORCH_BOX(&mmkd::cuda::bpr_kd));
  m.impl("bpr_kd_backward", TORCH_BOX(&mmkd::cuda::bpr_kd_backward));
  m.impl("bpr_kd_scores", TORCH_BOX(&mmkd::cuda::bpr_kd_scores));
  m.impl("bpr_kd_scores_backward", TORCH_BOX(&mmkd::cuda::bpr_kd_scores_backward));
}
