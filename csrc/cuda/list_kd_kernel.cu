#include "cuda/list_kd.cuh"

namespace mmkd::cuda {
namespace {

// A warp per sample.
constexpr int kBlock = 128, kWarps = kBlock / kWarp;
constexpr int64_t kSharedBytes = 32 * 1024;

template <class T, int V>
__global__ void __launch_bounds__(kBlock, sizeof(T) == 2 ? 6 : 0)
    list_forward_kernel(ListArgs a, ListForward f, int lanes, bool on_chip) {
  using A = Acc<T>;
  MMKD_DYNAMIC_SHARED(A, scratch);
  const Group g(lanes);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  A loss[1] = {};
  for (int64_t b = static_cast<int64_t>(blockIdx.x) * kWarps + warp; b < a.batch;
       b += static_cast<int64_t>(gridDim.x) * kWarps) {
    const A* student = static_cast<const A*>(f.given) + b * a.k;
    if (!f.given) {
      A* out = static_cast<A*>(f.logits) + b * a.k;
      A* z = on_chip ? scratch + warp * a.k : out;
      __syncwarp();  // the last sample's readers are done
      scores_of<T, V>(a, g, b, z);
      __syncwarp();
      if (on_chip) {
        for (int64_t j = lane; j < a.k; j += kWarp) out[j] = z[j];
      }
      student = z;
    }
    if (!f.loss) continue;
    const A one = list_terms<true>(a, student, b, lane, A(0), static_cast<A*>(nullptr), static_cast<A*>(nullptr));
    if (lane == 0) loss[0] += one;
  }
  if (!f.loss) return;
  sum_over_grid(loss, static_cast<A*>(f.partial), f.ticket, [&](const A(&total)[1]) {
    *static_cast<A*>(f.loss) = static_cast<A>(a.tau * a.tau) * total[0] / static_cast<A>(a.batch);
  });
}

template <class T, int V>
__global__ void __launch_bounds__(kBlock) list_backward_kernel(ListArgs a, ListBackward o, int lanes) {
  using A = Acc<T>;
  MMKD_DYNAMIC_SHARED(A, scratch);
  const Group g(lanes);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const bool scatters = o.grad_user || o.grad_item;
  const A scale = o.given ? A(0) : *static_cast<const A*>(o.grad) * static_cast<A>(a.tau) / static_cast<A>(a.batch);
  for (int64_t b = static_cast<int64_t>(blockIdx.x) * kWarps + warp; b < a.batch;
       b += static_cast<int64_t>(gridDim.x) * kWarps) {
    const A* coef = static_cast<const A*>(o.given) + b * a.k;
    if (!o.given) {
      A* mine = o.coef ? static_cast<A*>(o.coef) + b * a.k : scatters ? scratch + warp * a.k : nullptr;
      __syncwarp();  // the last sample's readers are done
      list_terms<false>(a, static_cast<const A*>(o.logits) + b * a.k, b, lane, scale, mine,
                        static_cast<A*>(o.grad_teacher));
      __syncwarp();
      coef = mine;
    }
    if (scatters) {
      scatter<T, V>(a, g, b, coef, static_cast<A*>(o.grad_user), static_cast<A*>(o.grad_item));
    }
  }
}

int lanes_of(const ListArgs& a) { return a.user_emb ? lanes_for(a.dtype, a.wide, a.d) : 1; }

int64_t scratch_bytes(const ListArgs& a) { return kWarps * a.k * (a.dtype == DType::f64 ? 8 : 4); }

Grid grid_of(const ListArgs& a, bool on_chip, void* stream) {
  return {list_blocks(a), kBlock, stream, on_chip ? scratch_bytes(a) : 0};
}

}  // namespace

int64_t list_blocks(const ListArgs& a) {
  const int64_t blocks = ceil_div(a.batch, kWarps);
  return blocks < kMaxBlocks ? blocks : kMaxBlocks;
}

bool list_fits(const ListArgs& a) { return scratch_bytes(a) <= kSharedBytes; }

void list_forward(const ListArgs& a, const ListForward& f, void* stream) {
  const bool on_chip = !f.given && list_fits(a);
  dispatch(a.dtype, a.wide, [&](auto tag) {
    using T = typename decltype(tag)::T;
    launch("list_kd forward", list_forward_kernel<T, decltype(tag)::V>, grid_of(a, on_chip, stream), a, f, lanes_of(a),
           on_chip);
  });
}

void list_backward(const ListArgs& a, const ListBackward& g, void* stream) {
  const bool on_chip = !g.given && !g.coef && (g.grad_user || g.grad_item);
  dispatch(a.dtype, a.wide, [&](auto tag) {
    using T = typename decltype(tag)::T;
    launch("list_kd backward", list_backward_kernel<T, decltype(tag)::V>, grid_of(a, on_chip, stream), a, g,
           lanes_of(a));
  });
}

}  // namespace mmkd::cuda
