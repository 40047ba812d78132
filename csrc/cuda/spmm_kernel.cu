#include "cuda/device.cuh"
#include "cuda/spmm_kernel.h"

namespace mmkd::cuda {
namespace {

constexpr int kBlock = 128;

__device__ __forceinline__ int64_t column(const Csr& m, int64_t entry) {
  const int64_t c = m.col64 ? static_cast<const int64_t*>(m.col)[entry]
                            : static_cast<int64_t>(static_cast<const int32_t*>(m.col)[entry]);
  return checked(c, m.num_cols);
}
__device__ __forceinline__ int64_t row_of(const Csr& m, int64_t position) {
  return m.rows ? checked(m.rows[position], m.num_rows) : position;
}
// First of [0, n) for which path(i) > at, where path rises; n if none.
template <class Path>
__device__ __forceinline__ int64_t upper_bound(int64_t n, int64_t at, Path path) {
  int64_t lo = 0, hi = n;
  while (lo < hi) {
    const int64_t mid = lo + (hi - lo) / 2;
    if (path(mid) > at) {
      hi = mid;
    } else {
      lo = mid + 1;
    }
  }
  return lo;
}
// Work (an entry or a position counts one) of a segment.
__device__ __forceinline__ int64_t segment_size(const Csr& m, int64_t segments) {
  return (m.offsets[m.n] + m.n + segments - 1) / segments;
}

__global__ void plan_kernel(Csr m, int64_t segments, int64_t* cut) {
  const int64_t s = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (s > segments) return;
  const int64_t size = segment_size(m, segments), total = m.offsets[m.n] + m.n;
  const int64_t at = s * size < total ? s * size : total;
  // Position i begins at offsets[i] + i on the path.
  const int64_t i = upper_bound(m.n + 1, at, [&](int64_t p) { return m.offsets[p] + p; }) - 1;
  int64_t entry = m.offsets[i];
  if (i < m.n && m.offsets[i + 1] - entry > size) entry += at - (m.offsets[i] + i);
  cut[2 * s] = i;
  cut[2 * s + 1] = entry;
}

// alpha * (add + row_scale * sum), for one element.
template <class A>
__device__ __forceinline__ A scale_row(const SpmmArgs& a, int64_t row, A sum) {
  return a.row_scale ? static_cast<const A*>(a.row_scale)[row] * sum : sum;
}
__device__ __forceinline__ bool adds(const SpmmArgs& a, int64_t row) {
  return a.add && (!a.add_mask || a.add_mask[row]);
}

// A warp per segment. Its groups of `lanes` lanes take one entry each at a time, and columns are read a lane each.
// Flat: the entries of a segment's rows follow one another in `col`, so kSteps rows of x are on their way to each group
// whatever the rows of the matrix are. Else some rows are left out or in another order, and each is taken by itself.
template <class T, int V, bool Flat>
__global__ void __launch_bounds__(kBlock, 5) spmm_kernel(SpmmArgs a, int lanes) {
  using A = Acc<T>;
  constexpr int kSteps = V == 8 ? 2 : 4;  // as many bytes on their way for any type
  const int64_t s = (static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x) / kWarp;
  if (s >= a.segments) return;
  const Group g(lanes);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t c = (static_cast<int64_t>(blockIdx.y) * lanes + g.lane) * V;
  const bool writes = c < a.d && g.index == 0;
  const T* x = static_cast<const T*>(a.x) + (c < a.d ? c : 0);
  const unsigned pitch = static_cast<unsigned>(a.d);
  // Positions and entries are counted from where the segment begins.
  const int64_t first_i = a.cut[2 * s], first_j = a.cut[2 * s + 1];
  const int end_i = static_cast<int>(a.cut[2 * s + 2] - first_i);
  const int end_j = static_cast<int>(checked(a.cut[2 * s + 3] - first_j, INT32_MAX));
  if (Flat) {  // before an entry is read: the ends of rows are checked 32 at a time
    checked(first_j, a.m.nnz + 1);
    checked(first_j + end_j, a.m.nnz + 1);
  }
  bool begun = first_j > a.m.offsets[first_i];  // by an earlier segment
  if (end_i == 0 && end_j == 0 && !begun) return;

  // Of 32 positions from `window` on, a lane each: where they end, their rows, their scales.
  int window = 0, ends = 0;
  int64_t window_row = 0, window_base = 0;
  A window_scale = 1;
  const auto look_ahead = [&](int i) {
    window = i;
    const int64_t p = first_i + i + lane;
    if (p >= a.m.n || i + lane > end_i) return;
    const int64_t stop_at = a.m.offsets[p + 1];
    ends = static_cast<int>(stop_at - first_j);
    window_row = row_of(a.m, p);
    if (!Flat && a.m.rows) window_base = a.m.rowptr[window_row] - a.m.offsets[p];
    checked(stop_at + window_base, a.m.nnz + 1);
    if (a.row_scale) window_scale = static_cast<const A*>(a.row_scale)[window_row];
  };
  int i = 0, start = 0, stop = 0;
  int64_t row = 0, base = first_j;  // base: from numbers of entries to places in `col`
  A scale = 1, sum[V] = {};
  bool needed = true;
  Pack<T, V> add;
  const auto begin_row = [&] {
    const int at = i - window;
    stop = i < end_i ? __shfl_sync(kFull, ends, at) : end_j;
    row = Flat ? first_i + i : __shfl_sync(kFull, window_row, at);
    scale = __shfl_sync(kFull, window_scale, at);
    if (!Flat) {
      base = first_j + __shfl_sync(kFull, window_base, at);
      needed = !a.needed || first_i + i >= a.m.n || a.needed[row];
    }
    add = zeros<V, T>();
    if (writes && i < end_i && !begun && needed && adds(a, row))
      add = load<V>(static_cast<const T*>(a.add) + row * a.d + c);
  };
  const auto end_row = [&] {
    for (int step = lanes; step < kWarp; step *= 2) {
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += __shfl_xor_sync(kFull, sum[v], step);
    }
    if (writes && (begun || i == end_i)) {
      Pack<A, V> part;
#pragma unroll
      for (int v = 0; v < V; ++v) part.at[v] = sum[v];
      *reinterpret_cast<Pack<A, V>*>(static_cast<A*>(a.partial) + (2 * s + (begun ? 0 : 1)) * a.d + c) = part;
    } else if (writes) {
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] = static_cast<A>(a.alpha) * (widen(add.at[v]) + scale * sum[v]);
      store(static_cast<T*>(a.out) + (!Flat && a.compact ? first_i + i : row) * a.d + c, sum);
    }
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] = 0;
  };
  const auto next_row = [&] {
    begun = false;
    start = stop;
    if (++i - window == kWarp) look_ahead(i);
    begin_row();
  };

