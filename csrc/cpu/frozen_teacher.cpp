// frozen_teacher on the CPU: the teacher's side of a student's step in one pass forward and one backward.
#include "cpu/frozen_args.h"

namespace mmkd {
namespace {

int64_t chunks_of(int64_t n) { return (n + kFrozenChunk - 1) / kFrozenChunk; }

template <class A>
void transpose_into(const FrozenArgs& a, const A* from, A* to) {
  std::fill_n(to, a.modalities * a.d * a.ep, A(0));
  for (int64_t m = 0; m < a.modalities; ++m) {
    for (int64_t k = 0; k < a.e; ++k) {
      for (int64_t c = 0; c < a.d; ++c) to[(m * a.d + c) * a.ep + k] = from[(m * a.e + k) * a.d + c];
    }
  }
}

template <class A>
void add_typed(const A* parts, int64_t count, int64_t size, A* out) {
  for_range(size, 1024, [&](int64_t begin, int64_t end) {
    std::fill(out + begin, out + end, A(0));
    for (int64_t p = 0; p < count; ++p) {
      for (int64_t i = begin; i < end; ++i) out[i] += parts[p * size + i];
    }
  });
}

}  // namespace

FrozenArgs frozen_args(const Tensor& content, const Tensor& design, const Tensor& ids, const Tensor& omega,
                       const Tensor& state, const Tensor& nodes, const char* nodes_name, const Tensor& candidates,
                       const char* list_name, int64_t first_item) {
  const ScalarType type = content.scalar_type();
  MMKD_CHECK(type == ScalarType::Float || type == ScalarType::Double, "content: expected float32 or float64, got ",
             torch::headeronly::toString(type));
  check_dim(content, "content", 3);
  check_dim(design, "design", 2);
  check_dim(candidates, list_name, 2);
  FrozenArgs a{};
  a.dtype = dtype_of(content);
  a.modalities = content.size(0);
  a.num_nodes = content.size(1);
  a.d = content.size(2);
  a.e = design.size(1);
  a.ep = (a.e + 15) / 16 * 16;
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
  check_index(nodes, nodes_name, 1, nodes.numel());
  MMKD_CHECK(nodes.numel() >= 3 * a.batch, nodes_name, ": expected at least 3 for each of the ", a.batch, " rows of ",
             list_name, ", got ", nodes.numel());
  check_index(candidates, list_name, 2, a.batch);
  check_entries(nodes, nodes_name, a.num_nodes);
  check_entries(candidates, list_name, a.num_nodes - first_item);
  a.num_targets = nodes.numel() - 3 * a.batch;
  a.head_rows = a.batch;
  a.target_rows = a.num_targets;
  a.content = content.const_data_ptr();
  a.design = design.const_data_ptr();
  a.ids = ids.const_data_ptr();
  a.omega = omega.const_data_ptr();
  a.state = state.const_data_ptr();
  a.nodes = data<int64_t>(nodes);
  a.candidates = data<int64_t>(candidates);
  return a;
}

Tensor frozen_state_t(const FrozenArgs& a, const Tensor& state) {
  Tensor out = empty({a.modalities, a.d, a.ep}, state);
  a.dtype == DType::f64 ? transpose_into(a, data<double>(state), mutable_data<double>(out))
                        : transpose_into(a, data<float>(state), mutable_data<float>(out));
  return out;
}

void add_in_order(const void* parts, int64_t count, Tensor& out) {
  if (out.scalar_type() == ScalarType::Double) {
    add_typed(static_cast<const double*>(parts), count, out.numel(), mutable_data<double>(out));
  } else {
    add_typed(static_cast<const float*>(parts), count, out.numel(), mutable_data<float>(out));
  }
}

namespace {

int64_t scratch_bytes(const FrozenArgs& a) { return frozen_scratch(a, kFrozenChunk) * frozen_bytes(a); }

FrozenArgs args_of(const Tensor& content, const Tensor& design, const Tensor& ids, const Tensor& omega,
                   const Tensor& state, const Tensor& nodes, const Tensor& candidates, int64_t first_item) {
  return frozen_args(content, design, ids, omega, state, nodes, "nodes", candidates, "candidates", first_item);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> frozen_teacher(Tensor content, Tensor design, Tensor ids, Tensor omega,
                                                          Tensor state, Tensor nodes, Tensor candidates,
                                                          int64_t first_item) {
  FrozenArgs a = args_of(content, design, ids, omega, state, nodes, candidates, first_item);
  const Tensor state_t = frozen_state_t(a, state);
  Tensor margin = empty({a.batch}, content), logits = empty({a.modalities, a.batch, a.list}, content);
  Tensor targets = empty({a.modalities, a.num_targets, a.d}, content);
  Tensor heads = empty({a.modalities, 3 * a.batch, a.d}, content);
  a.state_t = state_t.const_data_ptr();
  a.margin = margin.mutable_data_ptr();
  a.logits = logits.mutable_data_ptr();
  a.targets = targets.mutable_data_ptr();
  a.heads = heads.mutable_data_ptr();
  const int64_t samples = chunks_of(a.batch), all = samples + chunks_of(a.num_targets);
  std::atomic<bool> failed{false};
  for_chunks(all, [&](int64_t c) {
    if (c < samples) {
      const Scratch scratch(scratch_bytes(a), failed);
      if (!scratch) return;
      MMKD_ON_ISA(frozen_samples(a, c * kFrozenChunk, std::min(a.batch, (c + 1) * kFrozenChunk), scratch.get()));
    } else {
      const int64_t begin = (c - samples) * kFrozenChunk;
      MMKD_ON_ISA(frozen_targets(a, begin, std::min(a.num_targets, begin + kFrozenChunk)));
    }
  });
  check_memory(failed, "frozen_teacher");
  return {margin, logits, targets, heads};
}

// Null where the gradient is not given: an empty tensor, or nothing to give one for.
const void* grad_of(const OptTensor& grad, const char* name, std::initializer_list<int64_t> shape, ScalarType type) {
  if (!grad) return nullptr;
  check_shape(*grad, name, shape, type);
  return grad->numel() ? grad->const_data_ptr() : nullptr;
}

Tensor frozen_teacher_backward(OptTensor grad_margin, OptTensor grad_logits, OptTensor grad_targets, Tensor content,
                               Tensor design, Tensor ids, Tensor omega, Tensor state, Tensor nodes, Tensor candidates,
                               Tensor heads, int64_t first_item) {
  FrozenArgs a = args_of(content, design, ids, omega, state, nodes, candidates, first_item);
  const ScalarType type = content.scalar_type();
  check_shape(heads, "heads", {a.modalities, 3 * a.batch, a.d}, type);
  a.heads = heads.mutable_data_ptr();
  a.grad_margin = grad_of(grad_margin, "grad_margin", {a.batch}, type);
  a.grad_logits = grad_of(grad_logits, "grad_logits", {a.modalities, a.batch, a.list}, type);
  a.grad_targets = grad_of(grad_targets, "grad_targets", {a.modalities, a.num_targets, a.d}, type);
  const int64_t samples = a.grad_margin || a.grad_logits ? chunks_of(a.batch) : 0;
  const int64_t all = samples + (a.grad_targets ? chunks_of(a.num_targets) : 0), groups = std::min(kFrozenGroups, all);
  Tensor out = empty({a.modalities, a.e, a.d}, content), parts = empty({groups, a.modalities, a.e, a.d}, content);
  const int64_t part_bytes = out.numel() * frozen_bytes(a);
  char* sums = static_cast<char*>(parts.mutable_data_ptr());
  std::atomic<bool> failed{false};
  for_chunks(groups, [&](int64_t g) {
    const Scratch scratch(scratch_bytes(a), failed);
    if (!scratch) return;
    char* sum = sums + g * part_bytes;
    std::fill_n(sum, part_bytes, 0);
    for (int64_t c = all * g / groups; c < all * (g + 1) / groups; ++c) {
      const int64_t begin = (c < samples ? c : c - samples) * kFrozenChunk;
      if (c < samples) {
        MMKD_ON_ISA(frozen_sample_grads(a, begin, std::min(a.batch, begin + kFrozenChunk), scratch.get(), sum));
      } else {
        MMKD_ON_ISA(frozen_target_grads(a, begin, std::min(a.num_targets, begin + kFrozenChunk), scratch.get(), sum));
      }
    }
  });
  check_memory(failed, "frozen_teacher");
  add_in_order(sums, groups, out);
  return out;
}

}  // namespace
}  // namespace mmkd

STABLE_TORCH_LIBRARY_IMPL(mmkd, CPU, m) {
  m.impl("frozen_teacher", TORCH_BOX(&mmkd::frozen_teacher));
  m.impl("frozen_teacher_backward", TORCH_BOX(&mmkd::frozen_teacher_backward));
}
