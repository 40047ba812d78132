// Sparse-dense products on a GPU: what the op entries hand to the kernels. Plain numbers and device pointers.
#pragma once
#include <stdint.h>

#include "cpu/dtype.h"

namespace mmkd::cuda {

// A CSR matrix, or some of its rows: position i stands for row rows[i] (rows null: row i). The entries of position i
// are numbered offsets[i] .. offsets[i + 1] - 1; without `rows`, offsets is rowptr.
struct Csr {
  const int64_t* rowptr;   // [num_rows + 1]
  const void* col;         // [nnz] int64 if col64, else int32
  const int64_t* rows;     // [n] or null
  const int64_t* offsets;  // [n + 1]
  int64_t n, num_rows, num_cols, nnz;
  bool col64;
};

// Cuts the work (one per entry, one per position) into `segments` pieces of about equal size. cut: [segments + 1] pairs
// (position, entry number) where a piece begins. Only rows longer than a piece are cut inside; shorter ones stay whole.
void make_plan(const Csr& m, int64_t segments, int64_t* cut, void* stream);

// out[o] = alpha * (add[r] + row_scale[r] * sum_j value[j] * col_scale[col[j]] * x[col[j]]),
// r = rows[i] or i, o = i if compact, else r.
struct SpmmArgs {
  Csr m;
  const int64_t* cut;  // make_plan's
  int64_t segments;
  DType dtype;  // of x, add and out
  bool wide;    // rows may be moved 16 bytes at a time
  bool compact;
  const void* x;            // [num_cols, d]
  const void* value;        // [nnz] accumulator type, or null for ones
  const void* row_scale;    // [num_rows] accumulator type, or null
  const void* col_scale;    // [num_cols] accumulator type, or null
  const void* add;          // [num_rows, d] or null
  const uint8_t* add_mask;  // [num_rows] 0 where `add` counts as zero; null: all count
  const uint8_t* active;    // [num_cols] 0 where x's row counts as zero, whatever it holds; null: none does
  const uint8_t* needed;    // [num_rows] 0 for rows that are left unwritten; null: all are written
  void* partial;            // [segments, 2, d] accumulator type, scratch for the rows that were cut
  void* out;
  int64_t d;
  double alpha;
};
void spmm(const SpmmArgs& a, void* stream);

// out[j] = row_scale[r] * col_scale[col[j]] * <a[r], b[col[j]]>: the gradient of `value`.
struct SddmmArgs {
  Csr m;
  const int64_t* cut;
  int64_t segments;
  DType dtype;
  bool wide;
  const void* a;  // [num_rows, d]
  const void* b;  // [num_cols, d]
  const void* row_scale;
  const void* col_scale;
  void* out;  // [nnz] accumulator type
  int64_t d;
};
void sddmm(const SddmmArgs& a, void* stream);

// degrees[0] = 0, degrees[i + 1] = entries of row rows[i].
void row_lengths(const int64_t* rowptr, const int64_t* rows, int64_t n, int64_t num_rows, int64_t* degrees,
                 void* stream);
// flags[rows[i]] = 1.
void mark_rows(const int64_t* rows, int64_t n, int64_t num_rows, uint8_t* flags, void* stream);
// flags[c] = 1 for every c in the entries of m's rows. cut: make_plan's for m.
void mark_neighbours(const Csr& m, const int64_t* cut, int64_t segments, uint8_t* flags, void* stream);

// From the entries sorted by column (stable; perm: where each came from): rowptr, col of the transposed matrix.
// sorted: [nnz] of col's type.
void transpose(const Csr& m, const void* sorted, const int64_t* perm, int64_t* t_rowptr, void* t_col, void* stream);

// out[i] = x[rows[i]], for propagation without layers.
void gather_rows(DType dtype, const void* x, const int64_t* rows, int64_t n, int64_t num_rows, int64_t d, void* out,
                 void* stream);

}  // namespace mmkd::cuda
