// BPR and PairKD of a batch (spec section 4): margins from gathered rows, losses and coefficients from margins.
#pragma once
#include <stdint.h>

#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace mmkd {

struct MarginArgs {
  DType dtype;            // of the tables
  const void* user_emb;   // [U, d]
  const void* item_emb;   // [I, d]
  const int64_t* users;   // [B]
  const int64_t* pos;     // [B]
  const int64_t* neg;     // [B]
  void* margin;           // [B] accumulator type
  int64_t d;
};
MMKD_KERNEL(void bpr_margins(const MarginArgs& a, int64_t begin, int64_t end))

struct PairArgs {
  bool f64;              // accumulator type: float64, else float32
  const void* margin;    // [B]
  const void* teacher;   // [B] or null
  void* bpr;             // [B] losses of the samples (forward)
  void* pair;            // [B]
  void* grad_margin;     // [B] coefficients (backward), or null
  void* grad_teacher;    // [B] or null
  double scale_bpr;      // backward: incoming gradient / B
  double scale_pair;
  double tau;
  bool bernoulli;
};
MMKD_KERNEL(void bpr_kd_losses(const PairArgs& a, int64_t begin, int64_t end))
MMKD_KERNEL(void bpr_kd_grads(const PairArgs& a, int64_t begin, int64_t end))

}  // namespace mmkd
