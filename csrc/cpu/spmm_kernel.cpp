#include "cpu/spmm_kernel.h"

#include "cpu/adamw_step.h"
#include "cpu/vec.h"

namespace mmkd {
namespace MMKD_ISA {
namespace {

constexpr int kNear = 16;                        // non-zeros between a prefetch into the first-level cache and its use,
constexpr int kFar = 48;                         // and into the second, where rows come from further away
constexpr int kFirst = 24;                       // the same where only the beginning of a row is prefetched
constexpr int kBlock = 1024;                     // non-zeros checked, or copied, at a time
constexpr int kRows = 64;                        // rows copied at a time
constexpr int64_t kFarBytes = int64_t{4} << 20;  // rows are prefetched twice if they lie in more than this

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

// Non-zeros that lie one after another: those of a CSR matrix, or of rows that were copied into a buffer.
template <class T, class I>
struct Entries {
  const I* col;
  const Acc<T>* value;      // null: ones
  const Acc<T>* col_scale;  // null: ones
  int64_t n;                // that may be looked at for prefetching; their columns need not be checked yet
};

// What of a row to come is prefetched: all of it, once or twice; where it begins, and the processor brings the rest; or
// nothing.
enum Ahead { kNearRows, kFarRows, kBeginnings, kNothing };

enum Weights { kNone = 0, kValue = 1, kScale = 2, kBoth = 3 };

template <Weights kWeights, class T, class I>
MMKD_INLINE Acc<T> weight_of(const Entries<T, I>& e, int64_t j) {
  Acc<T> w = kWeights & kValue ? e.value[j] : Acc<T>(1);
  if constexpr ((kWeights & kScale) != 0) w *= e.col_scale[e.col[j]];
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

// Every kStep-th byte of the first kBytes of x from row `col` on, into the first-level cache (kLevel 3) or the second
// (2). The column need not be checked: whatever it is, the address is only looked at.
template <int kBytes, int kLevel, int kStep = 64, class T, class I>
MMKD_INLINE void prefetch_at(const T* x, I col, int64_t d) {
  const uint64_t offset = static_cast<uint64_t>(col) * static_cast<uint64_t>(d) * sizeof(T);
  const uintptr_t at = reinterpret_cast<uintptr_t>(x) + offset;
#pragma GCC unroll 8
  for (int b = 0; b < kBytes; b += kStep) __builtin_prefetch(reinterpret_cast<const char*>(at + b), 0, kLevel);
}

// s += sum_j w_j * x[col_j] over the entries [from, to), NV vectors wide; s stays in registers.
template <int NV, Weights kWeights, Ahead kAhead, class T, class I>
MMKD_INLINE void gather(const Entries<T, I>& e, int64_t from, int64_t to, const T* x, int64_t d,
                        typename Vec<T>::V* s) {
  using W = Vec<T>;
  constexpr int kBytes = NV * W::size * static_cast<int>(sizeof(T));
  for (int64_t j = from; j < to; ++j) {
    if constexpr (kAhead == kBeginnings) {
      if (j + kFirst < e.n) prefetch_at<kBytes, 3, 256>(x, e.col[j + kFirst], d);
    } else if (kAhead != kNothing && j + (kAhead == kFarRows ? kFar : kNear) < e.n) {
      prefetch_at<kBytes, 3>(x, e.col[j + kNear], d);
      if constexpr (kAhead == kFarRows) prefetch_at<kBytes, 2>(x, e.col[j + kFar], d);
    }
    const T* p = x + static_cast<int64_t>(e.col[j]) * d;
    const Acc<T> w = weight_of<kWeights>(e, j);
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
}

// A row of the result, out = alpha * (add + scale * sum of its entries [from, to)). A: type of what is added, O: of the
// result; both with the accumulator of what is gathered.
template <class A, class O>
struct RowOut {
  int64_t from, to;
  const A* add;  // null: nothing
  Acc<A> scale;
  O* out;

  MMKD_INLINE typename Vec<A>::V added(int64_t c) const { return Vec<A>::load(add + c); }
};

// What all rows of a product have in common.
template <class T>
struct Table {
  const T* x;
  int64_t d;
  Acc<T> alpha;
  bool stream;
};

// add + scale * sum. Nothing to add is zero, and the product is fused with the sum in every instance of this function:
// which of them computes a row depends on blocks and lists, and its bits must not.
template <class Row, class V>
MMKD_INLINE V summed(const Row& row, V sum, int64_t c) {
  return multiply_add(sum, V{} + row.scale, row.add ? row.added(c) : V{});
}

// Puts the sums of NV vectors of columns in order.
template <int NV, class T>
MMKD_INLINE void in_order(typename Vec<T>::V* s) {
  if constexpr (Two<T>::split && NV % 2 == 0) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; v += 2) Two<T>::in_order(s[v], s[v + 1]);
  }
}

template <int NV, class T, class A, class O>
MMKD_INLINE void finish(const RowOut<A, O>& row, typename Vec<T>::V* s, int64_t c0, const Table<T>& t) {
  using W = Vec<O>;
  in_order<NV, T>(s);
#pragma GCC unroll 16
  for (int v = 0; v < NV; ++v) {
    const typename W::V r = summed(row, s[v], c0 + v * W::size);
    if (t.stream) {
      store_past_caches(row.out + c0 + v * W::size, r * t.alpha);
    } else {
      W::store(row.out + c0 + v * W::size, r * t.alpha);
    }
  }
}

// A row whose result is the gradient of a row of weights, for a step of AdamW.
template <class T>
struct RowStep {
  int64_t from, to;
  const T* add;  // null: nothing
  T scale;
  T l2;  // the gradient also has l2 * weight
  T *weight, *exp_avg, *exp_avg_sq;
  const StepSizes<T>* sizes;

