// What the loss ops share: checked tables, scalars, and means summed in a fixed order.
#pragma once
#include "check.h"
#include "cpu/parallel.h"

namespace mmkd {

inline void check_tables(const Tensor& user_emb, const Tensor& item_emb) {
  check_float(user_emb, "user_emb");
  check_dim(user_emb, "user_emb", 2);
  check_dim(item_emb, "item_emb", 2);
  check_type(item_emb, "item_emb", user_emb.scalar_type());
  check_size(item_emb, "item_emb", 1, user_emb.size(1));
  MMKD_CHECK(user_emb.is_contiguous() && item_emb.is_contiguous(), "user_emb, item_emb: expected contiguous tensors");
}

inline void check_vector(const Tensor& t, const char* name, int64_t size, ScalarType type) {
  check_dim(t, name, 1);
  check_size(t, name, 0, size);
  check_type(t, name, type);
  MMKD_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor");
}

// The value of a scalar tensor in the accumulator type.
inline double scalar_of(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? *data<double>(t) : static_cast<double>(*data<float>(t));
}

// sum(values) / n as a scalar tensor; one fixed order, whatever the threads; 0 for n = 0.
inline Tensor mean_of(const Tensor& values, int64_t n) {
  Tensor out = empty({}, values);
  double sum = 0;
  if (values.scalar_type() == ScalarType::Double) {
    for (int64_t i = 0; i < values.numel(); ++i) sum += data<double>(values)[i];
    *mutable_data<double>(out) = n ? sum / static_cast<double>(n) : 0.0;
  } else {
    for (int64_t i = 0; i < values.numel(); ++i) sum += static_cast<double>(data<float>(values)[i]);
    *mutable_data<float>(out) = static_cast<float>(n ? sum / static_cast<double>(n) : 0.0);
  }
  return out;
}

constexpr int64_t kSampleGrain = 128;  // samples a thread takes at least

}  // namespace mmkd
