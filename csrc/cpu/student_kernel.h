// The prompt's state and the L2 term of a student's step (spec sections 3 and 4).
#pragma once
#include <stdint.h>

#include "cpu/isa.h"

namespace mmkd {

// Z^m = V V^T S^m, V = [W_P; b_P^T].
struct PromptStateArgs {
  bool f64;
  const void* stacked;    // V, [e, k]
  const void* stacked_t;  // V^T, [k, ep], zeros behind e
  const void* mixed;      // the S^m side by side, [e, M d]
  const void* mixed_t;    // their transposes, [M, d, ep], zeros behind e; for the way back
  void* square;           // V V^T, or on the way back its gradient, [e, ep]
  void* state;            // Z, or on the way back its gradient, [M, e, d]
  void* grad;             // of V, [e, k]
  int64_t e, ep, k, d, modalities;
};

// Rows [begin, end) of V V^T and of Z.
MMKD_KERNEL(void prompt_state(const PromptStateArgs& a, int64_t begin, int64_t end))
// Rows [begin, end) of the gradient of V V^T; when all are there, of the gradient of V.
MMKD_KERNEL(void prompt_square_grads(const PromptStateArgs& a, int64_t begin, int64_t end))
MMKD_KERNEL(void prompt_grads(const PromptStateArgs& a, int64_t begin, int64_t end))

struct L2Args {
  bool f64;
  const void* table;    // [N, d]
  const int64_t* rows;  // [n]
  const void* weights;  // [n]
  int64_t d;
};

// sum of weights[i] ||table[rows[i]]||^2 over [begin, end)
MMKD_KERNEL(double weighted_squares(const L2Args& a, int64_t begin, int64_t end))

}  // namespace mmkd
