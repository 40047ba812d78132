// BPR and PairKD of a block of samples (spec section 4): margins from gathered rows, losses and coefficients from
// margins.
#pragma once
#include <stdint.h>

#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace mmkd {

struct MarginArgs {
  DType dtype;           // of the tables
  const void* user_emb;  // [num_users, d]
  const void* item_emb;  // [num_items, d]
  const int64_t* users;  // [B]
  const int64_t* pos;    // [B]
  const int64_t* neg;    // [B]
  int64_t num_users, num_items, d;
  void* margin;  // [B] accumulator type
};
// Margins of samples [begin, end). False if one of their indices is out of range: then nothing of theirs was read.
MMKD_KERNEL(bool bpr_margins(const MarginArgs& a, int64_t begin, int64_t end))

struct PairArgs {
  bool f64;             // accumulator type: float64, else float32
  const void* margin;   // [B]
  const void* teacher;  // [B] or null
  double tau;
  bool bernoulli;
  double scale_bpr, scale_pair;  // backward: incoming gradient / B
  void* grad_margin;             // [B] or null
  void* grad_pair;     // [B, 2] or null: the coefficient of the observed item, and its negative for the other one
  void* grad_teacher;  // [B] or null
};
struct PairLosses {
  double bpr, pair;
};
// The sums of the losses of samples [begin, end).
MMKD_KERNEL(PairLosses bpr_kd_losses(const PairArgs& a, int64_t begin, int64_t end))
MMKD_KERNEL(void bpr_kd_grads(const PairArgs& a, int64_t begin, int64_t end))

}  // namespace mmkd