  MMKD_INLINE typename Vec<T>::V added(int64_t c) const { return Vec<T>::load(add + c); }
};

// The tables are read in order, but between other reads, which hides that from the processor: some rows ahead of the
// one at hand are asked for (d = 64: eight).
constexpr int64_t kStepAhead = 512;

template <class T, class V>
MMKD_INLINE void step_at(const RowStep<T>& row, V g, int64_t c) {
  V w, m, v;
  __builtin_prefetch(row.weight + c + kStepAhead, 0, 2);
  __builtin_prefetch(row.exp_avg + c + kStepAhead, 0, 2);
  __builtin_prefetch(row.exp_avg_sq + c + kStepAhead, 0, 2);
  memcpy(&w, row.weight + c, sizeof w);
  memcpy(&m, row.exp_avg + c, sizeof m);
  memcpy(&v, row.exp_avg_sq + c, sizeof v);
  adamw_step(g, w, m, v, row.l2, *row.sizes);
  memcpy(row.weight + c, &w, sizeof w);
  memcpy(row.exp_avg + c, &m, sizeof m);
  memcpy(row.exp_avg_sq + c, &v, sizeof v);
}

template <int NV, class T, class A>
MMKD_INLINE void finish(const RowStep<A>& row, typename Vec<T>::V* s, int64_t c0, const Table<T>& t) {
  using W = Vec<A>;
  in_order<NV, T>(s);
#pragma GCC unroll 16
  for (int v = 0; v < NV; ++v) {
    const int64_t c = c0 + v * W::size;
    const typename W::V sum = summed(row, s[v], c);
    step_at<A, typename W::V>(row, rounded(sum * t.alpha), c);
  }
}

// Calls f.strip<NV>(c0) for strips of NV vectors of columns until all d >= the width of a vector are done: wide ones,
// then narrower ones; a last odd piece is one vector that overlaps what is already written.
template <class T, class F>
MMKD_INLINE void in_strips(int64_t d, const F& f) {
  constexpr int64_t w = Vec<T>::size;
  int64_t c = 0;
  for (; c + 8 * w <= d; c += 8 * w) f.template strip<8>(c);
  if (c + 4 * w <= d) f.template strip<4>(c), c += 4 * w;
  if (c + 2 * w <= d) f.template strip<2>(c), c += 2 * w;
  if (c + w <= d) f.template strip<1>(c), c += w;
  if (c < d) f.template strip<1>(d - w);
}

template <class T, class A, class O>
MMKD_INLINE void finish_narrow(const Table<T>& t, const RowOut<A, O>& row, int64_t c, Acc<T> sum) {
  const Acc<T> base = row.add ? Element<A>::load(row.add + c) : Acc<T>(0);
  const Acc<T> r = sum * row.scale + base;  // as above
  Element<O>::store(row.out + c, r * t.alpha);
}

// A row of fewer columns than a vector has.
template <Weights kWeights, class T, class I, class Row>
void narrow_row(const Entries<T, I>& e, const Table<T>& t, const Row& row) {
  for (int64_t c = 0; c < t.d; ++c) {
    Acc<T> s = 0;
    for (int64_t j = row.from; j < row.to; ++j) {
      s += weight_of<kWeights>(e, j) * Element<T>::load(t.x + static_cast<int64_t>(e.col[j]) * t.d + c);
    }
    finish_narrow(t, row, c, s);
  }
}

// Rows [begin, end) of the result; row_at(i) is the RowOut of one.
template <Weights kWeights, Ahead kAhead, class T, class I, class RowAt>
struct Rows {
  const Entries<T, I> e;
  const Table<T> t;
  int64_t begin, end;
  const RowAt& row_at;