  look_ahead(0);
  begin_row();
  int j = 0;
  while (true) {
    const int run = Flat ? end_j : stop;         // entries [j, run) follow one another
    const auto column_at = [&](int at) -> int {  // x's row for the entry of my lane; -1: none
      if (at + lane >= run) return -1;
      const int from = static_cast<int>(column(a.m, base + at + lane));
      return !a.active || a.active[from] ? from : -1;
    };
    int ahead = needed ? column_at(j) : -1;
    for (; needed && j < run; j += kWarp) {
      const int from = ahead;
      A weight = from >= 0 ? A(1) : A(0);
      if (from >= 0 && a.col_scale) weight = static_cast<const A*>(a.col_scale)[from];
      if (from >= 0 && a.value) weight *= static_cast<const A*>(a.value)[base + j + lane];
      ahead = column_at(j + kWarp);
      const int count = run - j < kWarp ? run - j : kWarp;
      const unsigned there = __ballot_sync(kFull, from >= 0);
#pragma unroll 1
      for (int k = 0; k < count; k += kSteps * g.count) {
        // Loads without a condition, else each waits for the one before: what is not there reads row 0, and is not
        // added.
        Pack<T, V> rows[kSteps];
        if (kSteps * g.count >= kWarp || there >> k & ((1u << kSteps * g.count) - 1)) {
#pragma unroll
          for (int u = 0; u < kSteps; ++u) {
            const int r = __shfl_sync(kFull, from, (k + u * g.count + g.index) & (kWarp - 1));
            rows[u] = load<V>(x + static_cast<uint64_t>(static_cast<unsigned>(r < 0 ? 0 : r)) * pitch);
          }
        }
#pragma unroll
        for (int u = 0; u < kSteps; ++u) {
          const int e = k + u * g.count + g.index;
          const A w = __shfl_sync(kFull, weight, e & (kWarp - 1));
          const bool mine = e < count && there >> (e & (kWarp - 1)) & 1;
          int taken = 0;
          if (Flat) {  // rows that end within these entries
            const int past = k + (u + 1) * g.count < count ? k + (u + 1) * g.count : count;
            while (i < end_i && stop < j + past) {
              if (mine && e >= taken && j + e < stop) axpy(sum, w, rows[u]);
              taken = stop - j;
              end_row();
              next_row();
            }
          }
          if (mine && e >= taken) axpy(sum, w, rows[u]);
        }
      }
    }
    if (Flat) break;
    if (needed && i < end_i) end_row();
    if (i == end_i) break;
    j = stop;
    next_row();
  }
  while (Flat && i < end_i) {
    end_row();
    next_row();
  }
  // The last row goes on in the next segment, if it has begun at all.
  if (needed && (begun || end_j > start)) end_row();
}

