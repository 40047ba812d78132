// What the loss entries share: checked tables and scalars.
#pragma once
#include "cuda/context.h"

namespace mmkd::cuda {

inline void check_tables(const Tensor& user_emb, const Tensor& item_emb) {
  check_table(user_emb, "user_emb");
  check_table(item_emb, "item_emb");
  check_type(item_emb, "item_emb", user_emb.scalar_type());
  check_size(item_emb, "item_emb", 1, user_emb.size(1));
}

// A scalar that stays on the device.
inline const void* scalar_of(const Tensor& t, const char* name, ScalarType type) {
  check_type(t, name, type);
  MMKD_CHECK(t.numel() == 1, name, ": expected one number, got shape ", shape_of(t));
  return t.const_data_ptr();
}

// A loss: written by the kernel, but for an empty batch, which launches none.
inline Tensor scalar(const Tensor& like, ScalarType type, bool zero) {
  return zero ? zeros({}, like, type) : empty({}, like, type);
}

inline Tensor nothing(const Tensor& like) { return empty({0}, like); }

// Where gradients are added by atomics: the table's shape, in the accumulator type.
inline Tensor accumulator(const Tensor& table, bool need) {
  return need ? zeros_like(table, accumulate_type(table.scalar_type())) : nothing(table);
}
inline void* pointer(Tensor& t, bool need) { return need ? t.mutable_data_ptr() : nullptr; }
inline const void* pointer(const OptTensor& t) { return t ? t->const_data_ptr() : nullptr; }

}  // namespace mmkd::cuda
