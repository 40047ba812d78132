// Products of tables that fit a core's cache, in register tiles. Included only by *_kernel.cpp (see vec.h).
#pragma once
#include "cpu/vec.h"

namespace mmkd {
namespace MMKD_ISA {

constexpr int kTile = MMKD_VBYTES == 64 ? 4 : 2;  // rows of a register tile, four vectors wide

// Rows of a table, picked by index or one after the other.
template <class A>
struct Rows {
  const A* base;
  int64_t stride;
  const int64_t* index;  // null: in order
  MMKD_INLINE const A* at(int64_t i) const { return base + (index ? index[i] : i) * stride; }
};

// out[r][c0 ...] = start[r] + sum_k left[r][k] * right[k], R rows and NV vectors of columns; start null: zeros.
template <int R, int NV, class A>
void product_tile(const A* const* left, int64_t inner, const A* right, int64_t ld, const A* const* start, A* const* out,
                  int64_t c0) {
  using W = Vec<A>;
  typename W::V s[R][NV];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) s[r][v] = start ? W::load(start[r] + c0 + v * W::size) : typename W::V{};
  }
  for (int64_t k = 0; k < inner; ++k) {
    typename W::V b[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) b[v] = W::load(right + k * ld + c0 + v * W::size);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const A w = left[r][k];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) s[r][v] += w * b[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) W::store(out[r] + c0 + v * W::size, s[r][v]);
  }
}

// All columns of R rows.
template <int R, class A>
void product_rows(const A* const* left, int64_t inner, const A* right, int64_t ld, const A* const* start, A* const* out,
                  int64_t columns) {
  constexpr int64_t w = Vec<A>::size;
  int64_t c = 0;
  for (; c + 4 * w <= columns; c += 4 * w) product_tile<R, 4>(left, inner, right, ld, start, out, c);
  for (; c + w <= columns; c += w) product_tile<R, 1>(left, inner, right, ld, start, out, c);
  for (; c < columns; ++c) {
    for (int r = 0; r < R; ++r) {
      A s = start ? start[r][c] : A(0);
      for (int64_t k = 0; k < inner; ++k) s += left[r][k] * right[k * ld + c];
      out[r][c] = s;
    }
  }
}

struct Nothing {
  void operator()() const {}
};

// out[i] = start[i] + left[i] right, for n rows; out: [n, columns] with stride ldo. meanwhile(): called before each
// tile, to ask for what is needed later while the processor multiplies.
template <class A, class Meanwhile = Nothing>
void product(const Rows<A>& left, int64_t n, int64_t inner, const A* right, int64_t ld, const Rows<A>* start, A* out,
             int64_t ldo, int64_t columns, const Meanwhile& meanwhile = {}) {
  const A *rows[kTile], *from[kTile];
  A* to[kTile];
  const auto fill = [&](int64_t i, int count) {
    for (int r = 0; r < count; ++r) {
      rows[r] = left.at(i + r);
      if (start) from[r] = start->at(i + r);
      to[r] = out + (i + r) * ldo;
    }
  };
  const A* const* begin = start ? from : nullptr;
  int64_t i = 0;
  for (; i + kTile <= n; i += kTile) {
    for (int64_t next = i + kTile; next < i + 2 * kTile && next < n; ++next) {
      prefetch_row(left.at(next), inner);
      if (start) prefetch_row(start->at(next), columns);
    }
    fill(i, kTile);
    meanwhile();
    product_rows<kTile>(rows, inner, right, ld, begin, to, columns);
  }
  for (; i < n; ++i) {
    fill(i, 1);
    product_rows<1>(rows, inner, right, ld, begin, to, columns);
  }
}

// sum[k0 + k][c0 ...] += sum_i a[i][k0 + k] * b[i], KB rows of `sum` and NV vectors of columns.
template <int KB, int NV, class A>
void outer_tile(const A* a, int64_t lda, const A* b, int64_t ldb, int64_t n, A* sum, int64_t ld, int64_t k0,
                int64_t c0) {
  using W = Vec<A>;
  typename W::V s[KB][NV];
#pragma GCC unroll 8
  for (int k = 0; k < KB; ++k) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) s[k][v] = W::load(sum + (k0 + k) * ld + c0 + v * W::size);
  }
  for (int64_t i = 0; i < n; ++i) {
    typename W::V bv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) bv[v] = W::load(b + i * ldb + c0 + v * W::size);
#pragma GCC unroll 8
    for (int k = 0; k < KB; ++k) {
      const A w = a[i * lda + k0 + k];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) s[k][v] += w * bv[v];
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < KB; ++k) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) W::store(sum + (k0 + k) * ld + c0 + v * W::size, s[k][v]);
  }
}

template <int KB, class A>
void outer_rows(const A* a, int64_t lda, const A* b, int64_t ldb, int64_t n, A* sum, int64_t k0, int64_t d) {
  constexpr int64_t w = Vec<A>::size;
  int64_t c = 0;
  for (; c + 4 * w <= d; c += 4 * w) outer_tile<KB, 4>(a, lda, b, ldb, n, sum, d, k0, c);
  for (; c + w <= d; c += w) outer_tile<KB, 1>(a, lda, b, ldb, n, sum, d, k0, c);
  for (; c < d; ++c) {
    for (int k = 0; k < KB; ++k) {
      A s = sum[(k0 + k) * d + c];
      for (int64_t i = 0; i < n; ++i) s += a[i * lda + k0 + k] * b[i * ldb + c];
      sum[(k0 + k) * d + c] = s;
    }
  }
}

// sum += a^T b for a [n, e] and b [n, d]; sum: [e, d].
template <class A>
void add_outer(const A* a, int64_t lda, int64_t e, const A* b, int64_t ldb, int64_t d, int64_t n, A* sum) {
  int64_t k = 0;
  for (; k + kTile <= e; k += kTile) outer_rows<kTile>(a, lda, b, ldb, n, sum, k, d);
  for (; k < e; ++k) outer_rows<1>(a, lda, b, ldb, n, sum, k, d);
}

}  // namespace MMKD_ISA
}  // namespace mmkd