// Where a row that the plan cut begins in a segment, adds the row's pieces: always in the same order. A warp per
// segment, but all warps of the block for a row of many pieces: one warp would be the last to finish.
constexpr int kCombineBlock = 256, kCombineWarps = kCombineBlock / kWarp, kAlone = 16;

// partial[2 * (s + 1 + t)] for t = first, first + step, ... below n, for column c.
template <class A>
__device__ __forceinline__ A sum_pieces(const A* partial, int64_t d, int64_t s, int64_t c, int64_t n, int first,
                                        int step) {
  A sum[4] = {};
  for (int64_t t = first; t < n; t += 4 * step) {
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      if (t + u * step < n) sum[u] += partial[2 * (s + 1 + t + u * step) * d + c];
    }
  }
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

template <class T>
__global__ void __launch_bounds__(kCombineBlock, 3) combine_kernel(SpmmArgs a) {
  using A = Acc<T>;
  MMKD_SHARED(int64_t, pieces, kCombineWarps);
  MMKD_SHARED(A, sums, kCombineWarps * kWarp);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kCombineWarps;
  const A* partial = static_cast<const A*>(a.partial);
  const auto write = [&](int64_t s, int64_t c, A all) {
    const int64_t i = a.cut[2 * s + 2], row = row_of(a.m, i);
    const A add = adds(a, row) ? widen(static_cast<const T*>(a.add)[row * a.d + c]) : A(0);
    all = static_cast<A>(a.alpha) * (add + scale_row(a, row, partial[(2 * s + 1) * a.d + c] + all));
    static_cast<T*>(a.out)[(a.compact ? i : row) * a.d + c] = narrow<T>(all);
  };
  // Further pieces of the row that is cut and begins in segment s; 0: there is none.
  const auto further = [&](int64_t s) -> int64_t {
    if (s >= a.segments) return 0;
    const int64_t i = a.cut[2 * s + 2];
    if (i >= a.m.n) return 0;
    const int64_t start = a.m.offsets[i];
    const bool begins_here = a.cut[2 * s] < i || a.cut[2 * s + 1] == start;
    if (a.cut[2 * s + 3] <= start || !begins_here || (a.needed && !a.needed[row_of(a.m, i)])) return 0;
    const int64_t last = (a.m.offsets[i + 1] + i) / segment_size(a.m, a.segments);  // that begins inside the row
    return last - s;
  };
  const int64_t s = first + warp, n = further(s);
  if (lane == 0) pieces[warp] = n > kAlone ? n : 0;
  if (n > 0 && n <= kAlone) {
    for (int64_t c = lane; c < a.d; c += kWarp) write(s, c, sum_pieces(partial, a.d, s, c, n, 0, 1));
  }
  __syncthreads();
  for (int w = 0; w < kCombineWarps; ++w) {
    if (pieces[w] == 0) continue;
    for (int64_t c0 = 0; c0 < a.d; c0 += kWarp) {
      const int64_t c = c0 + lane;
      sums[warp * kWarp + lane] = c < a.d ? sum_pieces(partial, a.d, first + w, c, pieces[w], warp, kCombineWarps) : 0;
      __syncthreads();
      if (warp == 0 && c < a.d) {
        A all = 0;
        for (int v = 0; v < kCombineWarps; ++v) all += sums[v * kWarp + lane];
        write(first + w, c, all);
      }
      __syncthreads();
    }
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kBlock) sddmm_kernel(SddmmArgs a, int lanes) {
  using A = Acc<T>;
  const Group g(lanes);
  const int64_t s = (static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x) / lanes;
  if (s >= a.segments) return;
  const A* row_scale = static_cast<const A*>(a.row_scale);
  const A* col_scale = static_cast<const A*>(a.col_scale);
  int64_t i = a.cut[2 * s], j = a.cut[2 * s + 1];
  const int64_t end_i = a.cut[2 * s + 2], end_j = a.cut[2 * s + 3];
  for (; i <= end_i; ++i) {
    if (i == end_i && end_j == a.m.offsets[i]) break;
    const int64_t stop = checked(i < end_i ? a.m.offsets[i + 1] : end_j, a.m.nnz + 1);
    const T* left = static_cast<const T*>(a.a) + i * a.d;
    const A row = row_scale ? row_scale[i] : A(1);
    for (; j < stop; ++j) {
      const int64_t to = column(a.m, j);
      const T* right = static_cast<const T*>(a.b) + to * a.d;
      A sum = 0;
      for (int64_t c = g.lane * V; c < a.d; c += g.size * V) sum += dot(load<V>(left + c), load<V>(right + c));
      sum = group_sum(sum, g, g.mask);
      if (g.lane == 0) static_cast<A*>(a.out)[j] = row * (col_scale ? col_scale[to] : A(1)) * sum;
    }
  }
}

__global__ void lengths_kernel(const int64_t* rowptr, const int64_t* rows, int64_t n, int64_t num_rows,
                               int64_t* degrees) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i > n) return;
  const int64_t r = i ? checked(rows[i - 1], num_rows) : 0;
  degrees[i] = i ? rowptr[r + 1] - rowptr[r] : 0;
}

