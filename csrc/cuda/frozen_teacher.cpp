// frozen_teacher for CUDA tensors: one kernel forward, three backward.
#include "cuda/frozen_teacher_kernel.h"
#include "cuda/loss_tables.h"

namespace mmkd::cuda {
namespace {

void check_shape(const Tensor& t, const char* name, std::initializer_list<int64_t> shape, ScalarType type) {
  check_dim(t, name, static_cast<int64_t>(shape.size()));
  check_like(t, name, type);
  int64_t axis = 0;
  for (const int64_t size : shape) check_size(t, name, axis++, size);
}

FrozenArgs args_of(const Tensor& content, const Tensor& design, const Tensor& ids, const Tensor& omega,
                   const Tensor& state, const Tensor& nodes, const Tensor& candidates, int64_t first_item) {
  const ScalarType type = content.scalar_type();
  MMKD_CHECK(type == ScalarType::Float || type == ScalarType::Double, "content: expected float32 or float64, got ",
             torch::headeronly::toString(type));
  check_dim(content, "content", 3);
  check_dim(design, "design", 2);
  check_index(nodes, "nodes");
  check_index(candidates, "candidates", 2);
  FrozenArgs a{};
  a.dtype = dtype_of(content);
  a.modalities = content.size(0);
  a.num_nodes = content.size(1);
  a.d = content.size(2);
  a.e = design.size(1);
  a.batch = candidates.size(0);
  a.list = candidates.size(1);
  a.first_item = first_item;
  check_shape(content, "content", {a.modalities, a.num_nodes, a.d}, type);
  check_shape(design, "design", {a.num_nodes, a.e}, type);
  check_shape(ids, "ids", {a.num_nodes, a.d}, type);
  check_shape(omega, "omega", {a.modalities}, type);
  check_shape(state, "state", {a.modalities, a.e, a.d}, type);
  MMKD_CHECK(first_item >= 0 && first_item <= a.num_nodes, "first_item: expected [0, ", a.num_nodes, "], got ",
             first_item);
  MMKD_CHECK(nodes.numel() >= 3 * a.batch, "nodes: expected at least 3 for each of the ", a.batch,
             " rows of candidates, got ", nodes.numel());
  a.num_targets = nodes.numel() - 3 * a.batch;
  a.content = content.const_data_ptr();
  a.design = design.const_data_ptr();
  a.ids = ids.const_data_ptr();
  a.omega = omega.const_data_ptr();
  a.state = state.const_data_ptr();
  a.nodes = data<int64_t>(nodes);
  a.candidates = data<int64_t>(candidates);
  MMKD_CHECK(frozen_fits(a), "state: a modality's [", a.e, ", ", a.d,
             "] does not fit a block's shared memory; call mmkd.ops.frozen_teacher, which takes other kernels then");
  return a;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor content, Tensor design, Tensor ids, Tensor omega,
                                                   Tensor state, Tensor nodes, Tensor candidates, int64_t first_item) {
  const FrozenArgs a = args_of(content, design, ids, omega, state, nodes, candidates, first_item);
  const Device device(content);
  Tensor margin = empty({a.batch}, content), logits = empty({a.modalities, a.batch, a.list}, content);
  Tensor targets = empty({a.modalities, a.num_targets, a.d}, content);
  Tensor heads = empty({a.modalities, 3 * a.batch, a.d}, content);
  frozen_teacher(
      a, {margin.mutable_data_ptr(), logits.mutable_data_ptr(), targets.mutable_data_ptr(), heads.mutable_data_ptr()},
      device.stream());
  return {margin, logits, targets, heads};
}

// Null where the gradient is not given: an empty tensor, or nothing to give one for.
const void* given(const OptTensor& grad, const char* name, std::initializer_list<int64_t> shape, ScalarType type) {
  if (!grad) return nullptr;
  check_shape(*grad, name, shape, type);
  return grad->numel() ? grad->const_data_ptr() : nullptr;
}

Tensor backward(OptTensor grad_margin, OptTensor grad_logits, OptTensor grad_targets, Tensor content, Tensor design,
                Tensor ids, Tensor omega, Tensor state, Tensor nodes, Tensor candidates, Tensor heads,
                int64_t first_item) {
  const FrozenArgs a = args_of(content, design, ids, omega, state, nodes, candidates, first_item);
  const ScalarType type = content.scalar_type();
  check_shape(heads, "heads", {a.modalities, 3 * a.batch, a.d}, type);
  FrozenGradients g{};
  g.margin = given(grad_margin, "grad_margin", {a.batch}, type);
  g.logits = given(grad_logits, "grad_logits", {a.modalities, a.batch, a.list}, type);
  g.targets = given(grad_targets, "grad_targets", {a.modalities, a.num_targets, a.d}, type);
  g.heads = heads.const_data_ptr();
  const Device device(content);
  const bool by_rows = g.margin || g.logits;
  Tensor rows = by_rows ? empty({a.modalities, 3 * a.batch, a.d}, content) : nothing(content);
  Tensor through = g.logits ? empty({a.modalities, a.batch, a.e}, content) : nothing(content);
  Tensor parts = empty({frozen_parts(a), a.modalities, a.e, a.d}, content);
  Tensor grad = empty({a.modalities, a.e, a.d}, content);
  g.rows = rows.mutable_data_ptr();
  g.through = through.mutable_data_ptr();
  g.parts = parts.mutable_data_ptr();
  g.state = grad.mutable_data_ptr();
  frozen_teacher_backward(a, g, device.stream());
  return grad;
}

}  // namespace
}  // namespace mmkd::cuda

MMKD_CUDA_IMPL(m) {
  m.impl("frozen_teacher", TORCH_BOX(&mmkd::cuda::forward));
  m.impl("frozen_teacher_backward", TORCH_BOX(&mmkd::cuda::backward));
}
