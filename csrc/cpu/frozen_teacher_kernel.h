// The collapsed frozen teacher at a batch (spec section 3): F^m = C^m + K Z^m at the nodes asked for, and what the
// student's losses take from it. Gradients go to Z alone.
#pragma once
#include <stdint.h>

#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace mmkd {

struct FrozenArgs {
  DType dtype;                // f32 or f64, of every table
  const void* content;        // C, [M, N, d]
  const void* design;         // K, [N, e]
  const void* ids;            // [N, d]
  const void* omega;          // [M]
  const void* state;          // Z, [M, e, d]
  const void* state_t;        // Z^T, [M, d, ep], zeros behind e
  const int64_t* nodes;       // [3 B + n]: users, observed items, negatives, then those whose F is returned
  const int64_t* candidates;  // [B, L] items
  void* heads;                // F at the first 3 B nodes, [M, 3, head_rows, d], from sample first_head on
  void* targets;              // F at the others, [M, target_rows, d], from target first_target on
  void* margin;               // [B]
  void* logits;               // [M, B, L]
  const void* grad_margin;    // backward; null: zeros
  const void* grad_logits;
  const void* grad_targets;  // laid out as targets
  bool joint_kept;           // the scratch of sample gradients is as frozen_samples left it for the same samples
  int64_t head_rows, first_head, target_rows, first_target;
  int64_t num_nodes, first_item, d, e, ep, modalities, batch, list, num_targets;
};

// Elements of scratch that one chunk of `rows` samples (or targets) needs.
inline int64_t frozen_scratch(const FrozenArgs& a, int64_t rows) {
  return rows * (3 * (a.e + a.d) + a.modalities * (3 * a.d + a.ep));
}

// Samples [begin, end): heads, margin and logits.
MMKD_KERNEL(void frozen_samples(const FrozenArgs& a, int64_t begin, int64_t end, void* scratch))
// Targets [begin, end).
MMKD_KERNEL(void frozen_targets(const FrozenArgs& a, int64_t begin, int64_t end))
// Adds to `sum` [M, e, d] the gradient of Z by samples, or targets, [begin, end).
MMKD_KERNEL(void frozen_sample_grads(const FrozenArgs& a, int64_t begin, int64_t end, void* scratch, void* sum))
MMKD_KERNEL(void frozen_target_grads(const FrozenArgs& a, int64_t begin, int64_t end, void* scratch, void* sum))

}  // namespace mmkd
