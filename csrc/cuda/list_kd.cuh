// What is done with the list of a sample, by a warp: its scores, losses, gradients. For list_kd and distill.
#pragma once
#include "cuda/device.cuh"
#include "cuda/list_kd_kernel.h"

namespace mmkd::cuda {
namespace {

using namespace maths;

// z[k] = <user, item k> for the K candidates of sample b: four rows in flight per group of lanes.
template <class T, int V>
__device__ __forceinline__ void scores_of(const ListArgs& a, const Group& g, int64_t b, Acc<T>* z) {
  constexpr int kUnroll = 4;
  const T* user = static_cast<const T*>(a.user_emb) + checked(a.users[b], a.num_users) * a.d;
  for (int64_t k0 = g.index; k0 - g.index < a.k; k0 += kUnroll * g.count) {
    const T* item[kUnroll];
    Acc<T> sum[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t k = k0 + u * g.count;
      const int64_t row = k < a.k ? checked(a.candidates[b * a.k + k], a.num_items) : 0;
      item[u] = static_cast<const T*>(a.item_emb) + row * a.d;
      sum[u] = 0;
    }
    for (int64_t c = g.lane * V; c < a.d; c += g.size * V) {
      const Pack<T, V> left = load<V>(user + c);
      Pack<T, V> right[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) right[u] = k0 + u * g.count < a.k ? load<V>(item[u] + c) : zeros<V, T>();
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) sum[u] += dot(left, right[u]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const Acc<T> score = group_sum(sum[u], g);
      if (g.lane == 0 && k0 + u * g.count < a.k) z[k0 + u * g.count] = score;
    }
  }
}

// The negatives' softmax of one sample, by a warp: q_j = exp(z_j - top) / sum, z_j = logit_j / tau.
template <class A>
struct Negatives {
  A top, sum, log_sum, margin;  // margin: z_0 - logsumexp of the negatives

  __device__ __forceinline__ Negatives(const A* logits, int64_t k, A over_tau, int lane) {
    top = -INFINITY;
    for (int64_t j = 1 + lane; j < k; j += kWarp) {
      const A z = logits[j] * over_tau;
      top = z > top ? z : top;
    }
    top = warp_max(top);
    sum = 0;
    for (int64_t j = 1 + lane; j < k; j += kWarp) sum += Num<A>::exp(logits[j] * over_tau - top);
    sum = warp_sum(sum);
    log_sum = Num<A>::log(sum);
    margin = (logits[0] * over_tau - top) - log_sum;
  }
};

// KL(q^T || q^S)
template <class A>
__device__ __forceinline__ A kl_negatives(const A* teacher, const Negatives<A>& t, const A* student,
                                          const Negatives<A>& s, int64_t k, A over_tau, int lane) {
  A sum = 0;
  for (int64_t j = 1 + lane; j < k; j += kWarp) {
    const A zt = teacher[j] * over_tau - t.top, zs = student[j] * over_tau - s.top;
    sum += Num<A>::exp(zt) * (zt - zs);
  }
  return warp_sum(sum) / t.sum + (s.log_sum - t.log_sum);
}

// What the losses of one sample are made of. Loss: sum_m weight_m list_kd, without the factor tau^2. Gradients, times
// `scale` = dL/dloss tau / batch: coef[j] = dL/d(student logit j), and grad_teacher. Lane l works on j = l, l + 32, ...
template <bool kLoss, class A>
__device__ __forceinline__ A list_terms(const ListArgs& a, const A* student, int64_t b, int lane, A scale, A* coef,
                                        A* grad_teacher) {
  const A over_tau = static_cast<A>(1 / a.tau), alpha = static_cast<A>(a.alpha), beta = static_cast<A>(a.beta);
  const Negatives<A> s(student, a.k, over_tau, lane);
  const Logistic<A> ls = logistic(s.margin);
  A loss = 0;
  if (coef) {
    for (int64_t j = lane; j < a.k; j += kWarp) coef[j] = 0;
  }
  for (int64_t m = 0; m < a.modalities; ++m) {
    const int64_t at = (m * a.batch + b) * a.k;
    const A* teacher = static_cast<const A*>(a.teacher) + at;
    const Negatives<A> t(teacher, a.k, over_tau, lane);
    const A kl_q = kLoss || grad_teacher ? kl_negatives(teacher, t, student, s, a.k, over_tau, lane) : A(0);
    const Logistic<A> lt = logistic(t.margin);
    const A by = static_cast<const A*>(a.weight)[m], weight = scale * by;
    if (kLoss) loss += by * list_kd(lt, ls, kl_q, alpha, beta, a.coupled);
    if (coef) {
      const ListGradStudent<A> d = list_kd_grad_student(lt, ls, alpha, beta, a.coupled);
      for (int64_t j = lane; j < a.k; j += kWarp) {
        A change = d.top;
        if (j > 0) {
          const A qs = Num<A>::exp(student[j] * over_tau - s.top) / s.sum;
          const A qt = Num<A>::exp(teacher[j] * over_tau - t.top) / t.sum;
          change = d.spread * (qs - qt) - d.top * qs;
        }
        coef[j] += weight * change;
      }
    }
    if (grad_teacher) {
      const ListGradTeacher<A> d = list_kd_grad_teacher(lt, t.margin, s.margin, kl_q, alpha, beta, a.coupled);
      const A shift = s.log_sum - t.log_sum - kl_q;
      for (int64_t j = lane; j < a.k; j += kWarp) {
        A change = d.top;
        if (j > 0) {
          const A zt = teacher[j] * over_tau - t.top, zs = student[j] * over_tau - s.top;
          change = Num<A>::exp(zt) / t.sum * (d.spread * (zt - zs + shift) - d.top);
        }
        grad_teacher[at + j] = weight * change;
      }
    }
  }
  return loss;
}

// grad_user[u] += sum_k coef[k] item_k, grad_item[i_k] += coef[k] user.
template <class T, int V>
__device__ __forceinline__ void scatter(const ListArgs& a, const Group& g, int64_t b, const Acc<T>* coef,
                                        Acc<T>* grad_user, Acc<T>* grad_item) {
  using A = Acc<T>;
  const int64_t user = checked(a.users[b], a.num_users) * a.d;
  for (int64_t c0 = 0; c0 < a.d; c0 += g.size * V) {
    const int64_t c = c0 + g.lane * V;
    const bool in = c < a.d;
    const Pack<T, V> u = in ? load<V>(static_cast<const T*>(a.user_emb) + user + c) : zeros<V, T>();
    A sum[V] = {};
    for (int64_t k = g.index; in && k < a.k; k += g.count) {
      const int64_t item = checked(a.candidates[b * a.k + k], a.num_items) * a.d;
      const A w = coef[k];
      if (grad_user) axpy(sum, w, load<V>(static_cast<const T*>(a.item_emb) + item + c));
      if (grad_item) {
        A x[V] = {};
        axpy(x, w, u);
        atomic_add(grad_item + item + c, x);
      }
    }
    if (!grad_user) continue;
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] = across_groups(sum[v], g);
    if (in && g.index == 0) atomic_add(grad_user + user + c, sum);
  }
}

}  // namespace
}  // namespace mmkd::cuda
