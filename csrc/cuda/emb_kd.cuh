// What is done with one row of EmbKD, by a group of lanes: its loss, its gradients. For emb_kd and distill.
#pragma once
#include "cuda/device.cuh"
#include "cuda/emb_kd_kernel.h"

namespace mmkd::cuda {
namespace {

using namespace maths;

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

// sum_m weight_m (1 - cos)^gamma of row `e`, the i-th, in the group's first lane, 0 in the others; leaves the row's
// stats.
template <class T, int V>
__device__ __forceinline__ Acc<T> emb_loss(const EmbArgs& a, const T* e, int64_t i, bool live, const Group& g) {
  using A = Acc<T>;
  const bool writes = live && g.lane == 0;
  A* stats = static_cast<A*>(a.stats) + i * (1 + 2 * a.modalities);
  A ee = 0, loss = 0;
  for (int64_t c = g.lane * V; live && c < a.d; c += g.size * V) {
    const Pack<T, V> x = load<V>(e + c);
    ee += dot(x, x);
  }
  ee = group_sum(ee, g);
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
    loss += rest < 0 ? A(0) : static_cast<const A*>(a.weights)[m] * raised(rest, static_cast<A>(a.gamma));
  }
  return loss;
}

// Columns c .. c + V - 1 of the gradients of that row, from its stats; scale: dL/dloss gamma / n.
template <class T, int V>
__device__ __forceinline__ void emb_gradient(const EmbArgs& a, const T* row, int64_t i, int64_t c, Acc<T> scale,
                                             Acc<T> (&student)[V], T* grad_teachers) {
  using A = Acc<T>;
  const A* stats = static_cast<const A*>(a.stats) + i * (1 + 2 * a.modalities);
  const A gamma = static_cast<A>(a.gamma);
  const Pack<T, V> e = load<V>(row + c);
  for (int64_t m = 0; m < a.modalities; ++m) {
    const int64_t at = (m * a.n + i) * a.d + c;
    const Pack<T, V> f = load<V>(static_cast<const T*>(a.teachers) + at);
    const A ff = stats[2 + 2 * m];
    const Cosine<A> cos(stats[0], stats[1 + 2 * m], ff);
    const A rest = 1 - cos.value;
    const A slope = cos.live && !(rest < 0) ? -scale * static_cast<const A*>(a.weights)[m] * raised(rest, gamma - 1)
                                            : A(0);  // d loss / d cos
    const A across = slope / cos.norms;
    axpy(student, across, f);
    axpy(student, cos.live ? -slope * cos.value / stats[0] : A(0), e);
    if (grad_teachers) {
      A teacher[V] = {};
      axpy(teacher, across, e);
      axpy(teacher, cos.live ? -slope * cos.value / ff : A(0), f);
      store(grad_teachers + at, teacher);
    }
  }
}

}  // namespace
}  // namespace mmkd::cuda