  template <int NV>
  void strip(int64_t c0) const {
    const Entries<T, I> entries = e;
    const Table<T> table = t;
    const RowAt make = row_at;  // by value: what is behind a reference would be read again for every row
    for (int64_t i = begin; i < end; ++i) {
      const auto row = make(i);
      typename Vec<T>::V s[NV] = {};
      gather<NV, kWeights, kAhead>(entries, row.from, row.to, table.x + c0, table.d, s);
      finish<NV, T>(row, s, c0, table);
    }
  }

  void run() const {
    if (t.d < Vec<T>::size) {
      for (int64_t i = begin; i < end; ++i) narrow_row<kWeights>(e, t, row_at(i));
    } else {
      in_strips<T>(t.d, *this);
    }
  }
};

template <Ahead kAhead, class T, class I, class RowAt>
void rows_weighted(const Entries<T, I>& e, const Table<T>& t, int64_t begin, int64_t end, const RowAt& row_at) {
  if (e.value && e.col_scale) {
    Rows<kBoth, kAhead, T, I, RowAt>{e, t, begin, end, row_at}.run();
  } else if (e.value) {
    Rows<kValue, kAhead, T, I, RowAt>{e, t, begin, end, row_at}.run();
  } else if (e.col_scale) {
    Rows<kScale, kAhead, T, I, RowAt>{e, t, begin, end, row_at}.run();
  } else {
    Rows<kNone, kAhead, T, I, RowAt>{e, t, begin, end, row_at}.run();
  }
}

// The first and the last of some columns: unsigned, so that a negative one is huge.
template <class I>
struct Span {
  using U = decltype(I() + 0u);
  U first, last;
};
template <>
struct Span<int64_t> {
  using U = uint64_t;
  U first, last;
};
template <class I>
MMKD_INLINE Span<I> span_of(const I* col, int64_t n) {
  using U = typename Span<I>::U;
  U first = static_cast<U>(-1), last = 0;
  for (int64_t j = 0; j < n; ++j) {
    const U c = static_cast<U>(col[j]);
    first = c < first ? c : first;
    last = c > last ? c : last;
  }
  return {first, last};
}
// Where columns may lie: [first, end).
struct Columns {
  int64_t first, end;

  template <class S>
  MMKD_INLINE bool hold(const S& span) const {
    return static_cast<uint64_t>(span.first) >= static_cast<uint64_t>(first) &&
           static_cast<uint64_t>(span.last) < static_cast<uint64_t>(end);
  }
  template <class I>
  MMKD_INLINE bool hold(const I* col, int64_t n) const {
    return n == 0 || hold(span_of(col, n));
  }
};
MMKD_INLINE Columns columns_of(const SpmmArgs& a) { return {a.first_col, a.num_cols}; }

// A block of rows [begin, end), end > begin, of about kBlock non-zeros.
struct Block {
  int64_t end;
  int64_t bad;    // the first row whose rowptr or col is out of range, or -1
  int64_t reach;  // from the first to the last column, rows of x
};

// The rows' columns lie one after the other, so the good case is two loops without a branch per row.
template <class I>
Block next_block(const int64_t* rowptr, const I* col, int64_t begin, int64_t end, int64_t nnz, const Columns& may) {
  int64_t stop = begin, fell = 0;
  do {
    fell |= rowptr[stop + 1] - rowptr[stop];
    ++stop;
  } while (stop < end && rowptr[stop + 1] - rowptr[begin] <= kBlock);
  const int64_t lo = rowptr[begin], hi = rowptr[stop];
  if (fell >= 0 && lo >= 0 && hi <= nnz) {
    if (hi == lo) return {stop, -1, 0};
    const Span<I> span = span_of(col + lo, hi - lo);
    if (may.hold(span)) return {stop, -1, static_cast<int64_t>(span.last) - static_cast<int64_t>(span.first)};
  }
  int64_t r = begin;
  while (r < stop && rowptr[r] >= 0 && rowptr[r] <= rowptr[r + 1] && rowptr[r + 1] <= nnz &&
         may.hold(col + rowptr[r], rowptr[r + 1] - rowptr[r])) {
    ++r;
  }
  return {stop, r < stop ? r : begin, 0};
}

// Makes the RowOut of row r, which is the i-th to be computed.
template <class A, class O>
struct RowMaker {
  const A* add;
  const int32_t* add_map;
  const Acc<A>* scale;
  O* out;
  int64_t d;
  bool compact;

