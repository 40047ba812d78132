// List scores and disentangled list-wise KD on the CPU (spec section 4).
#include "cpu/list_kd_kernel.h"
#include "cpu/loss_args.h"
#include "cpu/pair_grads.h"

namespace mmkd {
namespace {

// A [rows, K] or [M, rows, K] tensor of scores in the accumulator type.
void check_scores(const Tensor& t, const char* name, ScalarType type, int64_t rows, int64_t k) {
  check_type(t, name, type);
  check_size(t, name, t.dim() - 2, rows);
  check_size(t, name, t.dim() - 1, k);
  MMKD_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor");
}

}  // namespace

ListKdArgs list_kd_args(const Tensor& teacher, const Tensor& weights, ScalarType acc, int64_t batch, int64_t k,
                        double alpha, double beta, double tau, bool coupled) {
  MMKD_CHECK(acc == ScalarType::Float || acc == ScalarType::Double, "student_logits: expected float32 or float64, got ",
             torch::headeronly::toString(acc));
  MMKD_CHECK(k >= 2, "candidates: expected K >= 2, got K = ", k);
  MMKD_CHECK(tau > 0, "tau: expected > 0, got ", tau);
  check_dim(teacher, "teacher_logits", 3);
  check_scores(teacher, "teacher_logits", acc, batch, k);
  check_dim(weights, "modality_weights", 1);
  check_size(weights, "modality_weights", 0, teacher.size(0));
  check_type(weights, "modality_weights", acc);
  MMKD_CHECK(weights.is_contiguous(), "modality_weights: expected a contiguous tensor");
  ListKdArgs a{};
  a.f64 = acc == ScalarType::Double;
  a.teacher = teacher.const_data_ptr();
  a.weight = weights.const_data_ptr();
  a.batch = batch;
  a.k = k;
  a.modalities = teacher.size(0);
  a.alpha = alpha;
  a.beta = beta;
  a.tau = tau;
  a.coupled = coupled;
  return a;
}

namespace {

ListScoresArgs scores_args(const Tensor& user_emb, const Tensor& item_emb, const Tensor& users,
                           const Tensor& candidates) {
  check_pair_tables(user_emb, item_emb);
  check_dim(users, "users", 1);
  check_index(users, "users", 1, users.size(0));
  check_index(candidates, "candidates", 2, users.size(0));
  return {dtype_of(user_emb),        user_emb.const_data_ptr(),
          item_emb.const_data_ptr(), data<int64_t>(users),
          data<int64_t>(candidates), user_emb.size(0),
          item_emb.size(0),          user_emb.size(1),
          candidates.size(1),        nullptr};
}

[[noreturn]] void fail_indices(const ListScoresArgs& a, const Tensor& users, const Tensor& candidates) {
  check_entries(users, "users", a.num_users);
  check_entries(candidates, "candidates", a.num_items);
  fail("users, candidates: changed while they were being read");
}

// The loss, summed over blocks in their order. first(begin, end) runs on a block before its losses are taken and says
// whether to go on.
template <class First>
Tensor loss_of(const ListKdArgs& a, const Tensor& like, const First& first, bool& good) {
  const int64_t blocks = num_blocks(a.batch);
  const std::unique_ptr<double[]> sums(new double[blocks]);
  const ListScratch scratch(a);
  std::atomic<bool> all{true};
  for_chunks(blocks, [&](int64_t c) {
    const int64_t begin = c * kSamples, end = std::min(a.batch, begin + kSamples);
    if (!first(begin, end)) return all.store(false);
    sums[c] = MMKD_ON_ISA(list_kd_loss(a, begin, end, scratch.of(c)));
  });
  good = all.load();
  return good ? mean_of(sums.get(), blocks, a.batch, like, a.f64) : like;
}

Tensor list_scores(Tensor user_emb, Tensor item_emb, Tensor users, Tensor candidates) {
  ListScoresArgs a = scores_args(user_emb, item_emb, users, candidates);
  const int64_t batch = users.size(0);
  Tensor logits = empty({batch, a.k}, user_emb, accumulate_type(user_emb.scalar_type()));
  a.logits = logits.mutable_data_ptr();
  std::atomic<bool> good{true};
  for_chunks(num_blocks(batch), [&](int64_t c) {
    if (!MMKD_ON_ISA(list_scores(a, c * kSamples, std::min(batch, (c + 1) * kSamples)))) good.store(false);
  });
  if (!good.load()) fail_indices(a, users, candidates);
  return logits;
}

std::tuple<Tensor, Tensor> list_scores_backward(Tensor grad, Tensor user_emb, Tensor item_emb, Tensor users,
                                                Tensor candidates, bool need_user, bool need_item) {
  const ListScoresArgs a = scores_args(user_emb, item_emb, users, candidates);
  check_dim(grad, "grad", 2);
  check_scores(grad, "grad", accumulate_type(user_emb.scalar_type()), users.size(0), a.k);
  PairGrads grads(tables_of(user_emb, item_emb), a.users, a.candidates, users.size(0), a.k, need_user, need_item);
  for_chunks(grads.tasks(), [&](int64_t t) { grads.group(t); });
  if (!grads.good()) fail_indices(a, users, candidates);
  return grads.write(grad.const_data_ptr(), user_emb, item_emb);
}

std::tuple<Tensor, Tensor> list_kd(Tensor user_emb, Tensor item_emb, Tensor users, Tensor candidates, Tensor teacher,
                                   Tensor weights, double alpha, double beta, double tau, bool coupled) {
  ListScoresArgs s = scores_args(user_emb, item_emb, users, candidates);
  const int64_t batch = users.size(0);
  const ScalarType acc = accumulate_type(user_emb.scalar_type());
  ListKdArgs a = list_kd_args(teacher, weights, acc, batch, s.k, alpha, beta, tau, coupled);
  Tensor logits = empty({batch, s.k}, user_emb, acc);
  a.logits = s.logits = logits.mutable_data_ptr();
  bool good = true;
  Tensor loss = loss_of(a, logits, [&](int64_t b, int64_t e) { return MMKD_ON_ISA(list_scores(s, b, e)); }, good);
  if (!good) fail_indices(s, users, candidates);
  return {loss, logits};
}

std::tuple<Tensor, Tensor, Tensor> list_kd_backward(Tensor grad, Tensor user_emb, Tensor item_emb, Tensor users,
                                                    Tensor candidates, Tensor teacher, Tensor weights, Tensor logits,
                                                    double alpha, double beta, double tau, bool coupled, bool need_user,
                                                    bool need_item, bool need_teacher) {
  const ListScoresArgs s = scores_args(user_emb, item_emb, users, candidates);
  const int64_t batch = users.size(0);
  const ScalarType acc = accumulate_type(user_emb.scalar_type());
  ListKdArgs a = list_kd_args(teacher, weights, acc, batch, s.k, alpha, beta, tau, coupled);
  check_dim(logits, "logits", 2);
  check_scores(logits, "logits", acc, batch, s.k);
  a.logits = logits.const_data_ptr();
  a.scale = scalar_of(grad, "grad", acc) / static_cast<double>(std::max<int64_t>(1, batch));
  Tensor grad_teacher = need_teacher ? empty({a.modalities, batch, s.k}, teacher) : empty({0}, teacher);
  if (need_teacher) a.grad_teacher = grad_teacher.mutable_data_ptr();
  const bool need_tables = need_user || need_item;
  const std::unique_ptr<char[]> pair_weights(new char[need_tables ? batch * s.k * (a.f64 ? 8 : 4) : 0]);
  if (need_tables) a.grad_student = pair_weights.get();

  PairGrads grads(tables_of(user_emb, item_emb), s.users, s.candidates, batch, s.k, need_user, need_item);
  const ListScratch scratch(a);
  const int64_t tasks = need_tables ? grads.tasks() : 0;
  for_chunks(
      tasks + num_blocks(batch),
      [&](int64_t c) {
        if (c < tasks) return grads.group(c);
        const int64_t block = c - tasks, begin = block * kSamples;
        MMKD_ON_ISA(list_kd_grad(a, begin, std::min(batch, begin + kSamples), scratch.of(block)));
      },
      batch * s.k <= kSamples);
  if (!need_tables) return {empty({0}, user_emb), empty({0}, item_emb), grad_teacher};
  if (!grads.good()) fail_indices(s, users, candidates);
  auto [grad_user, grad_item] = grads.write(pair_weights.get(), user_emb, item_emb);
  return {grad_user, grad_item, grad_teacher};
}

Tensor list_kd_scores(Tensor student, Tensor teacher, Tensor weights, double alpha, double beta, double tau,
                      bool coupled) {
  check_dim(student, "student_logits", 2);
  ListKdArgs a = list_kd_args(teacher, weights, student.scalar_type(), student.size(0), student.size(1), alpha, beta,
                              tau, coupled);
  MMKD_CHECK(student.is_contiguous(), "student_logits: expected a contiguous tensor");
  a.logits = student.const_data_ptr();
  bool good = true;
  return loss_of(a, student, [](int64_t, int64_t) { return true; }, good);
}

std::tuple<Tensor, Tensor> list_kd_scores_backward(Tensor grad, Tensor student, Tensor teacher, Tensor weights,
                                                   double alpha, double beta, double tau, bool coupled,
                                                   bool need_student, bool need_teacher) {
  check_dim(student, "student_logits", 2);
  const int64_t batch = student.size(0), k = student.size(1);
  ListKdArgs a = list_kd_args(teacher, weights, student.scalar_type(), batch, k, alpha, beta, tau, coupled);
  MMKD_CHECK(student.is_contiguous(), "student_logits: expected a contiguous tensor");
  a.logits = student.const_data_ptr();
  a.scale = scalar_of(grad, "grad", student.scalar_type()) / static_cast<double>(std::max<int64_t>(1, batch));
  Tensor grad_student = need_student ? empty({batch, k}, student) : empty({0}, student);
  Tensor grad_teacher = need_teacher ? empty({a.modalities, batch, k}, teacher) : empty({0}, teacher);
  if (need_student) a.grad_student = grad_student.mutable_data_ptr();
  if (need_teacher) a.grad_teacher = grad_teacher.mutable_data_ptr();
  const ListScratch scratch(a);
  for_chunks(num_blocks(batch), [&](int64_t c) {
    MMKD_ON_ISA(list_kd_grad(a, c * kSamples, std::min(batch, (c + 1) * kSamples), scratch.of(c)));
  });
  return {grad_student, grad_teacher};
}

}  // namespace
}  // namespace mmkd

STABLE_TORCH_LIBRARY_IMPL(mmkd, CPU, m) {
  m.impl("list_scores", TORCH_BOX(&mmkd::list_scores));
  m.impl("list_scores_backward", TORCH_BOX(&mmkd::list_scores_backward));
  m.impl("list_kd", TORCH_BOX(&mmkd::list_kd));
  m.impl("list_kd_backward", TORCH_BOX(&mmkd::list_kd_backward));
  m.impl("list_kd_scores", TORCH_BOX(&mmkd::list_kd_scores));
  m.impl("list_kd_scores_backward", TORCH_BOX(&mmkd::list_kd_scores_backward));
}
