#include "cuda/device.cuh"
#include "cuda/frozen_teacher_kernel.h"

namespace mmkd::cuda {
namespace {

using namespace maths;

constexpr int kMostWarps = 8;
constexpr int64_t kMostShared = 96 * 1024;  // of the 99 KB a block of sm_86 may have
constexpr int kRows = 3;                    // nodes a warp takes: user, observed item and negative; or further ones
constexpr double kNormEps = 1e-12;          // as torch.nn.functional.normalize

__host__ __device__ __forceinline__ int64_t fours(int64_t n) { return (n + 3) / 4 * 4; }

// Shared memory of a block, in elements: Z of one modality, its rows an odd stride apart; then for each warp rows of K,
// rows of F (forward; of gradients backward), rows of E^T, and F_u Z^T or its gradient.
struct Room {
  int64_t ep, dp, stride, state, warp;

  __host__ __device__ __forceinline__ Room(int64_t d, int64_t e)
      : ep(fours(e)), dp(fours(d)), stride(d | 1), state(fours(e * stride)), warp((kRows + 1) * ep + 2 * kRows * dp) {}
};

template <class A>
struct Shared {
  A *state, *design, *rows, *joint, *through;

  __device__ __forceinline__ Shared(A* base, const Room& r, int warp) : state(base) {
    design = base + r.state + warp * r.warp;
    through = design + kRows * r.ep;
    rows = through + r.ep;
    joint = rows + kRows * r.dp;
  }
};

// Z of modality m into shared memory, by the block.
template <class A>
__device__ __forceinline__ void load_state(const FrozenArgs& a, const Room& r, int64_t m, A* to) {
  const A* from = static_cast<const A*>(a.state) + m * a.e * a.d;
  __syncthreads();  // readers of the last modality are done
  for (int64_t k = threadIdx.x / kWarp; k < a.e; k += blockDim.x / kWarp) {
    for (int64_t c = threadIdx.x % kWarp; c < a.d; c += kWarp) to[k * r.stride + c] = from[k * a.d + c];
  }
  __syncthreads();
}

// A warp's nodes: sample `unit` below `batch`, else three further ones; -1: there is none.
__device__ __forceinline__ void nodes_of(const FrozenArgs& a, int64_t unit, int64_t (&node)[kRows],
                                         int64_t (&place)[kRows]) {
  const int64_t count = 3 * a.batch + a.num_targets;
#pragma unroll
  for (int j = 0; j < kRows; ++j) {
    place[j] = unit < a.batch ? j * a.batch + unit : 3 * a.batch + (unit - a.batch) * kRows + j;
    node[j] = place[j] < count ? checked(a.nodes[place[j]], a.num_nodes) : -1;
  }
}

// F of the warp's nodes, from their rows of K and Z in shared memory.
template <class A>
__device__ __forceinline__ void rows_of(const FrozenArgs& a, const Room& r, int64_t m, const int64_t (&node)[kRows],
                                        const Shared<A>& at, int lane) {
  constexpr int kWide = Element<A>::kWide;
  const A* content = static_cast<const A*>(a.content) + m * a.num_nodes * a.d;
  for (int64_t c = lane; c < a.d; c += kWarp) {
    A sum[kRows];
#pragma unroll
    for (int j = 0; j < kRows; ++j) sum[j] = node[j] < 0 ? A(0) : content[node[j] * a.d + c];
    int64_t k = 0;
    for (; k + kWide <= a.e; k += kWide) {
      Pack<A, kWide> design[kRows];
#pragma unroll
      for (int j = 0; j < kRows; ++j) design[j] = load<kWide>(at.design + j * r.ep + k);
#pragma unroll
      for (int u = 0; u < kWide; ++u) {
        const A z = at.state[(k + u) * r.stride + c];
#pragma unroll
        for (int j = 0; j < kRows; ++j) sum[j] += design[j].at[u] * z;
      }
    }
    for (; k < a.e; ++k) {
      const A z = at.state[k * r.stride + c];
#pragma unroll
      for (int j = 0; j < kRows; ++j) sum[j] += at.design[j * r.ep + k] * z;
    }
#pragma unroll
    for (int j = 0; j < kRows; ++j) at.rows[j * r.dp + c] = sum[j];
  }
}

// omega / max(|F|, eps), and 1 / |F|^2 where the norm is what divides, else 0.
template <class A>
struct Norm {
  A scale, inverse_square;

