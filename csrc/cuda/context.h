// What the op entries need from torch: stream, device, the determinism flag, a few of its own ops. Stable ABI only.
#pragma once
#include <torch/csrc/stable/accelerator.h>

#include <array>

#include "check.h"
#include "cpu/dtype.h"

// The entries register for CUDA tensors; the test build registers the same functions for CPU tensors, where the kernels
// run in simt/.
#if defined(MMKD_SIMT)
#define MMKD_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(mmkd_simt, CPU, m)
#else
#define MMKD_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(mmkd, CUDA, m)
#endif

namespace mmkd::cuda {

// torch.are_deterministic_algorithms_enabled().
bool deterministic();

// Makes the tensor's device current for its lifetime and gives torch's current stream on it.
class Device {
 public:
  explicit Device(const Tensor& t);
  void* stream() const { return stream_; }

 private:
#if !defined(MMKD_SIMT)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_ = nullptr;
};

inline Tensor empty(std::initializer_list<int64_t> sizes, const Tensor& like, ScalarType type) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), type);
}

inline Tensor empty(std::initializer_list<int64_t> sizes, const Tensor& like) {
  return empty(sizes, like, like.scalar_type());
}

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    default:
      return DType::f16;
  }
}

// True where rows of `d` elements of every tensor begin at multiples of 16 bytes. float64 has no such path.
template <class... T>
inline bool wide_rows(int64_t d, const Tensor& first, const T&... more) {
  const auto aligned = [](const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; };
  const int64_t size = static_cast<int64_t>(first.element_size());
  return size < 8 && d * size % 16 == 0 && (aligned(first) && ... && aligned(more));
}

inline void check_dense(const Tensor& t, const char* name) {
  MMKD_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor");
}
inline void check_table(const Tensor& t, const char* name) {
  check_float(t, name);
  check_dim(t, name, 2);
  check_dense(t, name);
}
inline void check_index(const Tensor& t, const char* name, int64_t dim = 1) {
  check_dim(t, name, dim);
  check_type(t, name, ScalarType::Long);
  check_dense(t, name);
}
inline void check_like(const Tensor& t, const char* name, ScalarType type) {
  check_type(t, name, type);
  check_dense(t, name);
}

inline Tensor zeros(std::initializer_list<int64_t> sizes, const Tensor& like, ScalarType type) {
  return torch::stable::new_zeros(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), type);
}
inline Tensor zeros_like(const Tensor& t, ScalarType type) { return torch::stable::new_zeros(t, t.sizes(), type); }
inline Tensor cast(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

// Ascending, stable: (values, where they came from).
inline std::pair<Tensor, Tensor> sort(const Tensor& t) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(t), from(std::optional<bool>(true)), from(int64_t{0}), from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}
inline Tensor cumsum(const Tensor& t) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(t), from(int64_t{0}), from(std::optional<ScalarType>())};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::cumsum", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace mmkd::cuda
