#include "cuda/emb_kd.cuh"

namespace mmkd::cuda {
namespace {

constexpr int kBlock = 128, kWarps = kBlock / kWarp;

template <class T, int V>
__global__ void __launch_bounds__(kBlock) emb_forward_kernel(EmbArgs a, EmbForward f, int lanes) {
  using A = Acc<T>;
  const Group g(lanes);
  A sums[1] = {};
  for (int64_t first = (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp) * g.count; first < a.n;
       first += static_cast<int64_t>(gridDim.x) * kWarps * g.count) {
    const int64_t i = first + g.index;
    const bool live = i < a.n;
    const T* e = static_cast<const T*>(a.student) + i * a.d;
    sums[0] += emb_loss<T, V>(a, e, i, live, g);
  }
  sum_over_grid(sums, static_cast<A*>(f.partial), f.ticket,
                [&](const A(&total)[1]) { *static_cast<A*>(f.loss) = total[0] / static_cast<A>(a.n); });
}

template <class T, int V>
__global__ void __launch_bounds__(kBlock) emb_backward_kernel(EmbArgs a, EmbBackward o, int lanes) {
  using A = Acc<T>;
  const A gamma = static_cast<A>(a.gamma), scale = *static_cast<const A*>(o.grad) * gamma / static_cast<A>(a.n);
  const int lane = threadIdx.x % lanes;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x) / lanes; i < a.n;
       i += static_cast<int64_t>(gridDim.x) * (kBlock / lanes)) {
    for (int64_t c = lane * V; c < a.d; c += lanes * V) {
      A student[V] = {};
      emb_gradient<T, V>(a, static_cast<const T*>(a.student) + i * a.d, i, c, scale, student,
                         static_cast<T*>(o.grad_teachers));
      if (o.grad_student) store(static_cast<T*>(o.grad_student) + i * a.d + c, student);
    }
  }
}

int lanes_of(const EmbArgs& a) { return lanes_for(a.dtype, a.wide, a.d); }

}  // namespace

int64_t emb_blocks(const EmbArgs& a) {
  const int64_t blocks = ceil_div(a.n, kBlock / lanes_of(a));
  return blocks < kMaxBlocks ? blocks : kMaxBlocks;
}

void emb_forward(const EmbArgs& a, const EmbForward& f, void* stream) {
  dispatch(a.dtype, a.wide, [&](auto tag) {
    using T = typename decltype(tag)::T;
    launch("emb_kd forward", emb_forward_kernel<T, decltype(tag)::V>, Grid{emb_blocks(a), kBlock, stream}, a, f,
           lanes_of(a));
  });
}

void emb_backward(const EmbArgs& a, const EmbBackward& g, void* stream) {
  dispatch(a.dtype, a.wide, [&](auto tag) {
    using T = typename decltype(tag)::T;
    launch("emb_kd backward", emb_backward_kernel<T, decltype(tag)::V>,
           Grid{ceil_div(a.n, kBlock / lanes_of(a)), kBlock, stream}, a, g, lanes_of(a));
  });
}

}  // namespace mmkd::cuda