  __device__ __forceinline__ Norm(const A* row, int64_t d, A omega, int lane) {
    A square = 0;
    for (int64_t c = lane; c < d; c += kWarp) square += row[c] * row[c];
    square = warp_sum(square);
    const A norm = Num<A>::sqrt(square), least = static_cast<A>(kNormEps);
    scale = omega / (norm > least ? norm : least);
    inverse_square = norm > least ? 1 / square : A(0);
  }
};

// F_u . F_i of a sample's candidates, four rows of C and K in flight.
template <class A>
__device__ __forceinline__ void logits_of(const FrozenArgs& a, int64_t m, int64_t b, const Shared<A>& at, int lane,
                                          A* out) {
  constexpr int kUnroll = 4;
  const A* content = static_cast<const A*>(a.content) + m * a.num_nodes * a.d;
  const A* design = static_cast<const A*>(a.design);
  for (int64_t k0 = 0; k0 < a.list; k0 += kUnroll) {
    int64_t item[kUnroll];
    A sum[kUnroll] = {};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t k = k0 + u < a.list ? k0 + u : k0;
      item[u] = a.first_item + checked(a.candidates[b * a.list + k], a.num_nodes - a.first_item);
    }
    for (int64_t c = lane; c < a.d; c += kWarp) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) sum[u] += at.rows[c] * content[item[u] * a.d + c];
    }
    for (int64_t k = lane; k < a.e; k += kWarp) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) sum[u] += at.through[k] * design[item[u] * a.e + k];
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      sum[u] = warp_sum(sum[u]);
      if (lane == 0 && k0 + u < a.list) out[k0 + u] = sum[u];
    }
  }
}

// A warp per sample, then a warp per three further nodes.
template <class A>
__global__ void __launch_bounds__(kMostWarps* kWarp) frozen_forward_kernel(FrozenArgs a, FrozenOutputs o) {
  MMKD_DYNAMIC_SHARED(A, base);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const Room r(a.d, a.e);
  const Shared<A> at(base, r, warp);
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + warp;
  int64_t node[kRows], place[kRows];
  nodes_of(a, unit, node, place);
  const bool sample = unit < a.batch;
#pragma unroll
  for (int j = 0; j < kRows; ++j) {
    for (int64_t k = lane; k < a.e; k += kWarp) {
      at.design[j * r.ep + k] = node[j] < 0 ? A(0) : static_cast<const A*>(a.design)[node[j] * a.e + k];
    }
    for (int64_t c = lane; sample && c < a.d; c += kWarp) {
      at.joint[j * r.dp + c] = static_cast<const A*>(a.ids)[node[j] * a.d + c];
    }
  }
  for (int64_t m = 0; m < a.modalities; ++m) {
    load_state(a, r, m, at.state);
    rows_of(a, r, m, node, at, lane);
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      if (node[j] < 0) continue;
      A* to = sample ? static_cast<A*>(o.heads) + (m * 3 * a.batch + place[j]) * a.d
                     : static_cast<A*>(o.targets) + (m * a.num_targets + place[j] - 3 * a.batch) * a.d;
      for (int64_t c = lane; c < a.d; c += kWarp) to[c] = at.rows[j * r.dp + c];
    }
    if (!sample) continue;
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const Norm<A> norm(at.rows + j * r.dp, a.d, static_cast<const A*>(a.omega)[m], lane);
      for (int64_t c = lane; c < a.d; c += kWarp) at.joint[j * r.dp + c] += norm.scale * at.rows[j * r.dp + c];
    }
    for (int64_t k = lane; k < a.e; k += kWarp) {
      A sum = 0;
      for (int64_t c = 0; c < a.d; ++c) sum += at.rows[c] * at.state[k * r.stride + c];
      at.through[k] = sum;
    }
    __syncwarp();
    logits_of(a, m, unit, at, lane, static_cast<A*>(o.logits) + (m * a.batch + unit) * a.list);
    __syncwarp();  // before rows and through are written again
  }
  if (!sample) return;
  A margin = 0;
  for (int64_t c = lane; c < a.d; c += kWarp) {
    margin += at.joint[c] * (at.joint[r.dp + c] - at.joint[2 * r.dp + c]);
  }
  margin = warp_sum(margin);
  if (lane == 0) static_cast<A*>(o.margin)[unit] = margin;
}

