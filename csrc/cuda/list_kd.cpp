// List scores and list-wise KD for CUDA tensors: one kernel forward, one backward.
#include "cuda/list_kd_kernel.h"
#include "cuda/loss_tables.h"
#include "cuda/scatter.h"

namespace mmkd::cuda {
namespace {

ListArgs table_args(const Tensor& user_emb, const Tensor& item_emb, const Tensor& users, const Tensor& candidates) {
  check_tables(user_emb, item_emb);
  check_index(users, "users");
  check_index(candidates, "candidates", 2);
  check_size(candidates, "candidates", 0, users.numel());
  ListArgs a{};
  a.dtype = dtype_of(user_emb);
  a.user_emb = user_emb.const_data_ptr();
  a.item_emb = item_emb.const_data_ptr();
  a.users = data<int64_t>(users);
  a.candidates = data<int64_t>(candidates);
  a.batch = users.numel();
  a.k = candidates.size(1);
  a.d = user_emb.size(1);
  a.num_users = user_emb.size(0);
  a.num_items = item_emb.size(0);
  a.tau = 1;
  a.wide = wide_rows(a.d, user_emb, item_emb);
  return a;
}

// [.., batch, k] scores in the accumulator type.
void check_scores(const Tensor& t, const char* name, int64_t dim, const ListArgs& a, ScalarType acc) {
  check_dim(t, name, dim);
  check_like(t, name, acc);
  check_size(t, name, dim - 2, a.batch);
  check_size(t, name, dim - 1, a.k);
}

void add_teacher(ListArgs& a, const Tensor& teacher, const Tensor& weights, double alpha, double beta, double tau,
                 bool coupled, ScalarType acc) {
  MMKD_CHECK(a.k >= 2, "candidates: expected K >= 2, got K = ", a.k);
  MMKD_CHECK(tau > 0, "tau: expected > 0, got ", tau);
  check_scores(teacher, "teacher_logits", 3, a, acc);
  check_dim(weights, "modality_weights", 1);
  check_size(weights, "modality_weights", 0, teacher.size(0));
  check_like(weights, "modality_weights", acc);
  a.teacher = teacher.const_data_ptr();
  a.weight = weights.const_data_ptr();
  a.modalities = teacher.size(0);
  a.alpha = alpha;
  a.beta = beta;
  a.tau = tau;
  a.coupled = coupled;
}

ListArgs score_args(const Tensor& student) {
  check_dim(student, "student_logits", 2);
  check_dense(student, "student_logits");
  const ScalarType acc = student.scalar_type();
  MMKD_CHECK(acc == ScalarType::Float || acc == ScalarType::Double, "student_logits: expected float32 or float64, got ",
             torch::headeronly::toString(acc));
  ListArgs a{};
  a.dtype = dtype_of(student);
  a.batch = student.size(0);
  a.k = student.size(1);
  return a;
}

Tensor loss_of(const ListArgs& a, ListForward f, const Tensor& like, ScalarType acc, const Device& device) {
  Tensor loss = scalar(like, acc, a.batch == 0);
  Tensor partial = empty({list_blocks(a)}, like, acc), ticket = zeros({1}, like, ScalarType::Int);
  f.partial = partial.mutable_data_ptr();
  f.ticket = static_cast<unsigned*>(ticket.mutable_data_ptr());
  f.loss = loss.mutable_data_ptr();
  list_forward(a, f, device.stream());
  return loss;
}

Tensor list_scores(Tensor user_emb, Tensor item_emb, Tensor users, Tensor candidates) {
  const ListArgs a = table_args(user_emb, item_emb, users, candidates);
  const Device device(user_emb);
  Tensor logits = empty({a.batch, a.k}, user_emb, accumulate_type(user_emb.scalar_type()));
  ListForward f{};
  f.logits = logits.mutable_data_ptr();
  if (a.k > 0) list_forward(a, f, device.stream());
  return logits;
}

std::tuple<Tensor, Tensor> list_scores_backward(Tensor grad, Tensor user_emb, Tensor item_emb, Tensor users,
                                                Tensor candidates, bool need_user, bool need_item) {
  const ListArgs a = table_args(user_emb, item_emb, users, candidates);
  const Device device(user_emb);
  const ScalarType type = user_emb.scalar_type();
  check_scores(grad, "grad", 2, a, accumulate_type(type));
  if (deterministic()) {
    return {need_user ? user_gradient(grad, user_emb, item_emb, users, candidates, device) : nothing(user_emb),
            need_item ? item_gradient(grad, user_emb, item_emb, users, candidates, device) : nothing(item_emb)};
  }
  Tensor user = accumulator(user_emb, need_user), item = accumulator(item_emb, need_item);
  ListBackward g{};
  g.given = grad.const_data_ptr();
  g.grad_user = pointer(user, need_user);
  g.grad_item = pointer(item, need_item);
  list_backward(a, g, device.stream());
  return {cast(user, type), cast(item, type)};
}

std::tuple<Tensor, Tensor> list_kd(Tensor user_emb, Tensor item_emb, Tensor users, Tensor candidates, Tensor teacher,
                                   Tensor weights, double alpha, double beta, double tau, bool coupled) {
  const ScalarType acc = accumulate_type(user_emb.scalar_type());
  ListArgs a = table_args(user_emb, item_emb, users, candidates);
  add_teacher(a, teacher, weights, alpha, beta, tau, coupled, acc);
  const Device device(user_emb);
  Tensor logits = empty({a.batch, a.k}, user_emb, acc);
  ListForward f{};
  f.logits = logits.mutable_data_ptr();
  return {loss_of(a, f, user_emb, acc, device), logits};
}

std::tuple<Tensor, Tensor, Tensor> list_kd_backward(Tensor grad, Tensor user_emb, Tensor item_emb, Tensor users,
                                                    Tensor candidates, Tensor teacher, Tensor weights, Tensor logits,
                                                    double alpha, double beta, double tau, bool coupled, bool need_user,
                                                    bool need_item, bool need_teacher) {
  const ScalarType type = user_emb.scalar_type(), acc = accumulate_type(type);
  ListArgs a = table_args(user_emb, item_emb, users, candidates);
  add_teacher(a, teacher, weights, alpha, beta, tau, coupled, acc);
  check_scores(logits, "logits", 2, a, acc);
  const Device device(user_emb);
  const bool need_tables = need_user || need_item, sorted = need_tables && deterministic();
  const bool off_chip = need_tables && (sorted || !list_fits(a));
  Tensor user = accumulator(user_emb, need_user && !sorted), item = accumulator(item_emb, need_item && !sorted);
  Tensor coef = off_chip ? empty({a.batch, a.k}, logits) : nothing(logits);
  Tensor grad_teacher = need_teacher ? empty({a.modalities, a.batch, a.k}, teacher) : nothing(teacher);
  ListBackward g{};
  g.grad = scalar_of(grad, "grad", acc);
  g.logits = logits.const_data_ptr();
  g.coef = pointer(coef, off_chip);
  g.grad_user = pointer(user, need_user && !sorted);
  g.grad_item = pointer(item, need_item && !sorted);
  g.grad_teacher = pointer(grad_teacher, need_teacher);
  list_backward(a, g, device.stream());
  if (sorted) {
    if (need_user) user = user_gradient(coef, user_emb, item_emb, users, candidates, device);
    if (need_item) item = item_gradient(coef, user_emb, item_emb, users, candidates, device);
  }
  return {cast(user, type), cast(item, type), grad_teacher};
}

Tensor list_kd_scores(Tensor student, Tensor teacher, Tensor weights, double alpha, double beta, double tau,
                      bool coupled) {
  ListArgs a = score_args(student);
  add_teacher(a, teacher, weights, alpha, beta, tau, coupled, student.scalar_type());
  const Device device(student);
  ListForward f{};
  f.given = student.const_data_ptr();
  return loss_of(a, f, student, student.scalar_type(), device);
}

std::tuple<Tensor, Tensor> list_kd_scores_backward(Tensor grad, Tensor student, Tensor teacher, Tensor weights,
                                                   double alpha, double beta, double tau, bool coupled,
                                                   bool need_student, bool need_teacher) {
  ListArgs a = score_args(student);
  add_teacher(a, teacher, weights, alpha, beta, tau, coupled, student.scalar_type());
  const Device device(student);
  Tensor grad_student = need_student ? empty({a.batch, a.k}, student) : nothing(student);
  Tensor grad_teacher = need_teacher ? empty({a.modalities, a.batch, a.k}, teacher) : nothing(teacher);
  ListBackward g{};
  g.grad = scalar_of(grad, "grad", student.scalar_type());
  g.logits = student.const_data_ptr();
  g.coef = pointer(grad_student, need_student);
  g.grad_teacher = pointer(grad_teacher, need_teacher);
  list_backward(a, g, device.stream());
  return {grad_student, grad_teacher};
}

}  // namespace
}  // namespace mmkd::cuda

MMKD_CUDA_IMPL(m) {
  m.impl("list_scores", TORCH_BOX(&mmkd::cuda::list_scores));
  m.impl("list_scores_backward", TORCH_BOX(&mmkd::cuda::list_scores_backward));
  m.impl("list_kd", TORCH_BOX(&mmkd::cuda::list_kd));
  m.impl("list_kd_backward", TORCH_BOX(&mmkd::cuda::list_kd_backward));
  m.impl("list_kd_scores", TORCH_BOX(&mmkd::cuda::list_kd_scores));
  m.impl("list_kd_scores_backward", TORCH_BOX(&mmkd::cuda::list_kd_scores_backward));
}
