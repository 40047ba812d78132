// Argument checks shared by every op. A message names the argument, what was expected, what came.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace mmkd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

template <class... Args>
[[noreturn]] inline void fail(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  throw std::runtime_error(out.str());
}

#define MMKD_CHECK(cond, ...)               \
  do {                                      \
    if (!(cond)) ::mmkd::fail(__VA_ARGS__); \
  } while (0)

inline std::string shape_of(const Tensor& t) {
  std::ostringstream out;
  out << '[';
  for (int64_t i = 0; i < t.dim(); ++i) out << (i ? ", " : "") << t.size(i);
  out << ']';
  return out.str();
}

inline void check_dim(const Tensor& t, const char* name, int64_t dim) {
  MMKD_CHECK(t.dim() == dim, name, ": expected ", dim, " dimension(s), got shape ", shape_of(t));
}

inline void check_size(const Tensor& t, const char* name, int64_t axis, int64_t size) {
  MMKD_CHECK(t.size(axis) == size, name, ": expected size ", size, " on axis ", axis, ", got shape ", shape_of(t));
}

inline void check_type(const Tensor& t, const char* name, ScalarType type) {
  MMKD_CHECK(t.scalar_type() == type, name, ": expected dtype ", torch::headeronly::toString(type), ", got ",
             torch::headeronly::toString(t.scalar_type()));
}

inline void check_shape(const Tensor& t, const char* name, std::initializer_list<int64_t> shape, ScalarType type) {
  check_dim(t, name, static_cast<int64_t>(shape.size()));
  check_type(t, name, type);
  int64_t axis = 0;
  for (const int64_t size : shape) check_size(t, name, axis++, size);
  MMKD_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor");
}

inline bool is_float(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::Double || t == ScalarType::BFloat16 || t == ScalarType::Half;
}

inline void check_float(const Tensor& t, const char* name) {
  MMKD_CHECK(is_float(t.scalar_type()), name, ": expected float32, float64, bfloat16 or float16, got ",
             torch::headeronly::toString(t.scalar_type()));
}

// The type sums are kept in: float32 for everything but float64.
inline ScalarType accumulate_type(ScalarType t) {
  return t == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Whether every entry of an index lies in [0, bound): one pass without a branch.
inline bool all_below(const int64_t* index, int64_t n, int64_t bound) {
  uint64_t worst = 0;
  for (int64_t i = 0; i < n; ++i) worst = std::max(worst, static_cast<uint64_t>(index[i]));
  return n == 0 || worst < static_cast<uint64_t>(bound);
}

template <class T>
inline const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
inline T* mutable_data(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

}  // namespace mmkd
