#include "cpu/scatter_kernel.h"

#include "cpu/vec.h"

namespace mmkd {
namespace MMKD_ISA {
namespace {

constexpr int kAhead = 12;  // entries between a prefetch and its use

// out[c0 ...] for NV vectors of columns; the sums stay in registers. base: what they begin as, or null.
template <int NV, class T, class Id>
MMKD_INLINE void columns(const T* source, const Id* id, const Acc<T>* weight, int64_t n, int64_t ahead, int64_t d,
                         const T* base, T* out) {
  using W = Vec<T>;
  typename W::V s[NV] = {};
  if (base) {
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) s[v] = W::load(base + v * W::size);
  }
  for (int64_t j = 0; j < n; ++j) {
    if (j + kAhead < ahead) {
      const char* next = reinterpret_cast<const char*>(source + static_cast<int64_t>(id[j + kAhead]) * d);
#pragma GCC unroll 8
      for (unsigned b = 0; b < NV * W::size * sizeof(T); b += 64) __builtin_prefetch(next + b);
    }
    const T* p = source + static_cast<int64_t>(id[j]) * d;
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) s[v] += weight[j] * W::load(p + v * W::size);
  }
#pragma GCC unroll 16
  for (int v = 0; v < NV; ++v) W::store(out + v * W::size, s[v]);
}

template <class T, class Id>
void narrow(const T* source, const Id* id, const Acc<T>* weight, int64_t n, int64_t d, const T* base, T* out) {
  for (int64_t c = 0; c < d; ++c) {
    Acc<T> s = base ? Element<T>::load(base + c) : Acc<T>(0);
    for (int64_t j = 0; j < n; ++j) s += weight[j] * Element<T>::load(source + static_cast<int64_t>(id[j]) * d + c);
    Element<T>::store(out + c, s);
  }
}

// Any d: wide passes, then narrower ones; a last odd piece is one vector that overlaps what is already written.
template <class T, class Id>
MMKD_INLINE void sum_row(const T* source, const Id* id, const Acc<T>* weight, int64_t n, int64_t ahead, int64_t d,
                         const T* base, T* out) {
  constexpr int64_t w = Vec<T>::size;
  if (d < w) return narrow(source, id, weight, n, d, base, out);
  int64_t c = 0;
  const auto pass = [&]<int NV>(int64_t at) {
    columns<NV>(source + at, id, weight, n, ahead, d, base ? base + at : nullptr, out + at);
  };
  for (; c + 8 * w <= d; c += 8 * w) pass.template operator()<8>(c);
  if (c + 4 * w <= d) pass.template operator()<4>(c), c += 4 * w;
  if (c + 2 * w <= d) pass.template operator()<2>(c), c += 2 * w;
  if (c + w <= d) pass.template operator()<1>(c), c += w;
  if (c < d) pass.template operator()<1>(d - w);
}

// The first of `groups` ascending rows that is not below `row`.
MMKD_INLINE int64_t first_group(const uint32_t* rows, int64_t groups, int64_t row) {
  int64_t lo = 0, hi = groups;
  while (lo < hi) {
    const int64_t mid = lo + (hi - lo) / 2;
    if (rows[mid] < row) {
      lo = mid + 1;
    } else {
      hi = mid;
    }
  }
  return lo;
}

// Lays the sources and weights of positions [begin, end) side by side, in the order they are summed.
template <class A>
MMKD_INLINE void expand(const SumRowsArgs& a, int64_t begin, int64_t end) {
  const A* weight = static_cast<const A*>(a.weight);
  A* entry_weight = static_cast<A*>(a.entry_weight);
  const double over_share =
      1.0 / static_cast<double>(a.share);  // (p + 1/2) / share rounds down to p / share for any p < 2^32
  for (int64_t j = begin; j < end; ++j) {
    const uint32_t p = static_cast<uint32_t>(a.order[j]);
    if (a.fan == 1) {
      a.entry_id[j] = static_cast<uint32_t>(a.source_id[static_cast<int64_t>((p + 0.5) * over_share)]);
      entry_weight[j] = weight[p];
      continue;
    }
    for (int64_t k = 0; k < a.fan; ++k) {
      a.entry_id[j * a.fan + k] = static_cast<uint32_t>(a.source_id[p * a.fan + k]);
      entry_weight[j * a.fan + k] = weight[p * a.fan + k];
    }
  }
}

// What group g begins as: the row of source it names, to which the others it names were added.
template <class T>
MMKD_INLINE const T* base_row(const BaseRows& base, int64_t g, int64_t d) {
  T* source = static_cast<T*>(base.source);
  T* sum = source + static_cast<int64_t>(static_cast<uint32_t>(base.order[base.starts[g]])) * d;
  for (int64_t p = base.starts[g] + 1; p < base.starts[g + 1]; ++p) {
    const T* more = source + static_cast<int64_t>(static_cast<uint32_t>(base.order[p])) * d;
    for (int64_t c = 0; c < d; ++c) {
      Element<T>::store(sum + c, Element<T>::load(sum + c) + Element<T>::load(more + c));
    }
  }
  return sum;
}

template <class T>
void sum_rows_typed(const SumRowsArgs& a, int64_t begin, int64_t end) {
  const T* source = static_cast<const T*>(a.source);
  const Acc<T>* weight = static_cast<const Acc<T>*>(a.entry_weight);
  T* out = static_cast<T*>(a.out);
  const int64_t first = first_group(a.rows, a.groups, begin), last = first_group(a.rows, a.groups, end);
  const int64_t stop = a.starts[last] * a.fan;
  expand<Acc<T>>(a, a.starts[first], a.starts[last]);
  const auto zeros = [&](int64_t from, int64_t to) {
    const int64_t bytes = (to - from) * a.d * static_cast<int64_t>(sizeof(T));
    a.stream ? zero_past_caches(out + from * a.d, bytes) : static_cast<void>(memset(out + from * a.d, 0, bytes));
  };
  const BaseRows& base = a.base;
  const int64_t last_base = first_group(base.rows, base.groups, end + base.shift);
  int64_t next = begin;  // the first row not yet written
  for (int64_t g = first, h = first_group(base.rows, base.groups, begin + base.shift); g < last || h < last_base;) {
    const int64_t named = g < last ? a.rows[g] : end, based = h < last_base ? base.rows[h] - base.shift : end;
    const int64_t row = named < based ? named : based, lo = g < last ? a.starts[g] * a.fan : stop;
    const int64_t hi = named == row ? a.starts[++g] * a.fan : lo;
    const T* from = based == row ? base_row<T>(base, h++, a.d) : nullptr;
    zeros(next, row);
    sum_row(source, a.entry_id + lo, weight + lo, hi - lo, stop - lo, a.d, from, out + row * a.d);
    next = row + 1;
  }
  zeros(next, end);
  if (a.stream) finish_streams();
}

template <class T>
void weighted_rows_typed(const WeightedRowsArgs& a, int64_t begin, int64_t end) {
  const T* source = static_cast<const T*>(a.source);
  const Acc<T>* weight = static_cast<const Acc<T>*>(a.weight);
  for (int64_t b = begin, stop = end * a.fan; b < end; ++b) {
    const int64_t at = b * a.fan;
    sum_row<T>(source, a.id + at, weight + at, a.fan, stop - at, a.d, nullptr, static_cast<T*>(a.out) + b * a.d);
  }
}

}  // namespace

void weighted_rows(const WeightedRowsArgs& a, int64_t begin, int64_t end) {
  a.f64 ? weighted_rows_typed<double>(a, begin, end) : weighted_rows_typed<float>(a, begin, end);
}

void sum_rows(const SumRowsArgs& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::f32:
      return sum_rows_typed<float>(a, begin, end);
    case DType::f64:
      return sum_rows_typed<double>(a, begin, end);
    case DType::bf16:
      return sum_rows_typed<bf16_t>(a, begin, end);
    default:
      return sum_rows_typed<f16_t>(a, begin, end);
  }
}

}  // namespace MMKD_ISA
}  // namespace mmkd
