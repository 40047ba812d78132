#include "cpu/spmm_kernel.h"

#include "cpu/vec.h"

namespace mmkd {
namespace MMKD_ISA {
namespace {

constexpr int kAhead = 16;    // non-zeros between a prefetch and its use
constexpr int kBlock = 1024;  // non-zeros gathered at a time where columns are mapped,
constexpr int kRows = 64;     // and rows

template <class T, class I>
struct Row {
  const I* col;
  const Acc<T>* value;      // null: ones
  const Acc<T>* col_scale;  // null: ones
  int64_t n;                // non-zeros
  int64_t ahead;            // non-zeros that may be looked at behind `col`, for prefetching
};

template <class T, class I>
MMKD_INLINE Acc<T> weight_of(const Row<T, I>& row, int64_t j, bool has_value, bool has_scale) {
  Acc<T> w = has_value ? row.value[j] : Acc<T>(1);
  if (has_scale) w *= row.col_scale[row.col[j]];
  return w;
}

// Two neighbouring vectors of a row: as they lie, or (`split`) its even elements and its odd ones.
template <class T>
struct Two {
  static constexpr bool split = false;
};
#if defined(MMKD_ISA_avx512)
template <>
struct Two<bf16_t> {  // a bfloat16 is the upper half of a float: a shift and a mask, where widening in order needs four
  static constexpr bool split = true;
  static MMKD_INLINE void load(const bf16_t* p, vf& even, vf& odd) {
    const __m512i both = _mm512_loadu_si512(p);
    even = reinterpret_cast<vf>(_mm512_slli_epi32(both, 16));
    odd = reinterpret_cast<vf>(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static MMKD_INLINE void in_order(vf& even, vf& odd) {
    const __m512i lower = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i upper = _mm512_add_epi32(lower, _mm512_set1_epi32(8));
    const __m512 e = reinterpret_cast<__m512>(even), o = reinterpret_cast<__m512>(odd);
    even = reinterpret_cast<vf>(_mm512_permutex2var_ps(e, lower, o));
    odd = reinterpret_cast<vf>(_mm512_permutex2var_ps(e, upper, o));
  }
};
#endif

// acc[0..NV) = sum_j w_j * x[col_j][c0 ...]; the accumulators stay in registers.
template <int NV, class T, class I>
MMKD_INLINE void gather(const Row<T, I>& row, const T* x, int64_t d, bool has_value, bool has_scale,
                        typename Vec<T>::V* acc) {
  using W = Vec<T>;
  typename W::V s[NV];
#pragma GCC unroll 16
  for (int v = 0; v < NV; ++v) s[v] = typename W::V{};
  for (int64_t j = 0; j < row.n; ++j) {
    if (j + kAhead < row.ahead) {
      const char* next = reinterpret_cast<const char*>(x + static_cast<int64_t>(row.col[j + kAhead]) * d);
#pragma GCC unroll 8
      for (unsigned b = 0; b < NV * W::size * sizeof(T); b += 64) __builtin_prefetch(next + b);
    }
    const T* p = x + static_cast<int64_t>(row.col[j]) * d;
    const Acc<T> w = weight_of(row, j, has_value, has_scale);
    if constexpr (Two<T>::split && NV % 2 == 0) {
#pragma GCC unroll 8
      for (int v = 0; v < NV; v += 2) {
        typename W::V even, odd;
        Two<T>::load(p + v * W::size, even, odd);
        s[v] += w * even;
        s[v + 1] += w * odd;
      }
    } else {
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) s[v] += w * W::load(p + v * W::size);
    }
  }
  if constexpr (Two<T>::split && NV % 2 == 0) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; v += 2) Two<T>::in_order(s[v], s[v + 1]);
  }
#pragma GCC unroll 16
  for (int v = 0; v < NV; ++v) acc[v] = s[v];
}

// Picks the loop without the loads it does not need.
template <int NV, class T, class I>
MMKD_INLINE void gather_any(const Row<T, I>& row, const T* x, int64_t d, typename Vec<T>::V* acc) {
  if (row.value && row.col_scale) {
    gather<NV>(row, x, d, true, true, acc);
  } else if (row.value) {
    gather<NV>(row, x, d, true, false, acc);
  } else if (row.col_scale) {
    gather<NV>(row, x, d, false, true, acc);
  } else {
    gather<NV>(row, x, d, false, false, acc);
  }
}

template <class T>
struct Finish {
  const T* add;  // null: nothing
  Acc<T> scale, alpha;
  T* out;
  bool stream;
};

// A full pass over the row's non-zeros for NV vectors of columns from c0 on.
template <int NV, class T, class I>
void columns(const Row<T, I>& row, const T* x, int64_t d, int64_t c0, const Finish<T> f) {
  using W = Vec<T>;
  typename W::V acc[NV];
  gather_any<NV>(row, x + c0, d, acc);
  const Acc<T> scale = f.scale, alpha = f.alpha;
  const T* add = f.add;
#pragma GCC unroll 16
  for (int v = 0; v < NV; ++v) {
    typename W::V r = acc[v] * scale;
    if (add) r += W::load(add + c0 + v * W::size);
    if (f.stream) {
      store_past_caches(f.out + c0 + v * W::size, r * alpha);
    } else {
      W::store(f.out + c0 + v * W::size, r * alpha);
    }
  }
}

template <class T, class I>
void narrow_row(const Row<T, I>& row, const T* x, int64_t d, const Finish<T>& f) {
  for (int64_t c = 0; c < d; ++c) {
    Acc<T> s = 0;
    for (int64_t j = 0; j < row.n; ++j) {
      s += weight_of(row, j, row.value != nullptr, row.col_scale != nullptr) *
           Element<T>::load(x + static_cast<int64_t>(row.col[j]) * d + c);
    }
    Acc<T> r = s * f.scale;
    if (f.add) r += Element<T>::load(f.add + c);
    Element<T>::store(f.out + c, r * f.alpha);
  }
}

// Any d: wide passes, then narrower ones; a last odd piece is one vector that overlaps what is already written.
template <class T, class I>
void whole_row(const Row<T, I>& row, const T* x, int64_t d, const Finish<T>& f) {
  constexpr int64_t w = Vec<T>::size;
  if (d < w) return narrow_row(row, x, d, f);
  int64_t c = 0;
  for (; c + 8 * w <= d; c += 8 * w) columns<8>(row, x, d, c, f);
  if (c + 4 * w <= d) columns<4>(row, x, d, c, f), c += 4 * w;
  if (c + 2 * w <= d) columns<2>(row, x, d, c, f), c += 2 * w;
  if (c + w <= d) columns<1>(row, x, d, c, f), c += w;
  if (c < d) columns<1>(row, x, d, d - w, f);
}

template <class I>
MMKD_INLINE bool columns_in_range(const I* col, int64_t n, int64_t num_cols) {
  using U = decltype(I() + 0u);  // unsigned of the same width: negative columns become huge
  U worst = 0;
  for (int64_t j = 0; j < n; ++j) worst = static_cast<U>(col[j]) > worst ? static_cast<U>(col[j]) : worst;
  return n == 0 || static_cast<uint64_t>(worst) < static_cast<uint64_t>(num_cols);
}
template <>
MMKD_INLINE bool columns_in_range<int64_t>(const int64_t* col, int64_t n, int64_t num_cols) {
  uint64_t worst = 0;
  for (int64_t j = 0; j < n; ++j) worst = static_cast<uint64_t>(col[j]) > worst ? static_cast<uint64_t>(col[j]) : worst;
  return n == 0 || worst < static_cast<uint64_t>(num_cols);
}

// Rows whose columns are looked up in `col_map`: the non-zeros that are not skipped are gathered into a buffer for as
// many rows as fit, so that prefetching sees past the end of a short row.
template <class T, class I>
struct Mapped {
  int32_t col[kBlock];
  Acc<T> w[kBlock];
  Finish<T> finish[kRows];
  int64_t end[kRows];  // of the row's part of `col`
  int64_t rows = 0, n = 0;

