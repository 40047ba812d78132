// What the loss ops share: scalars in and out, and means whose order of summation is fixed.
#pragma once
#include <algorithm>
#include <memory>

#include "cpu/parallel.h"

namespace mmkd {

constexpr int64_t kSamples = 64;  // samples to a block: what a thread takes at a time, and what is summed as one

inline int64_t num_blocks(int64_t batch) { return (batch + kSamples - 1) / kSamples; }

// Dtypes and shapes of two tables; contents are checked where they are used.
inline void check_pair_tables(const Tensor& user_emb, const Tensor& item_emb) {
  check_float(user_emb, "user_emb");
  check_type(item_emb, "item_emb", user_emb.scalar_type());
  const Tensor* tables[] = {&user_emb, &item_emb};
  for (int i = 0; i < 2; ++i) {
    const char* name = i ? "item_emb" : "user_emb";
    check_dim(*tables[i], name, 2);
    check_size(*tables[i], name, 1, user_emb.size(1));
    MMKD_CHECK(tables[i]->is_contiguous(), name, ": expected a contiguous tensor");
    MMKD_CHECK(tables[i]->size(0) <= UINT32_MAX, name, ": expected up to 2^32 - 1 rows, got ", tables[i]->size(0));
  }
}

inline void check_index(const Tensor& index, const char* name, int64_t dim, int64_t batch) {
  check_dim(index, name, dim);
  check_type(index, name, ScalarType::Long);
  check_size(index, name, 0, batch);
  MMKD_CHECK(index.is_contiguous(), name, ": expected a contiguous tensor");
  MMKD_CHECK(index.numel() <= UINT32_MAX, name, ": expected up to 2^32 - 1 entries, got ", index.numel());
}

// Raises for the first entry of an index outside [0, bound).
inline void check_entries(const Tensor& index, const char* name, int64_t bound) {
  const int64_t* p = data<int64_t>(index);
  if (all_below(p, index.numel(), bound)) return;
  for (int64_t i = 0, n = index.numel(); i < n; ++i) {
    if (p[i] >= 0 && p[i] < bound) continue;
    MMKD_CHECK(index.dim() == 1, name, ": entry ", i, " is ", p[i], ", expected [0, ", bound, ") (row ",
               i / index.size(1), ", column ", i % index.size(1), ")");
    fail(name, ": entry ", i, " is ", p[i], ", expected [0, ", bound, ")");
  }
}

// A 0-dimensional tensor of the accumulator type.
inline Tensor scalar(double value, const Tensor& like, bool f64) {
  Tensor out = empty({}, like, f64 ? ScalarType::Double : ScalarType::Float);
  if (f64) {
    *mutable_data<double>(out) = value;
  } else {
    *mutable_data<float>(out) = static_cast<float>(value);
  }
  return out;
}

// The mean of n samples from the sums of their blocks, in the blocks' order; 0 where n is 0.
inline Tensor mean_of(const double* sums, int64_t blocks, int64_t n, const Tensor& like, bool f64) {
  double total = 0;
  for (int64_t b = 0; b < blocks; ++b) total += sums[b];
  return scalar(n ? total / static_cast<double>(n) : 0.0, like, f64);
}

// An upstream gradient of a scalar loss.
inline double scalar_of(const Tensor& t, const char* name, ScalarType type) {
  check_type(t, name, type);
  MMKD_CHECK(t.numel() == 1, name, ": expected one number, got shape ", shape_of(t));
  return type == ScalarType::Double ? *data<double>(t) : static_cast<double>(*data<float>(t));
}

}  // namespace mmkd
