#include "cuda/device.cuh"
#include "cuda/emb_kd_kernel.h"

namespace mmkd::cuda {
namespace {

using namespace maths;

constexpr int kBlock = 128, kWarps = kBlock / kWarp;

__device__ __forceinline__ float power(float x, float y) { return powf(x, y); }
__device__ __forceinline__ double power(double x, double y) { return pow(x, y); }

// v^gamma for v >= 0; the usual exponents without pow.
template <class A>
__device__ __forceinline__ A raised(A v, A gamma) {
  if (gamma == A(2)) return v * v;
  if (gamma == A(1)) return v;
  if (gamma == A(0)) return A(1);
  return v > 0 ? power(v, gamma) : v == 0 ? A(0) : v;  // a NaN stays one
}

template <class A>
struct Cosine {
  bool live;
  A value, norms;  // norms = |e| |f|

  __device__ __forceinline__ Cosine(A ee, A ef, A ff) {
    live = !(ee == 0) && !(ff == 0);
    norms = live ? Num<A>::sqrt(ee) * Num<A>::sqrt(ff) : A(1);
    value = live ? ef / norms : A(0);
  }
};

template <class T, int V>
__global__ void __launch_bounds__(kBlock) emb_forward_kernel(EmbArgs a, EmbForward f, int lanes) {
  using A = Acc<T>;
  const Group g(lanes);
  const int64_t row = 1 + 2 * a.modalities;
  const A* weights = static_cast<const A*>(a.weights);
  A sums[1] = {};
  for (int64_t first = (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp) * g.count; first < a.n;
       first += static_cast<int64_t>(gridDim.x) * kWarps * g.count) {
    const int64_t i = first + g.index;
    const bool live = i < a.n;
    const T* e = static_cast<const T*>(a.student) + i * a.d;
    A ee = 0;
    for (int64_t c = g.lane * V; live && c < a.d; c += g.size * V) {
      const Pack<T, V> x = load<V>(e + c);
      ee += dot(x, x);
    }
    ee = group_sum(ee, g);
    const bool writes = live && g.lane == 0;
    A* stats = static_cast<A*>(a.stats) + i * row;
    if (writes) stats[0] = ee;
    for (int64_t m = 0; m < a.modalities; ++m) {
      const T* teacher = static_cast<const T*>(a.teachers) + (m * a.n + i) * a.d;
      A ef = 0, ff = 0;
      for (int64_t c = g.lane * V; live && c < a.d; c += g.size * V) {
        const Pack<T, V> y = load<V>(teacher + c);
        ef += dot(load<V>(e + c), y);
        ff += dot(y, y);
      }
      ef = group_sum(ef, g);
      ff = group_sum(ff, g);
      if (!writes) continue;
      stats[1 + 2 * m] = ef;
      stats[2 + 2 * m] = ff;
      const A rest = 1 - Cosine<A>(ee, ef, ff).value;
      sums[0] += rest < 0 ? A(0) : weights[m] * raised(rest, static_cast<A>(a.gamma));
    }
  }
  sum_over_grid(sums, static_cast<A*>(f.partial), f.ticket,
                [&](const A(&total)[1]) { *static_cast<A*>(f.loss) = total[0] / static_cast<A>(a.n); });
}

template <class T, int V>
__global__ void __launch_bounds__(kBlock) emb_backward_kernel(EmbArgs a, EmbBackward o, int lanes) {
  using A = Acc<T>;
  const A gamma = static_cast<A>(a.gamma), scale = *static_cast<const A*>(o.grad) * gamma / static_cast<A>(a.n);
  const A* weights = static_cast<const A*>(a.weights);
  const int lane = threadIdx.x % lanes;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x) / lanes; i < a.n;
       i += static_cast<int64_t>(gridDim.x) * (kBlock / lanes)) {
    const A* stats = static_cast<const A*>(a.stats) + i * (1 + 2 * a.modalities);
    for (int64_t c = lane * V; c < a.d; c += lanes * V) {
      const Pack<T, V> e = load<V>(static_cast<const T*>(a.student) + i * a.d + c);
      A student[V] = {};
      for (int64_t m = 0; m < a.modalities; ++m) {
        const int64_t at = (m * a.n + i) * a.d + c;
        const Pack<T, V> f = load<V>(static_cast<const T*>(a.teachers) + at);
        const A ff = stats[2 + 2 * m];
        const Cosine<A> cos(stats[0], stats[1 + 2 * m], ff);
        const A rest = 1 - cos.value;
        const A slope =
            cos.live && !(rest < 0) ? -scale * weights[m] * raised(rest, gamma - 1) : A(0);  // d loss / d cos
        const A across = slope / cos.norms;
        axpy(student, across, f);
        axpy(student, cos.live ? -slope * cos.value / stats[0] : A(0), e);
        if (o.grad_teachers) {
          A teacher[V] = {};
          axpy(teacher, across, e);
          axpy(teacher, cos.live ? -slope * cos.value / ff : A(0), f);
          store(static_cast<T*>(o.grad_teachers) + at, teacher);
        }
      }
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