  void flush(const T* x, int64_t d) {
    for (int64_t i = 0, from = 0; i < rows; from = end[i++]) {
      whole_row(Row<T, int32_t>{col + from, w + from, nullptr, end[i] - from, n - from}, x, d, finish[i]);
    }
    rows = n = 0;
  }

  // False: the row alone has more than the buffer holds.
  bool add(const SpmmArgs& a, const Row<T, I>& row, const T* x, const Finish<T>& f) {
    if (rows == kRows || n + row.n > kBlock) flush(x, a.d);
    const bool fits = row.n <= kBlock;
    int64_t to = n;
    for (int64_t j = 0; j < row.n; ++j) {
      const int32_t at = a.col_map[row.col[j]];
      if (!fits && to == kBlock) {  // full: only columns that are skipped may follow; what is behind `n` is void
        if (at >= 0) return false;
        continue;
      }
      col[to] = at;
      w[to] = weight_of(row, j, row.value != nullptr, row.col_scale != nullptr);
      to += at >= 0;
    }
    n = to;
    finish[rows] = f;
    end[rows++] = n;
    return true;
  }
};

// A row with more non-zeros than the buffer holds, strip by strip.
template <class T, class I>
void long_mapped_row(const SpmmArgs& a, const Row<T, I>& row, const T* x, const Finish<T>& f) {
  constexpr int64_t width = Vec<T>::size;
  for (int64_t c0 = 0; c0 < a.d; c0 += 8 * width) {
    const int64_t wide = a.d - c0 < 8 * width ? a.d - c0 : 8 * width;
    Acc<T> sum[8 * width] = {};
    for (int64_t k = 0; k < row.n; ++k) {
      const int32_t at = a.col_map[row.col[k]];
      if (at < 0) continue;
      const Acc<T> wk = weight_of(row, k, row.value != nullptr, row.col_scale != nullptr);
      const T* p = x + at * a.d + c0;
      int64_t c = 0;
      for (; c + width <= wide; c += width) {
        typename Vec<Acc<T>>::V s = Vec<Acc<T>>::load(sum + c) + wk * Vec<T>::load(p + c);
        Vec<Acc<T>>::store(sum + c, s);
      }
      for (; c < wide; ++c) sum[c] += wk * Element<T>::load(p + c);
    }
    for (int64_t c = 0; c < wide; ++c) {
      Acc<T> r = sum[c] * f.scale;
      if (f.add) r += Element<T>::load(f.add + c0 + c);
      Element<T>::store(f.out + c0 + c, r * f.alpha);
    }
  }
}

// The first of the rows [begin, end) whose rowptr or col is out of range, or -1. The rows' columns lie one after the
// other, so the good case is two long loops without a branch per row.
template <class I>
int64_t first_bad_row(const int64_t* rowptr, const I* col, int64_t begin, int64_t end, int64_t nnz, int64_t num_cols) {
  int64_t fell = 0;
  for (int64_t r = begin; r < end; ++r) fell |= rowptr[r + 1] - rowptr[r];
  const bool monotone = fell >= 0 && rowptr[begin] >= 0 && rowptr[end] <= nnz;
  if (monotone && columns_in_range(col + rowptr[begin], rowptr[end] - rowptr[begin], num_cols)) return -1;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t lo = rowptr[r], hi = rowptr[r + 1];
    if (lo < 0 || hi < lo || hi > nnz || !columns_in_range(col + lo, hi - lo, num_cols)) return r;
  }
  return -1;
}

MMKD_INLINE bool dense_list(const int64_t* rows, int64_t begin, int64_t end) {
  if (begin >= end || rows[end - 1] - rows[begin] >= 2 * (end - begin)) return false;
  for (int64_t i = begin + 1; i < end; ++i) {
    if (rows[i - 1] >= rows[i]) return false;
  }
  return true;
}

// The rows of x that the first non-zeros of row r will read. Nothing of r is checked yet.
template <class T, class I>
MMKD_INLINE void prefetch_head(const SpmmArgs& a, int64_t r, const I* col, const T* x) {
  const int64_t lo = a.rowptr[r], hi = a.rowptr[r + 1];
  if (lo < 0 || hi > a.nnz) return;
  for (int64_t j = lo; j < hi && j < lo + kAhead; ++j) prefetch_row(x + static_cast<int64_t>(col[j]) * a.d, a.d);
}

template <class T, class I>
int64_t spmm_typed(const SpmmArgs& a, int64_t begin, int64_t end) {
  const I* col = static_cast<const I*>(a.col);
  if (!a.rows && begin < end) {
    const int64_t bad = first_bad_row(a.rowptr, col, begin, end, a.nnz, a.num_cols);
    if (bad >= 0) return bad;
  }
  const T* x = static_cast<const T*>(a.x);
  const Acc<T>* value = static_cast<const Acc<T>*>(a.value);
  const Acc<T>* row_scale = static_cast<const Acc<T>*>(a.row_scale);
  // Of a list that leaves out few rows, what lies between is checked in one go as well.
  const bool checked =
      !a.rows || (dense_list(a.rows, begin, end) &&
                  first_bad_row(a.rowptr, col, a.rows[begin], a.rows[end - 1] + 1, a.nnz, a.num_cols) < 0);
  Mapped<T, I> mapped;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t r = a.rows ? a.rows[i] : i;
    const int64_t lo = a.rowptr[r], hi = a.rowptr[r + 1];
    if (!checked && (lo < 0 || hi < lo || hi > a.nnz || !columns_in_range(col + lo, hi - lo, a.num_cols))) return r;
    const int64_t extra = a.add_map ? a.add_map[r] : r;
    const Finish<T> f{a.add && extra >= 0 ? static_cast<const T*>(a.add) + extra * a.d : nullptr,
                      row_scale ? row_scale[r] : Acc<T>(1), static_cast<Acc<T>>(a.alpha),
                      static_cast<T*>(a.out) + (a.compact ? i : r) * a.d, a.stream};
    // Prefetching may look past this row, into the next one's columns, where rows are taken in order.
    const bool in_order = !a.rows || (i + 1 < end && a.rows[i + 1] == r + 1);
    const int64_t ahead = (in_order ? a.nnz : hi) - lo;
    const Row<T, I> row{col + lo, value ? value + lo : nullptr, static_cast<const Acc<T>*>(a.col_scale), hi - lo,
                        ahead};
    if (!a.col_map) {
      if (!in_order && i + 1 < end) prefetch_head(a, a.rows[i + 1], col, x);
      whole_row(row, x, a.d, f);
    } else if (!mapped.add(a, row, x, f)) {
      long_mapped_row(a, row, x, f);
    }
  }
  mapped.flush(x, a.d);
  if (a.stream) finish_streams();
  return -1;
}

