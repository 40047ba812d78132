#include "cpu/project_kernel.h"

#include "cpu/vec.h"

namespace mmkd {
namespace MMKD_ISA {
namespace {

constexpr int kVectors = MMKD_VBYTES == 64 ? 4 : 2;  // across a register tile
constexpr int kTall = 6;                             // rows of one

template <class A>
constexpr int64_t kPanel = 256 / sizeof(A);

MMKD_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// How a tile begins: with what is in `out`, with zeros, or with the same row everywhere.
template <class A>
struct Start {
  bool add;
  const A* row;  // null: zeros
};

// What to ask for meanwhile: a line in each of `count` rows.
struct Ahead {
  const char* at;
  int64_t stride;  // bytes
  int64_t count;
};

// out[r][:] = start + sum_k x[r * along + k * down] * w[k][:], R rows of NV vectors. The sum of a tile is made first,
// so that long rows are summed in pieces.
template <int R, int NV, class A>
MMKD_INLINE void tile(const A* x, int64_t along, int64_t down, const A* w, int64_t ld, int64_t n, A* out,
                      int64_t out_ld, Start<A> start, Ahead ahead) {
  using W = Vec<A>;
  typename W::V s[R][NV];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) s[r][v] = typename W::V{};
  }
  for (int64_t k = 0; k < n; ++k) {
    typename W::V b[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) b[v] = W::load(w + k * ld + v * W::size);
    if (k < ahead.count) __builtin_prefetch(ahead.at + k * ahead.stride, 0, 2);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const A one = x[r * along + k * down];
      const typename W::V all = one - typename W::V{};
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) s[r][v] = multiply_add(all, b[v], s[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      A* to = out + r * out_ld + v * W::size;
      if (start.add) {
        W::store(to, W::load(to) + s[r][v]);
      } else {
        W::store(to, start.row ? W::load(start.row + v * W::size) + s[r][v] : s[r][v]);
      }
    }
  }
}

// The same for up to kTall rows.
template <int NV, class A>
void tile_of(int64_t rows, const A* x, int64_t along, int64_t down, const A* w, int64_t ld, int64_t n, A* out,
             int64_t out_ld, Start<A> start, Ahead ahead) {
  switch (rows) {
    case 6:
      return tile<6, NV>(x, along, down, w, ld, n, out, out_ld, start, ahead);
    case 5:
      return tile<5, NV>(x, along, down, w, ld, n, out, out_ld, start, ahead);
    case 4:
      return tile<4, NV>(x, along, down, w, ld, n, out, out_ld, start, ahead);
    case 3:
      return tile<3, NV>(x, along, down, w, ld, n, out, out_ld, start, ahead);
    case 2:
      return tile<2, NV>(x, along, down, w, ld, n, out, out_ld, start, ahead);
    default:
      return tile<1, NV>(x, along, down, w, ld, n, out, out_ld, start, ahead);
  }
}

// And for `columns` of them, whole lines: what is asked for meanwhile is asked for once.
template <class A>
MMKD_INLINE void tiles(int64_t rows, const A* x, int64_t along, int64_t down, const A* w, int64_t ld, int64_t n,
                       int64_t columns, A* out, int64_t out_ld, Start<A> start, Ahead ahead) {
  constexpr int64_t one = Vec<A>::size, all = kVectors * one;
  int64_t c = 0;
  const auto at = [&](int64_t c) { return Start<A>{start.add, start.row ? start.row + c : nullptr}; };
  for (; c + all <= columns; c += all) {
    tile_of<kVectors>(rows, x, along, down, w + c, ld, n, out + c, out_ld, at(c), ahead);
    ahead.count = 0;
  }
#if MMKD_VBYTES == 64
  switch ((columns - c) / one) {
    case 3:
      return tile_of<3>(rows, x, along, down, w + c, ld, n, out + c, out_ld, at(c), ahead);
    case 2:
      return tile_of<2>(rows, x, along, down, w + c, ld, n, out + c, out_ld, at(c), ahead);
    case 1:
      return tile_of<1>(rows, x, along, down, w + c, ld, n, out + c, out_ld, at(c), ahead);
    default:
      return;
  }
#endif
}

// n numbers of a narrow type.
template <class T>
MMKD_INLINE void widen(const T* from, int64_t n, Acc<T>* to) {
  int64_t c = 0;
  for (; c + Vec<T>::size <= n; c += Vec<T>::size) Vec<Acc<T>>::store(to + c, Vec<T>::load(from + c));
  for (; c < n; ++c) to[c] = Element<T>::load(from + c);
}

template <class T>
constexpr bool kNarrow = sizeof(T) < 4;

// Asks for the beginnings of some rows, for the second-level cache: the first one holds the weights in use.
MMKD_INLINE void ask(const char* at, int64_t stride, int64_t bytes, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(at + r * stride + b, 0, 2);
  }
}

