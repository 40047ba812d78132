// Draws samples of the stream that mmkd/reference/sampling.py writes down.
#pragma once
#include <stdint.h>

#include "cpu/isa.h"

namespace mmkd::host {

// What is drawn from, and where in the stream. The matrix has been checked; `item` has kRowPad readable entries behind it.
struct DrawArgs {
  const int64_t* rowptr;   // [num_users + 1]
  const uint32_t* item;    // [nnz + kRowPad], strictly ascending in every row
  const uint32_t* active;  // [num_active] users with at least one item
  uint32_t num_active, num_items;
  uint32_t rounds;  // draws before the exact fallback
  uint64_t seed;
  uint32_t epoch, step;
  int64_t num_negatives;
  int64_t* users;       // [size]
  int64_t* candidates;  // [size, num_negatives + 1], the positive first
};

constexpr int64_t kDrawn = 64;   // samples drawn together: enough to hide the way to memory, few enough for the first cache
constexpr int64_t kRowPad = 16;  // rows are read in pieces of this many items

}  // namespace mmkd::host

namespace mmkd {

// Samples begin .. end - 1.
MMKD_KERNEL(void draw(const host::DrawArgs& a, int64_t begin, int64_t end))

}  // namespace mmkd