// Column c of the sum over a sample's candidates, which were checked, of their logits' gradients times their rows of
// `table`.
template <class A>
__device__ __forceinline__ A weighted(const FrozenArgs& a, int64_t b, const A* grad, const A* table, int64_t width,
                                      int64_t c) {
  A sum = 0;
#pragma unroll 4
  for (int64_t k = 0; k < a.list; ++k) {
    sum += grad[k] * table[(a.first_item + a.candidates[b * a.list + k]) * width + c];
  }
  return sum;
}

// Gradients of the heads of a sample, by a warp, and of F_u Z^T. at.rows: those that come through the margin, of E^T.
template <class A>
__global__ void __launch_bounds__(kMostWarps* kWarp) frozen_rows_kernel(FrozenArgs a, FrozenGradients g) {
  MMKD_DYNAMIC_SHARED(A, base);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const Room r(a.d, a.e);
  const Shared<A> at(base, r, warp);
  const int64_t b = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + warp;
  const bool live = b < a.batch;
  const A* heads = static_cast<const A*>(g.heads);
  const A* omega = static_cast<const A*>(a.omega);
  for (int64_t k = lane; live && g.logits && k < a.list; k += kWarp) {
    checked(a.candidates[b * a.list + k], a.num_nodes - a.first_item);
  }
  if (live && g.margin) {
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const int64_t node = checked(a.nodes[j * a.batch + b], a.num_nodes);
      for (int64_t c = lane; c < a.d; c += kWarp) {
        at.joint[j * r.dp + c] = static_cast<const A*>(a.ids)[node * a.d + c];
      }
      for (int64_t m = 0; m < a.modalities; ++m) {
        const A* row = heads + ((m * 3 + j) * a.batch + b) * a.d;
        const Norm<A> norm(row, a.d, omega[m], lane);
        for (int64_t c = lane; c < a.d; c += kWarp) at.joint[j * r.dp + c] += norm.scale * row[c];
      }
    }
    const A by = static_cast<const A*>(g.margin)[b];
    for (int64_t c = lane; c < a.d; c += kWarp) {
      const A user = at.joint[c], observed = at.joint[r.dp + c], negative = at.joint[2 * r.dp + c];
      at.rows[c] = by * (observed - negative);
      at.rows[r.dp + c] = by * user;
      at.rows[2 * r.dp + c] = -by * user;
    }
  }
  for (int64_t m = 0; m < a.modalities; ++m) {
    if (g.logits) load_state(a, r, m, at.state);
    if (!live) continue;
    const A* grad = static_cast<const A*>(g.logits) + (m * a.batch + b) * a.list;
    if (g.logits) {
      A* through = static_cast<A*>(g.through) + (m * a.batch + b) * a.e;
      for (int64_t k = lane; k < a.e; k += kWarp) {
        at.through[k] = through[k] = weighted(a, b, grad, static_cast<const A*>(a.design), a.e, k);
      }
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const int64_t place = ((m * 3 + j) * a.batch + b) * a.d;
      A* out = static_cast<A*>(g.rows) + place;
      A scale = 0, back = 0;
      if (g.margin) {
        const Norm<A> norm(heads + place, a.d, omega[m], lane);
        for (int64_t c = lane; c < a.d; c += kWarp) back += heads[place + c] * at.rows[j * r.dp + c];
        back = warp_sum(back) * norm.inverse_square;
        scale = norm.scale;
      }
      for (int64_t c = lane; c < a.d; c += kWarp) {
        A sum = g.margin ? scale * (at.rows[j * r.dp + c] - back * heads[place + c]) : A(0);
        if (j == 0 && g.logits) {
          const A* content = static_cast<const A*>(a.content) + m * a.num_nodes * a.d;
          sum += weighted(a, b, grad, content, a.d, c);
          for (int64_t k = 0; k < a.e; ++k) sum += at.through[k] * at.state[k * r.stride + c];
        }
        out[c] = sum;
      }
    }
    __syncwarp();
  }
}