// All writers of a flag write the same, so their order does not matter.
__global__ void mark_rows_kernel(const int64_t* rows, int64_t n, int64_t num_rows, uint8_t* flags) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) flags[checked(rows[i], num_rows)] = 1;
}

// A warp per segment of the rows' plan: a row of thousands of entries would keep one warp for longer than a product
// takes.
__global__ void mark_neighbours_kernel(Csr m, const int64_t* cut, int64_t segments, uint8_t* flags) {
  const int64_t s = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
  if (s >= segments) return;
  const int64_t end_i = cut[2 * s + 2], end_j = cut[2 * s + 3];
  int64_t j = cut[2 * s + 1];
  for (int64_t i = cut[2 * s]; i <= end_i && i < m.n; ++i) {
    const int64_t stop = i < end_i ? m.offsets[i + 1] : end_j, base = m.rowptr[row_of(m, i)] - m.offsets[i];
    checked(stop + base, m.nnz + 1);
    for (int64_t e = j + threadIdx.x % kWarp; e < stop; e += kWarp) flags[column(m, base + e)] = 1;
    j = stop;
  }
}

template <class I>
__global__ void transpose_kernel(Csr m, const I* sorted, const int64_t* perm, int64_t* t_rowptr, I* t_col) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (k <= m.num_cols) {  // how many entries lie in the columns before k
    t_rowptr[k] = upper_bound(m.nnz, k - 1, [&](int64_t j) { return static_cast<int64_t>(sorted[j]); });
  }
  if (k < m.nnz) {
    checked(sorted[k], m.num_cols);
    t_col[k] = static_cast<I>(upper_bound(m.num_rows + 1, perm[k], [&](int64_t r) { return m.rowptr[r]; }) - 1);
  }
}

