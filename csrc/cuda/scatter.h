// Gradients of gathered rows: by atomics, or in a fixed order where torch.use_deterministic_algorithms asks for it.
#pragma once
#include "cuda/context.h"
#include "cuda/scatter_kernel.h"

namespace mmkd::cuda {

// out[rows[i]] += x[i]; out starts at zero. x, out: float32 or float64.
inline void add_rows(const Tensor& x, const Tensor& rows, Tensor& out, const Device& device) {
  const int64_t n = rows.numel(), d = x.size(1);
  if (!deterministic()) {
    add_rows(dtype_of(x), x.const_data_ptr(), data<int64_t>(rows), n, out.size(0), d, out.mutable_data_ptr(),
             device.stream());
    return;
  }
  const auto [target, origin] = sort(rows);
  segment_sum({dtype_of(x), data<int64_t>(target), data<int64_t>(origin), nullptr, nullptr, x.const_data_ptr(),
               out.mutable_data_ptr(), n, 1, 1, n, out.size(0), d},
              device.stream());
}

// Gradients of s_bk = <user_emb[users[b]], item_emb[candidates[b, k]]> from coef[b, k] = dL/ds_bk, in a fixed order.
inline Tensor user_gradient(const Tensor& coef, const Tensor& user_emb, const Tensor& item_emb, const Tensor& users,
                            const Tensor& candidates, const Device& device) {
  Tensor out = zeros_like(user_emb, user_emb.scalar_type());
  const auto [target, origin] = sort(users);
  segment_sum({dtype_of(user_emb), data<int64_t>(target), data<int64_t>(origin), data<int64_t>(candidates),
               coef.const_data_ptr(), item_emb.const_data_ptr(), out.mutable_data_ptr(), users.numel(),
               candidates.size(1), 1, item_emb.size(0), user_emb.size(0), user_emb.size(1)},
              device.stream());
  return out;
}
inline Tensor item_gradient(const Tensor& coef, const Tensor& user_emb, const Tensor& item_emb, const Tensor& users,
                            const Tensor& candidates, const Device& device) {
  Tensor out = zeros_like(item_emb, item_emb.scalar_type());
  const auto [target, origin] = sort(torch::stable::flatten(candidates));
  segment_sum({dtype_of(item_emb), data<int64_t>(target), data<int64_t>(origin), data<int64_t>(users),
               coef.const_data_ptr(), user_emb.const_data_ptr(), out.mutable_data_ptr(), candidates.numel(), 1,
               candidates.size(1), user_emb.size(0), item_emb.size(0), item_emb.size(1)},
              device.stream());
  return out;
}

}  // namespace mmkd::cuda