  explicit RowMaker(const SpmmArgs& a)
      : add(static_cast<const A*>(a.add)),
        add_map(a.add_map),
        scale(static_cast<const Acc<A>*>(a.row_scale)),
        out(static_cast<O*>(a.out)),
        d(a.d),
        compact(a.compact) {}

  MMKD_INLINE RowOut<A, O> operator()(int64_t i, int64_t r, int64_t from, int64_t to) const {
    const int64_t extra = add_map ? add_map[r] : r;
    return {from, to, add && extra >= 0 ? add + extra * d : nullptr, scale ? scale[r] : Acc<A>(1),
            out + (compact ? i : r) * d};
  }
};

// Makes the RowStep of row r.
template <class T>
struct StepMaker {
  const T* add;
  const int32_t* add_map;
  const T *scale, *l2;
  T *weight, *exp_avg, *exp_avg_sq;
  int64_t d;
  const StepSizes<T>* sizes;

  StepMaker(const AdamwArgs& a, const void* grad, const int32_t* map, const void* row_scale, int64_t width,
            const StepSizes<T>& k)
      : add(static_cast<const T*>(grad)),
        add_map(map),
        scale(static_cast<const T*>(row_scale)),
        l2(static_cast<const T*>(a.l2)),
        weight(static_cast<T*>(a.weight)),
        exp_avg(static_cast<T*>(a.exp_avg)),
        exp_avg_sq(static_cast<T*>(a.exp_avg_sq)),
        d(width),
        sizes(&k) {}

  MMKD_INLINE RowStep<T> operator()(int64_t r, int64_t from, int64_t to) const {
    const int64_t extra = add_map[r], at = r * d;
    return {from,
            to,
            extra >= 0 ? add + extra * d : nullptr,
            scale ? scale[r] : T(1),
            extra >= 0 && l2 ? l2[extra] : T(0),
            weight + at,
            exp_avg + at,
            exp_avg_sq + at,
            sizes};
  }
};

template <class T, class I>
Entries<T, I> entries_of(const SpmmArgs& a) {
  return {static_cast<const I*>(a.col), static_cast<const Acc<T>*>(a.value), static_cast<const Acc<T>*>(a.col_scale),
          a.nnz};
}

template <Ahead kAhead>
struct Prefetching {
  static constexpr Ahead ahead = kAhead;
};

// Rows in order: their entries are read where they lie, a block checked at a time, which brings its columns into the
// first-level cache. compute(prefetching, begin, end) computes rows.
template <class T, class I, class Compute>
int64_t rows_in_order(const SpmmArgs& a, int64_t begin, int64_t end, const Compute& compute) {
  const int64_t far_rows = kFarBytes / (a.d * static_cast<int64_t>(sizeof(T)) + 1);
  while (begin < end) {
    const Block block = next_block(a.rowptr, static_cast<const I*>(a.col), begin, end, a.nnz, columns_of(a));
    if (block.bad >= 0) return block.bad;
    if (!a.far) {
      compute(Prefetching<kBeginnings>(), begin, block.end);
    } else if (block.reach > far_rows) {
      compute(Prefetching<kFarRows>(), begin, block.end);
    } else {
      compute(Prefetching<kNearRows>(), begin, block.end);
    }
    begin = block.end;
  }
  return -1;
}

template <class T, class A, class O, class I>
int64_t all_rows(const SpmmArgs& a, const Table<T>& t, int64_t begin, int64_t end) {
  const Entries<T, I> e = entries_of<T, I>(a);
  const auto row_at = [make = RowMaker<A, O>(a), rowptr = a.rowptr](int64_t r) {
    return make(r, r, rowptr[r], rowptr[r + 1]);
  };
  return rows_in_order<T, I>(a, begin, end, [&](auto how, int64_t from, int64_t to) {
    rows_weighted<decltype(how)::ahead>(e, t, from, to, row_at);
  });
}

template <class T, class I>
int64_t all_steps(const SpmmArgs& a, const Table<T>& t, int64_t begin, int64_t end) {
  const Entries<T, I> e = entries_of<T, I>(a);
  const StepSizes<Acc<T>> sizes(*a.adamw);
  const auto row_at = [make = StepMaker<Acc<T>>(*a.adamw, a.add, a.add_map, a.row_scale, a.d, sizes),
                       rowptr = a.rowptr](int64_t r) { return make(r, rowptr[r], rowptr[r + 1]); };
  return rows_in_order<T, I>(a, begin, end, [&](auto how, int64_t from, int64_t to) {
    in_strips<T>(t.d, Rows<kScale, decltype(how)::ahead, T, I, decltype(row_at)>{e, t, from, to, row_at});
  });
}

// Rows of a list, where rows are prefetched whole: their non-zeros are copied into a buffer for as many rows as fit, so
// that prefetching sees past the end of a row.
template <class T, class A, class O, class I>
struct Copied {
  const SpmmArgs& a;
  const Table<T>& t;
  I col[kBlock + kFar];
  Acc<T> w[kBlock];
  RowOut<A, O> row[kRows];
  int64_t rows = 0, n = 0;