template <class T>
__global__ void gather_kernel(const T* x, const int64_t* rows, int64_t n, int64_t num_rows, int64_t d, T* out) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
  if (i >= n) return;
  const T* from = x + checked(rows[i], num_rows) * d;
  for (int64_t c = threadIdx.x % kWarp; c < d; c += kWarp) out[i * d + c] = from[c];
}

}  // namespace

void make_plan(const Csr& m, int64_t segments, int64_t* cut, void* stream) {
  launch("plan", plan_kernel, Grid{ceil_div(segments + 1, kBlock), kBlock, stream}, m, segments, cut);
}

void spmm(const SpmmArgs& a, void* stream) {
  if (a.m.n == 0 || a.d == 0) return;
  dispatch(a.dtype, a.wide, [&](auto tag) {
    using T = typename decltype(tag)::T;
    constexpr int V = decltype(tag)::V;
    const int lanes = lanes_for(a.dtype, a.wide, a.d);
    const Grid grid{ceil_div(a.segments * kWarp, kBlock), kBlock, stream, 0, ceil_div(a.d, int64_t{lanes} * V)};
    if (!a.m.rows && !a.needed) {
      launch("spmm", spmm_kernel<T, V, true>, grid, a, lanes);
    } else {
      launch("spmm", spmm_kernel<T, V, false>, grid, a, lanes);
    }
  });
  dispatch_type(a.dtype, [&](auto tag) {
    launch("spmm combine", combine_kernel<typename decltype(tag)::T>,
           Grid{ceil_div(a.segments, kCombineWarps), kCombineBlock, stream}, a);
  });
}

void sddmm(const SddmmArgs& a, void* stream) {
  if (a.m.nnz == 0) return;
  dispatch(a.dtype, a.wide, [&](auto tag) {
    using T = typename decltype(tag)::T;
    constexpr int V = decltype(tag)::V;
    const int lanes = lanes_for(a.dtype, a.wide, a.d);
    launch("sddmm", sddmm_kernel<T, V>, Grid{ceil_div(a.segments * lanes, kBlock), kBlock, stream}, a, lanes);
  });
}

void row_lengths(const int64_t* rowptr, const int64_t* rows, int64_t n, int64_t num_rows, int64_t* degrees,
                 void* stream) {
  launch("row lengths", lengths_kernel, Grid{ceil_div(n + 1, kBlock), kBlock, stream}, rowptr, rows, n, num_rows,
         degrees);
}

void mark_rows(const int64_t* rows, int64_t n, int64_t num_rows, uint8_t* flags, void* stream) {
  launch("mark rows", mark_rows_kernel, Grid{ceil_div(n, kBlock), kBlock, stream}, rows, n, num_rows, flags);
}

void mark_neighbours(const Csr& m, const int64_t* cut, int64_t segments, uint8_t* flags, void* stream) {
  if (m.n == 0) return;  // then there is no plan either
  launch("mark neighbours", mark_neighbours_kernel, Grid{ceil_div(segments * kWarp, kBlock), kBlock, stream}, m, cut,
         segments, flags);
}

void transpose(const Csr& m, const void* sorted, const int64_t* perm, int64_t* t_rowptr, void* t_col, void* stream) {
  const int64_t work = m.nnz > m.num_cols + 1 ? m.nnz : m.num_cols + 1;
  const Grid grid{ceil_div(work, kBlock), kBlock, stream};
  if (m.col64) {
    launch("transpose", transpose_kernel<int64_t>, grid, m, static_cast<const int64_t*>(sorted), perm, t_rowptr,
           static_cast<int64_t*>(t_col));
  } else {
    launch("transpose", transpose_kernel<int32_t>, grid, m, static_cast<const int32_t*>(sorted), perm, t_rowptr,
           static_cast<int32_t*>(t_col));
  }
}

void gather_rows(DType dtype, const void* x, const int64_t* rows, int64_t n, int64_t num_rows, int64_t d, void* out,
                 void* stream) {
  dispatch_type(dtype, [&](auto tag) {
    using T = typename decltype(tag)::T;
    launch("gather rows", gather_kernel<T>, Grid{ceil_div(n * kWarp, kBlock), kBlock, stream}, static_cast<const T*>(x),
           rows, n, num_rows, d, static_cast<T*>(out));
  });
}

}  // namespace mmkd::cuda
