// The collapsed frozen teacher's arguments, checked, and what its passes share: for its own op and for the op that goes
// on to the student's losses.
#pragma once
#include "cpu/frozen_teacher_kernel.h"
#include "cpu/losses.h"
#include "cpu/scratch.h"

namespace mmkd {

constexpr int64_t kFrozenChunk = 32;   // samples whose rows stay in a core's cache
constexpr int64_t kFrozenGroups = 16;  // gradients summed apart, then in order: the same bits for any thread count

// nodes_name, list_name: what the caller's argument is called. Results and gradients are the caller's to fill in.
FrozenArgs frozen_args(const Tensor& content, const Tensor& design, const Tensor& ids, const Tensor& omega,
                       const Tensor& state, const Tensor& nodes, const char* nodes_name, const Tensor& candidates,
                       const char* list_name, int64_t first_item);

// Z^T, [M, d, ep].
Tensor frozen_state_t(const FrozenArgs& a, const Tensor& state);

// out = the sum of `count` arrays of `size` one after the other in `parts`, in order.
void add_in_order(const void* parts, int64_t count, Tensor& out);

inline int64_t frozen_bytes(const FrozenArgs& a) { return a.dtype == DType::f64 ? 8 : 4; }

}  // namespace mmkd