  Copied(const SpmmArgs& args, const Table<T>& table) : a(args), t(table) {}

  Entries<T, I> entries() {
    for (int64_t j = n; j < n + kFar; ++j) col[j] = 0;  // is looked at
    return {col, w, nullptr, n + kFar};
  }

  // Copies entries [from, to) behind those that are there, as many as fit; returns the first that did not, or -1 if a
  // column is out of range.
  int64_t copy(int64_t from, int64_t to) {
    const Entries<T, I> e{static_cast<const I*>(a.col), static_cast<const Acc<T>*>(a.value),
                          static_cast<const Acc<T>*>(a.col_scale), 0};
    if (e.value && e.col_scale) return copy_weighted<kBoth>(e, from, to);
    if (e.value) return copy_weighted<kValue>(e, from, to);
    if (e.col_scale) return copy_weighted<kScale>(e, from, to);
    return copy_weighted<kNone>(e, from, to);
  }
  // The same for 16 entries at a time where there are instructions for it, while they fit; j and k move on. False: a
  // column is out of range.
  template <bool kScaled>
  MMKD_INLINE bool copy_vectors(const Entries<T, I>& e, int64_t to, int64_t& j, int64_t& k) {
#if defined(MMKD_ISA_avx512)
    if constexpr (kSame<Acc<T>, float> && kSame<I, int32_t>) {
      const int64_t bound = (a.num_cols <= INT32_MAX ? a.num_cols : int64_t{INT32_MAX} + 1) - a.first_col;
      const __m512i first = _mm512_set1_epi32(static_cast<int>(a.first_col));
      const __m512i end = _mm512_set1_epi32(static_cast<int>(static_cast<uint32_t>(bound)));
      for (; j < to && k + 16 <= kBlock; j += 16) {
        const auto there = static_cast<__mmask16>(to - j < 16 ? (1u << (to - j)) - 1 : 0xffffu);
        const __m512i c = _mm512_maskz_loadu_epi32(there, e.col + j);
        if (_mm512_mask_cmpge_epu32_mask(there, _mm512_sub_epi32(c, first), end)) return false;
        __m512 weight = _mm512_set1_ps(1.0f);
        if constexpr (kScaled) weight = _mm512_mask_i32gather_ps(weight, there, c, e.col_scale, 4);
        _mm512_storeu_si512(col + k, c);
        _mm512_storeu_ps(w + k, weight);
        k += to - j < 16 ? to - j : 16;
      }
      if (j > to) j = to;
    }
#endif
    return true;
  }

  template <Weights kWeights>
  int64_t copy_weighted(const Entries<T, I>& e, int64_t from, int64_t to) {
    int64_t j = from, k = n;
    if constexpr ((kWeights & kValue) == 0) {
      if (!copy_vectors<kWeights == kScale>(e, to, j, k)) return -1;
    }
    for (; j < to && k < kBlock; ++j) {
      const I c = e.col[j];
      const uint64_t behind = static_cast<uint64_t>(static_cast<int64_t>(c)) - static_cast<uint64_t>(a.first_col);
      if (behind >= static_cast<uint64_t>(a.num_cols - a.first_col)) return -1;
      col[k] = c;
      w[k++] = weight_of<kWeights>(e, j);
    }
    n = k;
    return j;
  }

  void flush() {
    const auto row_at = [first = row](int64_t i) { return first[i]; };
    Rows<kValue, kFarRows, T, I, decltype(row_at)>{entries(), t, 0, rows, row_at}.run();
    rows = n = 0;
  }

  // A row whose entries do not fit in the buffer: a strip at a time, one buffer full after the other.
  struct LongRow {
    Copied& buffer;
    const RowOut<A, O>& row;

    // Calls use() for every buffer full of the row's entries.
    template <class F>
    void in_blocks(const F& use) const {
      for (int64_t j = row.from; j < row.to;) {
        buffer.n = 0;
        j = buffer.copy(j, row.to);
        use();
      }
      buffer.n = 0;
    }

    template <int NV>
    void strip(int64_t c0) const {
      typename Vec<T>::V s[NV] = {};
      const T* x = buffer.t.x + c0;
      in_blocks([&] { gather<NV, kValue, kFarRows>(buffer.entries(), 0, buffer.n, x, buffer.t.d, s); });
      finish<NV, T>(row, s, c0, buffer.t);
    }

