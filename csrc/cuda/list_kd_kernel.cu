#include "cuda/device.cuh"
#include "cuda/list_kd_kernel.h"

namespace mmkd::cuda {
namespace {

using namespace maths;

// A warp per sample.
constexpr int kBlock = 128, kWarps = kBlock / kWarp;
constexpr int64_t kSharedBytes = 32 * 1024;

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

template <class T, int V>
__global__ void __launch_bounds__(kBlock) list_forward_kernel(ListArgs a, ListForward f, int lanes, bool on_chip) {
  using A = Acc<T>;
  MMKD_DYNAMIC_SHARED(A, scratch);
  const Group g(lanes);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const A over_tau = static_cast<A>(1 / a.tau), alpha = static_cast<A>(a.alpha), beta = static_cast<A>(a.beta);
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
    const Negatives<A> s(student, a.k, over_tau, lane);
    const Logistic<A> ls = logistic(s.margin);
    for (int64_t m = 0; m < a.modalities; ++m) {
      const A* teacher = static_cast<const A*>(a.teacher) + (m * a.batch + b) * a.k;
      const Negatives<A> t(teacher, a.k, over_tau, lane);
      const A kl_q = kl_negatives(teacher, t, student, s, a.k, over_tau, lane);
      const A one = list_kd(logistic(t.margin), ls, kl_q, alpha, beta, a.coupled);
      if (lane == 0) loss[0] += static_cast<const A*>(a.weight)[m] * one;
    }
  }
  if (!f.loss) return;
  sum_over_grid(loss, static_cast<A*>(f.partial), f.ticket, [&](const A(&total)[1]) {
    *static_cast<A*>(f.loss) = static_cast<A>(a.tau * a.tau) * total[0] / static_cast<A>(a.batch);
  });
}

// coef[j] = dL/d(student logit j), and the teacher's gradients. Lane l works on j = l, l + 32, ...
template <class A>
__device__ __forceinline__ void loss_gradients(const ListArgs& a, const ListBackward& o, int64_t b, int lane, A* coef) {
  const A over_tau = static_cast<A>(1 / a.tau), alpha = static_cast<A>(a.alpha), beta = static_cast<A>(a.beta);
  const A scale = *static_cast<const A*>(o.grad) * static_cast<A>(a.tau) / static_cast<A>(a.batch);
  const A* student = static_cast<const A*>(o.logits) + b * a.k;
  const Negatives<A> s(student, a.k, over_tau, lane);
  const Logistic<A> ls = logistic(s.margin);
  if (coef) {
    for (int64_t j = lane; j < a.k; j += kWarp) coef[j] = 0;
  }
  for (int64_t m = 0; m < a.modalities; ++m) {
    const int64_t at = (m * a.batch + b) * a.k;
    const A* teacher = static_cast<const A*>(a.teacher) + at;
    const A weight = scale * static_cast<const A*>(a.weight)[m];
    const Negatives<A> t(teacher, a.k, over_tau, lane);
    const Logistic<A> lt = logistic(t.margin);
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
    if (o.grad_teacher) {
      const A kl_q = kl_negatives(teacher, t, student, s, a.k, over_tau, lane);
      const ListGradTeacher<A> d = list_kd_grad_teacher(lt, t.margin, s.margin, kl_q, alpha, beta, a.coupled);
      const A shift = s.log_sum - t.log_sum - kl_q;
      for (int64_t j = lane; j < a.k; j += kWarp) {
        A change = d.top;
        if (j > 0) {
          const A zt = teacher[j] * over_tau - t.top, zs = student[j] * over_tau - s.top;
          change = Num<A>::exp(zt) / t.sum * (d.spread * (zt - zs + shift) - d.top);
        }
        static_cast<A*>(o.grad_teacher)[at + j] = weight * change;
      }
    }
  }
}

// grad_user[u] += sum_k coef[k] item_k, grad_item[i_k] += coef[k] user.
template <class T, int V>
__device__ __forceinline__ void scatter(const ListArgs& a, const ListBackward& o, const Group& g, int64_t b,
                                        const Acc<T>* coef) {
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
      if (o.grad_user) axpy(sum, w, load<V>(static_cast<const T*>(a.item_emb) + item + c));
      if (o.grad_item) {
        A x[V] = {};
        axpy(x, w, u);
        atomic_add(static_cast<A*>(o.grad_item) + item + c, x);
      }
    }
    if (!o.grad_user) continue;
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] = across_groups(sum[v], g);
    if (in && g.index == 0) atomic_add(static_cast<A*>(o.grad_user) + user + c, sum);
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kBlock) list_backward_kernel(ListArgs a, ListBackward o, int lanes) {
  using A = Acc<T>;
  MMKD_DYNAMIC_SHARED(A, scratch);
  const Group g(lanes);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const bool scatters = o.grad_user || o.grad_item;
  for (int64_t b = static_cast<int64_t>(blockIdx.x) * kWarps + warp; b < a.batch;
       b += static_cast<int64_t>(gridDim.x) * kWarps) {
    const A* coef = static_cast<const A*>(o.given) + b * a.k;
    if (!o.given) {
      A* mine = o.coef ? static_cast<A*>(o.coef) + b * a.k : scatters ? scratch + warp * a.k : nullptr;
      __syncwarp();  // the last sample's readers are done
      loss_gradients(a, o, b, lane, mine);
      __syncwarp();
      coef = mine;
    }
    if (scatters) scatter<T, V>(a, o, g, b, coef);
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