// The gradient of Z: a sum of outer products, rows of K and gradients of F, then gradients of F_u Z^T and F_u. A block
// adds a part of them for a tile of it.
constexpr int kSide = 16, kTileE = 5 * kSide, kTileD = 4 * kSide, kStep = 16, kOuterBlock = kSide * kSide;

template <class A>
__device__ __forceinline__ void factors(const FrozenArgs& a, const FrozenGradients& g, int64_t m, int64_t row,
                                        const A*& left, const A*& right) {
  const int64_t heads = 3 * a.batch, all = heads + a.num_targets;
  if (row >= all) {
    const int64_t b = row - all;
    left = static_cast<const A*>(g.through) + (m * a.batch + b) * a.e;
    right = static_cast<const A*>(g.heads) + (m * heads + b) * a.d;
    return;
  }
  if (row >= heads && !g.targets) return;
  left = static_cast<const A*>(a.design) + checked(a.nodes[row], a.num_nodes) * a.e;
  right = row < heads ? static_cast<const A*>(g.rows) + (m * heads + row) * a.d
                      : static_cast<const A*>(g.targets) + (m * a.num_targets + row - heads) * a.d;
}

template <class A>
__global__ void __launch_bounds__(kOuterBlock)
    frozen_outer_kernel(FrozenArgs a, FrozenGradients g, int64_t begin, int64_t end, int64_t each, int64_t tiles_d) {
  MMKD_SHARED(A, left, kStep * kTileE);
  MMKD_SHARED(A, right, kStep * kTileD);
  const int64_t tiles = gridDim.y / a.modalities, m = blockIdx.y / tiles, tile = blockIdx.y % tiles;
  const int64_t e0 = tile / tiles_d * kTileE, d0 = tile % tiles_d * kTileD;
  const int64_t from = begin + blockIdx.x * each, until = from + each < end ? from + each : end;
  const int te = threadIdx.x / kSide, td = threadIdx.x % kSide;
  A sum[5][4] = {};
  for (int64_t row0 = from; row0 < until; row0 += kStep) {
    __syncthreads();
    for (int i = threadIdx.x / kWarp; i < kStep; i += kOuterBlock / kWarp) {
      const A *l = nullptr, *r = nullptr;
      if (row0 + i < until) factors(a, g, m, row0 + i, l, r);
      for (int64_t k = threadIdx.x % kWarp; k < kTileE; k += kWarp) {
        left[i * kTileE + k] = l && e0 + k < a.e ? l[e0 + k] : A(0);
      }
      for (int64_t c = threadIdx.x % kWarp; c < kTileD; c += kWarp) {
        right[i * kTileD + c] = r && d0 + c < a.d ? r[d0 + c] : A(0);
      }
    }
    __syncthreads();
#pragma unroll 4
    for (int i = 0; i < kStep; ++i) {
      A x[5], y[4];
#pragma unroll
      for (int u = 0; u < 5; ++u) x[u] = left[i * kTileE + te + u * kSide];
#pragma unroll
      for (int v = 0; v < 4; ++v) y[v] = right[i * kTileD + td + v * kSide];
#pragma unroll
      for (int u = 0; u < 5; ++u) {
#pragma unroll
        for (int v = 0; v < 4; ++v) sum[u][v] += x[u] * y[v];
      }
    }
  }
  A* out = static_cast<A*>(g.parts) + (blockIdx.x * a.modalities + m) * a.e * a.d;
#pragma unroll
  for (int u = 0; u < 5; ++u) {
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const int64_t k = e0 + te + u * kSide, c = d0 + td + v * kSide;
      if (k < a.e && c < a.d) out[k * a.d + c] = sum[u][v];
    }
  }
}