    void narrow() const {
      Acc<T> s[Vec<T>::size] = {};
      const int64_t d = buffer.t.d;
      in_blocks([&] {
        for (int64_t k = 0; k < buffer.n; ++k) {
          const T* p = buffer.t.x + static_cast<int64_t>(buffer.col[k]) * d;
          for (int64_t c = 0; c < d; ++c) s[c] += buffer.w[k] * Element<T>::load(p + c);
        }
      });
      for (int64_t c = 0; c < d; ++c) finish_narrow(buffer.t, row, c, s[c]);
    }
  };

  bool add_long(const RowOut<A, O>& next) {
    if (!columns_of(a).hold(static_cast<const I*>(a.col) + next.from, next.to - next.from)) return false;
    const LongRow one{*this, next};
    if (t.d < Vec<T>::size) {
      one.narrow();
    } else {
      in_strips<T>(t.d, one);
    }
    return true;
  }

  // False: a column is out of range.
  bool add(RowOut<A, O> next) {
    if (rows == kRows) flush();
    const int64_t before = n;
    int64_t done = copy(next.from, next.to);
    if (done >= 0 && done < next.to && rows > 0) {  // full; the row begins the next buffer
      n = before;
      flush();
      done = copy(next.from, next.to);
    }
    if (done < 0) return false;
    if (done < next.to) return add_long(next);
    next.from = rows > 0 ? row[rows - 1].to : 0;
    next.to = n;
    row[rows++] = next;
    return true;
  }
};

template <class T, class A, class O, class I>
int64_t copied_rows(const SpmmArgs& a, const Table<T>& t, int64_t begin, int64_t end) {
  Copied<T, A, O, I> buffer(a, t);
  const RowMaker<A, O> make(a);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t r = a.rows[i];
    const int64_t lo = a.rowptr[r], hi = a.rowptr[r + 1];
    if (lo < 0 || hi < lo || hi > a.nnz || !buffer.add(make(i, r, lo, hi))) {
      buffer.n = buffer.rows > 0 ? buffer.row[buffer.rows - 1].to : 0;
      buffer.flush();
      return r;
    }
  }
  buffer.flush();
  return -1;
}

// Rows of a list on a processor that looks far enough ahead by itself: entries are read where they lie, after those of
// some rows have been checked, which brings them into the first-level cache.
template <class T, class A, class O, class I>
int64_t listed_rows(const SpmmArgs& a, const Table<T>& t, int64_t begin, int64_t end) {
  const Entries<T, I> e = entries_of<T, I>(a);
  const Columns may = columns_of(a);
  const auto good = [&](int64_t r) {
    const int64_t lo = a.rowptr[r], hi = a.rowptr[r + 1];
    return lo >= 0 && lo <= hi && hi <= a.nnz && may.hold(e.col + lo, hi - lo);
  };
  const auto row_at = [make = RowMaker<A, O>(a), rows = a.rows, rowptr = a.rowptr](int64_t i) {
    return make(i, rows[i], rowptr[rows[i]], rowptr[rows[i] + 1]);
  };
  for (int64_t i = begin, stop; i < end; i = stop) {
    int64_t entries = 0, bad = -1;
    for (stop = i; stop < end && stop < i + kRows && entries <= kBlock && bad < 0; ++stop) {
      const int64_t r = a.rows[stop];
      if (good(r)) {
        entries += a.rowptr[r + 1] - a.rowptr[r];
      } else {
        bad = r;
      }
    }
    if (bad >= 0) return bad;
    rows_weighted<kNothing>(e, t, i, stop, row_at);
  }
  return -1;
}

// All rows, of which only the entries count whose columns have a row of x (`col_map`). Where they lie in x is listed
// for a block of rows at a time, so that prefetching sees past the end of a row; a row that is longer than a block has
// one list after the other.
template <class T, class A, class O, class I>
struct Mapped {
  static constexpr int64_t kLanes = 16;
  static constexpr int64_t kMost = 256;  // rows of a block

  const SpmmArgs& a;
  const Table<T>& t;
  I at[kBlock + kLanes + kFar];
  int64_t start[kMost + 1];  // of a row's in `at`

  Entries<T, I> entries(int64_t n) {
    for (int64_t j = n; j < n + kFar; ++j) at[j] = 0;  // is looked at
    return {at, nullptr, static_cast<const Acc<T>*>(a.col_scale), n + kFar};
  }