template <class T, class I>
int64_t sddmm_typed(const SddmmArgs& a, int64_t begin, int64_t end) {
  const I* col = static_cast<const I*>(a.col);
  const Acc<T>* row_scale = static_cast<const Acc<T>*>(a.row_scale);
  const Acc<T>* col_scale = static_cast<const Acc<T>*>(a.col_scale);
  if (begin < end) {
    const int64_t bad = first_bad_row(a.rowptr, col, begin, end, a.nnz, a.num_cols);
    if (bad >= 0) return bad;
  }
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t j = a.rowptr[r]; j < a.rowptr[r + 1]; ++j) {
      Acc<T> s = dot(static_cast<const T*>(a.a) + r * a.d,
                     static_cast<const T*>(a.b) + static_cast<int64_t>(col[j]) * a.d, a.d);
      if (row_scale) s *= row_scale[r];
      if (col_scale) s *= col_scale[col[j]];
      static_cast<Acc<T>*>(a.out)[j] = s;
    }
  }
  return -1;
}

template <class I>
MMKD_INLINE int64_t first_at_least(const I* col, int64_t lo, int64_t hi, int64_t bound) {
  while (lo < hi) {
    const int64_t mid = lo + (hi - lo) / 2;
    if (col[mid] < bound) {
      lo = mid + 1;
    } else {
      hi = mid;
    }
  }
  return lo;
}