template <class A>
__global__ void __launch_bounds__(kOuterBlock) frozen_sum_kernel(const A* parts, int64_t count, int64_t size, A* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kOuterBlock + threadIdx.x;
  if (i >= size) return;
  A sum = 0;
#pragma unroll 8
  for (int64_t p = 0; p < count; ++p) sum += parts[p * size + i];
  out[i] = sum;
}

int64_t bytes_of(const FrozenArgs& a) { return a.dtype == DType::f64 ? 8 : 4; }

int64_t shared_bytes(const FrozenArgs& a, int64_t warps) {
  const Room r(a.d, a.e);
  return (r.state + warps * r.warp) * bytes_of(a);
}

int64_t warps_of(const FrozenArgs& a) {
  int64_t warps = kMostWarps;
  while (warps > 1 && shared_bytes(a, warps) > kMostShared) warps /= 2;
  return warps;
}

Grid grid_of(const FrozenArgs& a, int64_t units, void* stream) {
  const int64_t warps = warps_of(a);
  return {ceil_div(units, warps), static_cast<int>(warps) * kWarp, stream, shared_bytes(a, warps), 1, kMostShared};
}

// Outer products [begin, end) that there are: a part that has no gradient is left out.
int64_t outer_begin(const FrozenArgs& a, const FrozenGradients& g) { return g.margin || g.logits ? 0 : 3 * a.batch; }
int64_t outer_end(const FrozenArgs& a, const FrozenGradients& g) {
  return 3 * a.batch + (g.targets || g.logits ? a.num_targets : 0) + (g.logits ? a.batch : 0);
}

template <class A>
void backward(const FrozenArgs& a, const FrozenGradients& g, void* stream) {
  if (g.margin || g.logits) {
    launch("frozen_teacher rows", frozen_rows_kernel<A>, grid_of(a, a.batch, stream), a, g);
  }
  const int64_t begin = outer_begin(a, g), end = outer_end(a, g), parts = frozen_parts(a),
                size = a.modalities * a.e * a.d;
  const int64_t tiles_d = ceil_div(a.d, kTileD), each = ceil_div(ceil_div(end - begin, parts), kStep) * kStep;
  Grid outer{parts, kOuterBlock, stream};
  outer.y = a.modalities * tiles_d * ceil_div(a.e, kTileE);
  if (size == 0) return;
  launch("frozen_teacher outer", frozen_outer_kernel<A>, outer, a, g, begin, end, each, tiles_d);
  launch("frozen_teacher sum", frozen_sum_kernel<A>, Grid{ceil_div(size, kOuterBlock), kOuterBlock, stream},
         static_cast<const A*>(g.parts), parts, size, static_cast<A*>(g.state));
}

}  // namespace

bool frozen_fits(const FrozenArgs& a) { return shared_bytes(a, 1) <= kMostShared; }

void frozen_teacher(const FrozenArgs& a, const FrozenOutputs& o, void* stream) {
  const Grid grid = grid_of(a, a.batch + ceil_div(a.num_targets, kRows), stream);
  if (a.dtype == DType::f64) {
    launch("frozen_teacher", frozen_forward_kernel<double>, grid, a, o);
  } else {
    launch("frozen_teacher", frozen_forward_kernel<float>, grid, a, o);
  }
}

int64_t frozen_parts(const FrozenArgs& a) {
  const int64_t steps = ceil_div(4 * a.batch + a.num_targets, kStep);
  return steps < 1 ? 1 : steps < 64 ? steps : 64;
}

void frozen_teacher_backward(const FrozenArgs& a, const FrozenGradients& g, void* stream) {
  a.dtype == DType::f64 ? backward<double>(a, g, stream) : backward<float>(a, g, stream);
}

}  // namespace mmkd::cuda
