// emb_kd on the CPU: one streaming pass, which writes the student's gradient along; one more for teachers that learn.
#include "cpu/emb_kd_kernel.h"
#include "cpu/losses.h"

namespace mmkd {
namespace {

EmbKDArgs args_of(const Tensor& student, const Tensor& teachers, const Tensor& weights, double gamma) {
  check_float(student, "student");
  check_dim(student, "student", 2);
  check_dim(teachers, "teachers", 3);
  check_type(teachers, "teachers", student.scalar_type());
  check_size(teachers, "teachers", 1, student.size(0));
  check_size(teachers, "teachers", 2, student.size(1));
  MMKD_CHECK(student.is_contiguous() && teachers.is_contiguous(), "student, teachers: expected contiguous tensors");
  MMKD_CHECK(teachers.size(0) <= kMostTeachers, "teachers: expected at most ", kMostTeachers, ", got ",
             teachers.size(0));
  check_dim(weights, "modality_weights", 1);
  check_size(weights, "modality_weights", 0, teachers.size(0));
  check_type(weights, "modality_weights", accumulate_type(student.scalar_type()));
  MMKD_CHECK(weights.is_contiguous(), "modality_weights: expected a contiguous tensor");
  MMKD_CHECK(gamma >= 1, "gamma: expected >= 1, got ", gamma);
  EmbKDArgs a{};
  a.dtype = dtype_of(student);
  a.student = student.const_data_ptr();
  a.teachers = teachers.const_data_ptr();
  a.weights = weights.const_data_ptr();
  a.n = student.size(0);
  a.d = student.size(1);
  a.num_teachers = teachers.size(0);
  a.gamma = gamma;
  return a;
}

bool large(const EmbKDArgs& a, const Tensor& like, const void* out) {
  return !out || past_caches(out, a.n, a.d * static_cast<int64_t>(like.element_size()), 0.25);
}

std::tuple<Tensor, Tensor, Tensor> emb_kd(Tensor student, Tensor teachers, Tensor weights, double gamma,
                                          bool with_grad) {
  EmbKDArgs a = args_of(student, teachers, weights, gamma);
  const ScalarType acc = accumulate_type(student.scalar_type());
  Tensor stats = empty({a.n, 1 + 2 * a.num_teachers}, student, acc);
  Tensor grad_student = with_grad ? empty({a.n, a.d}, student) : empty({0}, student);
  a.stats = stats.mutable_data_ptr();
  a.grad_student = with_grad ? grad_student.mutable_data_ptr() : nullptr;
  a.stream = large(a, student, a.grad_student);
  a.scale = a.n ? 1 / static_cast<double>(a.n) : 0;
  const int64_t blocks = num_blocks(a.n);
  const std::unique_ptr<double[]> sums(new double[blocks]);
  for_chunks(blocks, [&](int64_t c) {
    sums[c] = MMKD_ON_ISA(emb_kd_losses(a, c * kSamples, std::min(a.n, (c + 1) * kSamples)));
  });
  return {mean_of(sums.get(), blocks, a.n, stats, acc == ScalarType::Double), stats, grad_student};
}

std::tuple<Tensor, Tensor> emb_kd_backward(Tensor grad, Tensor student, Tensor teachers, Tensor weights, Tensor stats,
                                           double gamma, bool need_student, bool need_teachers) {
  EmbKDArgs a = args_of(student, teachers, weights, gamma);
  check_dim(stats, "stats", 2);
  check_size(stats, "stats", 0, a.n);
  check_size(stats, "stats", 1, 1 + 2 * a.num_teachers);
  check_type(stats, "stats", accumulate_type(student.scalar_type()));
  Tensor grad_student = need_student ? empty({a.n, a.d}, student) : empty({0}, student);
  Tensor grad_teachers = need_teachers ? empty({a.num_teachers, a.n, a.d}, student) : empty({0}, student);
  a.stats = stats.mutable_data_ptr();
  a.grad_student = need_student ? grad_student.mutable_data_ptr() : nullptr;
  a.grad_teachers = need_teachers ? grad_teachers.mutable_data_ptr() : nullptr;
  a.scale = a.n ? scalar_of(grad, "grad", stats.scalar_type()) / static_cast<double>(a.n) : 0;
  a.stream = large(a, student, a.grad_student) && large(a, student, a.grad_teachers);
  for_chunks(num_blocks(a.n),
             [&](int64_t c) { MMKD_ON_ISA(emb_kd_grads(a, c * kSamples, std::min(a.n, (c + 1) * kSamples))); });
  return {grad_student, grad_teachers};
}

}  // namespace
}  // namespace mmkd

STABLE_TORCH_LIBRARY_IMPL(mmkd, CPU, m) {
  m.impl("emb_kd", TORCH_BOX(&mmkd::emb_kd));
  m.impl("emb_kd_backward", TORCH_BOX(&mmkd::emb_kd_backward));
}