template <class A>
MMKD_INLINE void axpy(A* y, const A* x, A w, int64_t d) {
  int64_t c = 0;
  for (; c + Vec<A>::size <= d; c += Vec<A>::size) Vec<A>::store(y + c, Vec<A>::load(y + c) + w * Vec<A>::load(x + c));
  for (; c < d; ++c) y[c] += w * x[c];
}

template <class A, class I>
void push_typed(const PushArgs& a, int64_t target_begin, int64_t target_end) {
  const I* col = static_cast<const I*>(a.col);
  const A* scale = static_cast<const A*>(a.scale);
  A* h = static_cast<A*>(a.h);
  for (int64_t i = 0; i < a.num_rows; ++i) {
    const int64_t r = a.rows[i];
    const A* g = static_cast<const A*>(a.g) + i * a.d;
    const int64_t hi = a.rowptr[r + 1];
    for (int64_t j = first_at_least(col, a.rowptr[r], hi, target_begin); j < hi && col[j] < target_end; ++j) {
      if (j + 4 < hi) __builtin_prefetch(h + static_cast<int64_t>(col[j + 4]) * a.d, 1);
      axpy(h + static_cast<int64_t>(col[j]) * a.d, g, scale[r] * scale[col[j]], a.d);
    }
    if (r >= target_begin && r < target_end) axpy(h + r * a.d, g, A(1), a.d);
  }
}

}  // namespace

