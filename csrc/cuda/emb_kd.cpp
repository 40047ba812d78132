// emb_kd for CUDA tensors: one pass forward, one backward.
#include "cuda/emb_kd_kernel.h"
#include "cuda/loss_tables.h"

namespace mmkd::cuda {
namespace {

EmbArgs args_of(const Tensor& student, const Tensor& teachers, const Tensor& weights, double gamma) {
  check_table(student, "student");
  check_dim(teachers, "teachers", 3);
  check_like(teachers, "teachers", student.scalar_type());
  check_size(teachers, "teachers", 1, student.size(0));
  check_size(teachers, "teachers", 2, student.size(1));
  check_dim(weights, "modality_weights", 1);
  check_size(weights, "modality_weights", 0, teachers.size(0));
  check_like(weights, "modality_weights", accumulate_type(student.scalar_type()));
  MMKD_CHECK(gamma >= 1, "gamma: expected >= 1, got ", gamma);
  EmbArgs a{};
  a.dtype = dtype_of(student);
  a.student = student.const_data_ptr();
  a.teachers = teachers.const_data_ptr();
  a.weights = weights.const_data_ptr();
  a.n = student.size(0);
  a.d = student.size(1);
  a.modalities = teachers.size(0);
  a.gamma = gamma;
  a.wide = wide_rows(a.d, student, teachers);
  return a;
}

// The gradient is left to the way back: `grad_student` is empty.
std::tuple<Tensor, Tensor, Tensor> emb_kd(Tensor student, Tensor teachers, Tensor weights, double gamma, bool) {
  EmbArgs a = args_of(student, teachers, weights, gamma);
  const Device device(student);
  const ScalarType acc = accumulate_type(student.scalar_type());
  Tensor stats = empty({a.n, 1 + 2 * a.modalities}, student, acc);
  Tensor loss = scalar(student, acc, a.n == 0);
  Tensor partial = empty({emb_blocks(a)}, student, acc), ticket = zeros({1}, student, ScalarType::Int);
  a.stats = stats.mutable_data_ptr();
  const EmbForward f{partial.mutable_data_ptr(), static_cast<unsigned*>(ticket.mutable_data_ptr()),
                     loss.mutable_data_ptr()};
  emb_forward(a, f, device.stream());
  return {loss, stats, nothing(student)};
}

std::tuple<Tensor, Tensor> emb_kd_backward(Tensor grad, Tensor student, Tensor teachers, Tensor weights, Tensor stats,
                                           double gamma, bool need_student, bool need_teachers) {
  EmbArgs a = args_of(student, teachers, weights, gamma);
  const Device device(student);
  const ScalarType acc = accumulate_type(student.scalar_type());
  check_dim(stats, "stats", 2);
  check_like(stats, "stats", acc);
  check_size(stats, "stats", 0, a.n);
  check_size(stats, "stats", 1, 1 + 2 * a.modalities);
  a.stats = const_cast<void*>(stats.const_data_ptr());
  Tensor grad_student = need_student ? empty({a.n, a.d}, student) : nothing(student);
  Tensor grad_teachers = need_teachers ? empty({a.modalities, a.n, a.d}, student) : nothing(student);
  const EmbBackward g{scalar_of(grad, "grad", acc), pointer(grad_student, need_student),
                      pointer(grad_teachers, need_teachers)};
  emb_backward(a, g, device.stream());
  return {grad_student, grad_teachers};
}

}  // namespace
}  // namespace mmkd::cuda

MMKD_CUDA_IMPL(m) {
  m.impl("emb_kd", TORCH_BOX(&mmkd::cuda::emb_kd));
  m.impl("emb_kd_backward", TORCH_BOX(&mmkd::cuda::emb_kd_backward));
}