// acc[rows][dp] = shift, or what is there, plus x[rows][inner] times panels of a weight; a piece of the columns after
// the other.
template <class T>
void add_product(const T* x, int64_t inner, const Acc<T>* weight, int64_t dp, int64_t rows, Acc<T>* acc,
                 const Acc<T>* shift, bool add, const ProjectNext& next, Acc<T>* wide) {
  using A = Acc<T>;
  if (inner == 0) {
    for (int64_t r = 0; r < rows && !add; ++r) {
      for (int64_t c = 0; c < dp; ++c) acc[r * dp + c] = shift ? shift[c] : A(0);
    }
    return;
  }
  for (int64_t k = 0; k < inner; k += kProjectInner) {
    const int64_t n = least(kProjectInner, inner - k), bytes = inner * static_cast<int64_t>(sizeof(T));
    const int64_t after = least(kProjectInner, inner - k - n) * static_cast<int64_t>(sizeof(T));
    for (int64_t r = 0; r < rows; r += kTall) {
      const int64_t here = least(kTall, rows - r);
      const T* at = x + r * inner + k;
      if (after) {
        ask(reinterpret_cast<const char*>(at + n), bytes, after, here);
      } else if (r < next.rows) {
        ask(static_cast<const char*>(next.at) + r * next.stride, next.stride, next.bytes, least(kTall, next.rows - r));
      }
      const A* left = reinterpret_cast<const A*>(at);
      int64_t along = inner;
      if constexpr (kNarrow<T>) {
        for (int64_t i = 0; i < here; ++i) widen(at + i * inner, n, wide + i * kProjectInner);
        left = wide;
        along = kProjectInner;
      }
      for (int64_t c = 0; c < dp; c += kPanel<A>) {
        const int64_t columns = least(kPanel<A>, dp - c);
        tiles<A>(here, left, along, 1, weight + c * inner + k * columns, columns, n, columns, acc + r * dp + c, dp,
                 {add || k > 0, shift ? shift + c : nullptr}, {nullptr, 0, 0});
      }
    }
  }
}

template <class T>
void rows_of(const ProjectRows& a, int64_t begin, int64_t end, const ProjectNext& next, Acc<T>* scratch) {
  using A = Acc<T>;
  const auto at = [](const void* p, int64_t i) { return p ? static_cast<const A*>(p) + i : nullptr; };
  A *acc = scratch, *wide = scratch + kProjectRows * a.dp;
  const int64_t rows = end - begin;
  add_product(static_cast<const T*>(a.x) + begin * a.k, a.k, at(a.weight, 0), a.dp, rows, acc, at(a.shift, 0), false,
              next, wide);
  for (int64_t r = 0; a.scale && r < rows; ++r) {
    const A by = *at(a.scale, begin + r);
    for (int64_t c = 0; c < a.dp; ++c) acc[r * a.dp + c] *= by;
  }
  if (a.design)
    add_product(at(a.design, begin * a.e), a.e, at(a.added, 0), a.dp, rows, acc, at(nullptr, 0), true, {}, wide);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t place = (begin + r) * a.width + a.column;
    const A *from = acc + r * a.dp, *mask = at(a.mask, place);
    A* out = static_cast<A*>(a.out) + place;
    for (int64_t c = 0; c < a.d; ++c) out[c] = mask ? from[c] * mask[c] : from[c];
  }
}

// Rows [first, first + rows) of one table.
template <class A>
void masked_block(const ProjectMasked& a, int64_t m, int64_t first, int64_t rows, A* sums, A* by_design, A* g) {
  const int64_t width = a.count * a.d, wide = a.count * a.dp;
  const A *grad = static_cast<const A*>(a.grad) + m * a.d, *mask = static_cast<const A*>(a.mask);
  for (int64_t r = 0; r < rows; ++r) {
    const A* from = grad + (first + r) * width;
    const A* by = mask ? mask + (first + r) * width + m * a.d : nullptr;
    for (int64_t c = 0; c < a.d; ++c) g[r * a.dp + c] = by ? from[c] * by[c] : from[c];
    for (int64_t c = a.d; c < a.dp; ++c) g[r * a.dp + c] = 0;
  }
  for (int64_t c = 0; a.design && c < a.e; c += kTall) {
    const A* left = static_cast<const A*>(a.design) + first * a.e + c;
    tiles<A>(least(kTall, a.e - c), left, 1, a.e, g, a.dp, rows, a.dp, by_design + c * wide + m * a.dp, wide,
             {true, nullptr}, {nullptr, 0, 0});
  }
  A* sum = g + kProjectItems * a.dp;  // of this block
  for (int64_t c = 0; c < a.dp; ++c) sum[c] = 0;
  A* ready = a.ready ? static_cast<A*>(a.ready) + (m * a.rows + first) * a.dp : nullptr;
  for (int64_t r = 0; r < rows; ++r) {
    const A by = a.scale[m] ? static_cast<const A*>(a.scale[m])[first + r] : A(1);
    for (int64_t c = 0; c < a.dp; ++c) {
      const A value = g[r * a.dp + c] * by;
      sum[c] += value;
      if (ready) ready[r * a.dp + c] = value;
    }
  }
  for (int64_t c = 0; c < a.dp; ++c) sums[m * a.dp + c] += sum[c];
}

