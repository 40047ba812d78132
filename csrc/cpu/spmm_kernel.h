// out[i] = alpha * (add[r] + row_scale[r] * sum_j value[j] * col_scale[col[j]] * x[col[j]]),  r = rows[i] or i.
#pragma once
#include <stdint.h>

#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace mmkd {

// A step of AdamW with the rows of a product as the gradient. Tables [num_rows, d] of the accumulator's type.
struct AdamwArgs {
  void *weight, *exp_avg, *exp_avg_sq;
  const void* l2;  // an entry per row of `add`, or null: what the gradient also has of the weights
  double lr, beta1, beta2, eps, weight_decay;
  double root;  // sqrt(1 - beta2^step)
  double size;  // lr / (1 - beta1^step)
};

struct SpmmArgs {
  DType dtype;             // of x, and of add and out but for the next two
  bool add_f32, out_f32;   // x is bfloat16: add (or what AdamW steps), and out with it, are float32
  bool col64;              // col is int64, else int32
  const int64_t* rowptr;   // [num_rows + 1]
  const void* col;         // [nnz]
  const void* x;           // [num_cols, d]; rows below first_col are not read
  const void* value;       // [nnz] accumulator type, or null for ones
  const void* row_scale;   // [num_rows] accumulator type, or null
  const void* col_scale;   // [num_cols] accumulator type, or null; with col_map there is one, of every row of x
  const void* add;         // [*, d] or null
  const int32_t* add_map;  // [num_rows] row of `add` for a node, -1 for none; null: the same row
  const int64_t* rows;     // [n] rows to compute, or null for all
  const int32_t* col_map;  // [num_cols] row of x for a column, -1: read as zero; null: the same row. Without `rows`
                           // and values
  const AdamwArgs* adamw;  // null, or what the result goes into instead of `out`: rows in order, with row_scale,
                           // col_scale and add_map, without values, d a multiple of 16; add and the weights are
                           // float32, or float64 where x is
  void* out;               // [n, d] if compact, else [num_rows, d]
  bool compact;
  bool
      far;  // rows are prefetched whole, those from far away into the second-level cache as well; else their beginnings
  bool stream;  // out is written past the caches; float32, aligned to 64 bytes, d a multiple of 16
  int64_t num_rows, num_cols, nnz, d;
  int64_t first_col;  // columns are to be in [first_col, num_cols)
  double alpha;
};

// Computes positions [begin, end). Returns -1, or the row whose rowptr or col is out of range: that row is left
// unwritten and nothing of x is read for it.
MMKD_KERNEL(int64_t spmm(const SpmmArgs& a, int64_t begin, int64_t end))

// The same step with a gradient [num_rows, d] that is there already; add_map as in SpmmArgs, for `l2`.
MMKD_KERNEL(void adamw_rows(const AdamwArgs& a, DType dtype, const void* grad, const int32_t* add_map, int64_t d,
                            int64_t begin, int64_t end))

// out[j] = row_scale[r] * col_scale[col[j]] * <a[r], b[col[j]]>: the gradient of `value`. Same return value.
struct SddmmArgs {
  DType dtype;
  bool col64;
  const int64_t* rowptr;
  const void* col;
  const void* a;          // [num_rows, d]
  const void* b;          // [num_cols, d]
  const void* row_scale;  // accumulator type, or null
  const void* col_scale;
  void* out;  // [nnz] accumulator type
  int64_t num_rows, num_cols, nnz, d;
};
MMKD_KERNEL(int64_t sddmm(const SddmmArgs& a, int64_t begin, int64_t end))

// to[i] = from[i] in bfloat16, for i in [begin, end).
MMKD_KERNEL(void to_bf16(const float* from, void* to, int64_t begin, int64_t end))

}  // namespace mmkd