  // Lists the entries of rows that end at ends[0], ends[1] ... of `col`, at most kBlock together; returns their number.
  int64_t list(const I* col, const int64_t* ends, int64_t rows, int64_t first) {
    start[0] = 0;
#if defined(MMKD_ISA_avx512)
    if constexpr (kSame<I, int32_t>) return list_vectors(col, ends, rows, first);
#endif
    int64_t k = 0, j = 0;
    for (int64_t i = 0; i < rows; ++i) {
      for (; j < ends[i] - first; ++j) {
        const I place = static_cast<I>(a.col_map[col[j]]);
        at[k] = place;
        k += place >= 0;
      }
      start[i + 1] = k;
    }
    return k;
  }
#if defined(MMKD_ISA_avx512)
  // 16 entries at a time, whichever rows they are of; where a row ends is counted afterwards.
  int64_t list_vectors(const int32_t* col, const int64_t* ends, int64_t rows, int64_t first) {
    const int64_t n = ends[rows - 1] - first;
    uint16_t kept[kBlock / kLanes + 1];
    int32_t before[kBlock / kLanes + 1];
    int64_t k = 0, v = 0;
    for (int64_t j = 0; j < n; j += kLanes, ++v) {
      const auto there = static_cast<__mmask16>(n - j < kLanes ? (1u << (n - j)) - 1 : 0xffffu);
      const __m512i c = _mm512_maskz_loadu_epi32(there, col + j);
      const __m512i place = _mm512_mask_i32gather_epi32(_mm512_set1_epi32(-1), there, c, a.col_map, 4);
      const __mmask16 keep = _mm512_cmpge_epi32_mask(place, _mm512_setzero_si512());
      _mm512_storeu_si512(at + k, _mm512_maskz_compress_epi32(keep, place));
      kept[v] = keep;
      before[v] = static_cast<int32_t>(k);
      k += __builtin_popcount(keep);
    }
    kept[v] = 0;
    before[v] = static_cast<int32_t>(k);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t j = ends[i] - first;
      start[i + 1] = before[j / kLanes] + __builtin_popcount(kept[j / kLanes] & ((1u << j % kLanes) - 1));
    }
    return k;
  }
#endif

  template <Ahead kAhead>
  struct LongRow {
    Mapped& lists;
    const RowOut<A, O>& row;
    const I* col;

    // use(entries, n) for every list of the row's entries.
    template <class F>
    void in_blocks(const F& use) const {
      for (int64_t j = row.from; j < row.to; j += kBlock) {
        const int64_t end = j + kBlock < row.to ? j + kBlock : row.to, n = lists.list(col + j, &end, 1, j);
        use(lists.entries(n), n);
      }
    }
    template <int NV>
    void strip(int64_t c0) const {
      typename Vec<T>::V s[NV] = {};
      const Table<T>& t = lists.t;
      in_blocks([&](const Entries<T, I>& e, int64_t n) { gather<NV, kScale, kAhead>(e, 0, n, t.x + c0, t.d, s); });
      finish<NV, T>(row, s, c0, t);
    }
    void narrow() const {
      Acc<T> s[Vec<T>::size] = {};
      const int64_t d = lists.t.d;
      in_blocks([&](const Entries<T, I>& e, int64_t n) {
        for (int64_t k = 0; k < n; ++k) {
          const T* p = lists.t.x + static_cast<int64_t>(e.col[k]) * d;
          const Acc<T> w = weight_of<kScale>(e, k);
          for (int64_t c = 0; c < d; ++c) s[c] += w * Element<T>::load(p + c);
        }
      });
      for (int64_t c = 0; c < d; ++c) finish_narrow(lists.t, row, c, s[c]);
    }
  };

