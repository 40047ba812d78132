// Adding rows into a table where rows repeat.
#pragma once
#include <stdint.h>

#include "cpu/dtype.h"

namespace mmkd::cuda {

// out[rows[i]] += x[i], by atomics. x: [n, d], out: [num_rows, d], float32 or float64.
void add_rows(DType dtype, const void* x, const int64_t* rows, int64_t n, int64_t num_rows, int64_t d, void* out,
              void* stream);

// The same in a fixed order, for rows sorted beforehand, and for weighted sums of a table's rows:
// out[target[p]] = sum over the positions p of that target, in order, of
//                  sum_{k < terms} coef[q * terms + k] * src[map[(q * terms + k) / div]],   q = origin[p].
struct SegmentSumArgs {
  DType dtype;            // of src and out
  const int64_t* target;  // [n] ascending
  const int64_t* origin;  // [n]
  const int64_t* map;     // source rows; null: (q * terms + k) / div itself
  const void* coef;       // [n * terms] accumulator type; null: ones
  const void* src;        // [num_src, d]
  void* out;              // [num_targets, d]; rows that are nobody's target are left alone
  int64_t n, terms, div, num_src, num_targets, d;
};
void segment_sum(const SegmentSumArgs& a, void* stream);

}  // namespace mmkd::cuda
