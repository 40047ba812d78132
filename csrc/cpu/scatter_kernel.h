// A dense gradient table from the few rows that a batch touches.
#pragma once
#include <stdint.h>

#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace mmkd {

// Rows of the result that begin as something other than zero: row rows[g] - shift, as the sum of the rows of `source`
// that positions starts[g] to starts[g + 1] of `order` name. Rows that are summed are summed in place.
struct BaseRows {
  const uint64_t* order;   // row << 32 | row of source, sorted
  const uint32_t* rows;    // [groups] ascending
  const uint32_t* starts;  // [groups + 1]
  int64_t groups, shift;
  void* source;  // [*, d] the result's dtype
};

// out[r] = sum over the positions p that name row r, ascending, and over k < fan, of weight[p*fan + k] * source[id],
// where id = source_id[p*fan + k], or source_id[p / share] where fan is 1. Rows that no position names become zero.
// With `base` a row begins as what that says.
struct SumRowsArgs {
  DType dtype;  // of source and out; sums and weights are in the accumulator type
  int64_t d;
  const uint64_t* order;   // [positions] row << 32 | position, sorted
  const uint32_t* rows;    // [groups] the touched rows, ascending
  const uint32_t* starts;  // [groups + 1] where a row's positions begin in `order`
  int64_t groups;
  const void* source;  // [*, d]
  const int64_t* source_id;
  const void* weight;
  int64_t fan, share;
  uint32_t* entry_id;  // [positions * fan] scratch
  void* entry_weight;  // [positions * fan] scratch, accumulator type
  void* out;           // [*, d]
  bool stream;         // rows of zeros are written past the caches
  BaseRows base;       // no groups: none
};

// Writes rows [begin, end).
MMKD_KERNEL(void sum_rows(const SumRowsArgs& a, int64_t begin, int64_t end))

// out[b] = sum over k < fan of weight[b*fan + k] * source[id[b*fan + k]].
struct WeightedRowsArgs {
  bool f64;  // everything: float64, else float32
  int64_t d, fan;
  const void* source;
  const int64_t* id;
  const void* weight;
  void* out;
};
MMKD_KERNEL(void weighted_rows(const WeightedRowsArgs& a, int64_t begin, int64_t end))

}  // namespace mmkd