  // Rows [begin, end), their columns checked, of `col`.
  template <Ahead kAhead>
  void run(const I* col, int64_t begin, int64_t end) {
    const RowMaker<A, O> make(a);
    const int64_t lo = a.rowptr[begin], hi = a.rowptr[end];
    if (hi - lo > kBlock) {
      const RowOut<A, O> row = make(begin, begin, lo, hi);
      const LongRow<kAhead> one{*this, row, col};
      return t.d < Vec<T>::size ? one.narrow() : in_strips<T>(t.d, one);
    }
    const int64_t n = list(col + lo, a.rowptr + begin + 1, end - begin, lo);
    const auto row_at = [make, begin, first = start](int64_t r) {
      return make(r, r, first[r - begin], first[r - begin + 1]);
    };
    Rows<kScale, kAhead, T, I, decltype(row_at)>{entries(n), t, begin, end, row_at}.run();
  }
};

template <class T, class A, class O, class I>
int64_t mapped_rows(const SpmmArgs& a, const Table<T>& t, int64_t begin, int64_t end) {
  Mapped<T, A, O, I> lists{a, t, {}, {}};
  const I* col = static_cast<const I*>(a.col);
  while (begin < end) {
    const int64_t last = begin + lists.kMost < end ? begin + lists.kMost : end;
    const Block block = next_block(a.rowptr, col, begin, last, a.nnz, columns_of(a));
    if (block.bad >= 0) return block.bad;
    a.far ? lists.template run<kFarRows>(col, begin, block.end)
          : lists.template run<kBeginnings>(col, begin, block.end);
    begin = block.end;
  }
  return -1;
}

// Rows of a list, or all of them.
template <class T, class A, class O, class I>
int64_t chosen_rows(const SpmmArgs& a, const Table<T>& t, int64_t begin, int64_t end) {
  if (a.col_map) return mapped_rows<T, A, O, I>(a, t, begin, end);
  if (!a.rows) return all_rows<T, A, O, I>(a, t, begin, end);
  return a.far ? copied_rows<T, A, O, I>(a, t, begin, end) : listed_rows<T, A, O, I>(a, t, begin, end);
}

template <class T, class A, class O, class I>
int64_t rows_typed(const SpmmArgs& a, const Table<T>& t, int64_t begin, int64_t end) {
  const int64_t bad = chosen_rows<T, A, O, I>(a, t, begin, end);
  if (a.stream) finish_streams();
  return bad;
}

template <class T, class I>
int64_t spmm_typed(const SpmmArgs& a, int64_t begin, int64_t end) {
  const Table<T> t{static_cast<const T*>(a.x), a.d, static_cast<Acc<T>>(a.alpha), a.stream};
  if constexpr (!kSame<T, f16_t>) {
    if (a.adamw) return all_steps<T, I>(a, t, begin, end);
  }
  if constexpr (kSame<T, bf16_t>) {
    if (a.add_f32 && a.out_f32) return rows_typed<T, float, float, I>(a, t, begin, end);
    if (a.add_f32) return rows_typed<T, float, T, I>(a, t, begin, end);
  }
  return rows_typed<T, T, T, I>(a, t, begin, end);
}

template <class T>
void adamw_typed(const AdamwArgs& a, const void* grad, const int32_t* add_map, int64_t d, int64_t begin, int64_t end) {
  const StepSizes<T> sizes(a);
  const StepMaker<T> make(a, grad, add_map, nullptr, d, sizes);
  for (int64_t r = begin; r < end; ++r) {
    const RowStep<T> row = make(r, 0, 0);
    const T* g = static_cast<const T*>(grad) + r * d;
    int64_t c = 0;
    for (; c + Vec<T>::size <= d; c += Vec<T>::size) step_at<T>(row, Vec<T>::load(g + c), c);
    for (; c < d; ++c) step_at<T>(row, g[c], c);
  }
}

template <class T, class I>
void sddmm_row(const SddmmArgs& a, int64_t r) {
  const I* col = static_cast<const I*>(a.col);
  const Acc<T>* row_scale = static_cast<const Acc<T>*>(a.row_scale);
  const Acc<T>* col_scale = static_cast<const Acc<T>*>(a.col_scale);
  const T* b = static_cast<const T*>(a.b);
  for (int64_t j = a.rowptr[r]; j < a.rowptr[r + 1]; ++j) {
    if (j + kNear < a.nnz) prefetch_at<256, 3>(b, col[j + kNear], a.d);
    Acc<T> s = dot(static_cast<const T*>(a.a) + r * a.d, b + static_cast<int64_t>(col[j]) * a.d, a.d);
    if (row_scale) s *= row_scale[r];
    if (col_scale) s *= col_scale[col[j]];
    static_cast<Acc<T>*>(a.out)[j] = s;
  }
}

template <class T, class I>
int64_t sddmm_typed(const SddmmArgs& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end;) {
    const Block block = next_block(a.rowptr, static_cast<const I*>(a.col), r, end, a.nnz, Columns{0, a.num_cols});
    if (block.bad >= 0) return block.bad;
    for (; r < block.end; ++r) sddmm_row<T, I>(a, r);
  }
  return -1;
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

void adamw_rows(const AdamwArgs& a, DType dtype, const void* grad, const int32_t* add_map, int64_t d, int64_t begin,
                int64_t end) {
  if (dtype == DType::f64) return adamw_typed<double>(a, grad, add_map, d, begin, end);
  adamw_typed<float>(a, grad, add_map, d, begin, end);
}

void to_bf16(const float* from, void* to, int64_t begin, int64_t end) {
  bf16_t* out = static_cast<bf16_t*>(to);
  int64_t i = begin;
  for (; i + Vec<float>::size <= end; i += Vec<float>::size) Vec<bf16_t>::store(out + i, Vec<float>::load(from + i));
  for (; i < end; ++i) Element<bf16_t>::store(out + i, from[i]);
}

}  // namespace MMKD_ISA
}  // namespace mmkd