template <class A>
void masked_of(const ProjectMasked& a, int64_t begin, int64_t end, A* sums, A* by_design, A* scratch) {
  const int64_t wide = a.count * a.dp;
  for (int64_t c = 0; c < wide; ++c) sums[c] = 0;
  for (int64_t c = 0; c < a.e * wide; ++c) by_design[c] = 0;
  for (int64_t first = begin; first < end; first += kProjectItems) {
    for (int64_t m = 0; m < a.count; ++m)
      masked_block(a, m, first, least(kProjectItems, end - first), sums, by_design, scratch);
  }
}

template <class T>
void grad_of(const ProjectGrad& a, int64_t begin, int64_t end, int64_t from, int64_t to, Acc<T>* wide) {
  using A = Acc<T>;
  const T* x = static_cast<const T*>(a.x);
  for (int64_t first = begin; first < end; first += kProjectItems) {
    const int64_t rows = least(kProjectItems, end - first);
    const A* g = static_cast<const A*>(a.g) + first * a.width;
    for (int64_t c0 = from; c0 < to; c0 += kProjectStrip) {
      const int64_t c1 = least(to, c0 + kProjectStrip), width = c1 - c0;
      // the strip that comes next: of the same rows, or of the next ones
      const bool wrap = c1 == to;
      const int64_t ahead_row = wrap ? first + kProjectItems : first,
                    ahead_rows = least(kProjectItems, end - ahead_row);
      const T* ahead = ahead_rows > 0 ? x + ahead_row * a.k + (wrap ? from : c1) : x;
      const int64_t ahead_bytes = least(kProjectStrip, wrap ? to - from : to - c1) * static_cast<int64_t>(sizeof(T));
      const A* left = reinterpret_cast<const A*>(x + first * a.k + c0);
      int64_t down = a.k;
      if constexpr (kNarrow<T>) {
        for (int64_t r = 0; r < rows; ++r) widen(x + (first + r) * a.k + c0, width, wide + r * kProjectStrip);
        left = wide;
        down = kProjectStrip;
      }
      for (int64_t c = 0; c < width; c += kTall) {
        const int64_t line = c / kTall * 64;
        const Ahead asked{reinterpret_cast<const char*>(ahead) + line, a.k * static_cast<int64_t>(sizeof(T)),
                          line < ahead_bytes ? ahead_rows : 0};
        tiles<A>(least(kTall, width - c), left + c, 1, down, g, a.width, rows, a.dp,
                 static_cast<A*>(a.out) + (c0 + c) * a.dp, a.dp, {first > begin, nullptr}, asked);
      }
    }
  }
}

}  // namespace

void project_rows(const ProjectRows& a, int64_t begin, int64_t end, const ProjectNext& next, void* scratch) {
  switch (a.dtype) {
    case DType::f64:
      return rows_of<double>(a, begin, end, next, static_cast<double*>(scratch));
    case DType::bf16:
      return rows_of<bf16_t>(a, begin, end, next, static_cast<float*>(scratch));
    case DType::f16:
      return rows_of<f16_t>(a, begin, end, next, static_cast<float*>(scratch));
    default:
      return rows_of<float>(a, begin, end, next, static_cast<float*>(scratch));
  }
}

void project_masked(const ProjectMasked& a, int64_t begin, int64_t end, void* sums, void* by_design, void* scratch) {
  if (a.f64) {
    masked_of(a, begin, end, static_cast<double*>(sums), static_cast<double*>(by_design),
              static_cast<double*>(scratch));
  } else {
    masked_of(a, begin, end, static_cast<float*>(sums), static_cast<float*>(by_design), static_cast<float*>(scratch));
  }
}

void project_grad(const ProjectGrad& a, int64_t begin, int64_t end, int64_t from, int64_t to, void* scratch) {
  switch (a.dtype) {
    case DType::f64:
      return grad_of<double>(a, begin, end, from, to, static_cast<double*>(scratch));
    case DType::bf16:
      return grad_of<bf16_t>(a, begin, end, from, to, static_cast<float*>(scratch));
    case DType::f16:
      return grad_of<f16_t>(a, begin, end, from, to, static_cast<float*>(scratch));
    default:
      return grad_of<float>(a, begin, end, from, to, static_cast<float*>(scratch));
  }
}

}  // namespace MMKD_ISA
}  // namespace mmkd