#define MMKD_BY_TYPE(function, ...)                                                                     \
  switch (a.dtype) {                                                                                    \
    case DType::f32:                                                                                    \
      return a.col64 ? function<float, int64_t>(__VA_ARGS__) : function<float, int32_t>(__VA_ARGS__);   \
    case DType::f64:                                                                                    \
      return a.col64 ? function<double, int64_t>(__VA_ARGS__) : function<double, int32_t>(__VA_ARGS__); \
    case DType::bf16:                                                                                   \
      return a.col64 ? function<bf16_t, int64_t>(__VA_ARGS__) : function<bf16_t, int32_t>(__VA_ARGS__); \
    default:                                                                                            \
      return a.col64 ? function<f16_t, int64_t>(__VA_ARGS__) : function<f16_t, int32_t>(__VA_ARGS__);   \
  }

int64_t spmm(const SpmmArgs& a, int64_t begin, int64_t end){MMKD_BY_TYPE(spmm_typed, a, begin, end)}

int64_t sddmm(const SddmmArgs& a, int64_t begin, int64_t end) {
  MMKD_BY_TYPE(sddmm_typed, a, begin, end)
}

void push_rows(const PushArgs& a, int64_t target_begin, int64_t target_end) {
  if (a.dtype == DType::f64) {
    return a.col64 ? push_typed<double, int64_t>(a, target_begin, target_end)
                   : push_typed<double, int32_t>(a, target_begin, target_end);
  }
  return a.col64 ? push_typed<float, int64_t>(a, target_begin, target_end)
                 : push_typed<float, int32_t>(a, target_begin, target_end);
}

}  // namespace MMKD_ISA
}  // namespace mmkd
