// Features times weights: register tiles of 6 rows (forward) or 6 columns (back) of a table against panels of a weight.
#pragma once
#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace mmkd {

constexpr int64_t kProjectRows = 96;  // rows of a block forward
constexpr int64_t kProjectInner =
    96;  // columns of the table taken at a time: their weights stay in a first-level cache
constexpr int64_t kProjectItems = 192;  // rows of a block back, whose gradients stay there
constexpr int64_t kProjectStrip = 48;   // columns of a strip back

// Columns are filled up with zeros to whole lines of 64 bytes, d to dp. A packed weight is panels of four lines,
// [inner][256 bytes] one after the other, the last one as wide as what is left. The same for every instruction set.
constexpr int64_t project_columns(int64_t d, bool f64) { return f64 ? (d + 7) / 8 * 8 : (d + 15) / 16 * 16; }
constexpr int64_t project_panel(bool f64) { return f64 ? 32 : 64; }

// out[:, column : column + d] = mask * (scale * (x w + shift) + design added), a table at a time.
struct ProjectRows {
  DType dtype;         // of x; everything else is float32, or float64 where x is
  const void* x;       // [rows, k]
  int64_t k;           //
  const void* weight;  // [k, d], packed
  const void* shift;   // [dp], or null
  const void* scale;   // [rows], or null
  const void* design;  // [rows, e], or null
  int64_t e;
  const void* added;  // [e, d], packed, of this table's columns
  const void* mask;   // [rows, width], or null
  void* out;          // [rows, width]
  int64_t width, column, d, dp;
};

// What a thread reads next: the beginnings of some rows, asked for while it works on the last columns of its own.
struct ProjectNext {
  const void* at;
  int64_t stride, bytes;  // from row to row, and of each
  int64_t rows;
};

// What the gradients of all tables start from: with g = mask * grad, design^T g, and scale * g, a table after the
// other, with zeros behind d, and its sums over rows.
struct ProjectMasked {
  bool f64;
  const void* grad;  // [rows, count * d]
  const void* mask;  // the same, or null
  int64_t count, d, dp;
  const void* const* scale;  // count of [rows], each or null
  const void* design;        // [rows, e], or null
  int64_t e;
  void* ready;  // [count, rows, dp]; null where nobody asks for it
  int64_t rows;
};

// x^T g of some columns of one table.
struct ProjectGrad {
  DType dtype;
  const void* x;  // [rows, k]
  int64_t k;
  const void* g;  // [rows, width], from this table's first column on
  int64_t width, dp;
  void* out;  // [k, dp]
};

// Numbers in the scratch of a call of each.
constexpr int64_t project_rows_scratch(int64_t dp) { return kProjectRows * dp + 6 * kProjectInner; }
constexpr int64_t project_masked_scratch(int64_t dp) { return (kProjectItems + 1) * dp; }
constexpr int64_t project_grad_scratch() { return kProjectItems * kProjectStrip; }

// Rows [begin, end), at most kProjectRows.
MMKD_KERNEL(void project_rows(const ProjectRows& a, int64_t begin, int64_t end, const ProjectNext& next, void* scratch))
// Of rows [begin, end): their part of the sums, [count * dp], and of design^T g, [e, count * dp].
MMKD_KERNEL(void project_masked(const ProjectMasked& a, int64_t begin, int64_t end, void* sums, void* by_design,
                                void* scratch))
// Of rows [begin, end) and columns [from, to) of the table, written (not added) into rows [from, to) of `out`.
MMKD_KERNEL(void project_grad(const ProjectGrad& a, int64_t begin, int64_t end, int64_t from, int64_t to,
                              void* scratch))

}  // namespace mmkd
