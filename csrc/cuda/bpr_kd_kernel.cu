#include "cuda/bpr_kd_kernel.h"
#include "cuda/device.cuh"

namespace mmkd::cuda {
namespace {

using namespace maths;

constexpr int kBlock = 128, kWarps = kBlock / kWarp;

// A group of lanes per sample; a warp's groups take neighbouring samples and stay together.
__device__ __forceinline__ int64_t first_sample(const Group& g) {
  return (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp) * g.count;
}
__device__ __forceinline__ int64_t sample_step(const Group& g) {
  return static_cast<int64_t>(gridDim.x) * kWarps * g.count;
}

template <class T, int V>
__global__ void __launch_bounds__(kBlock) bpr_forward_kernel(BprArgs a, BprForward f, int lanes) {
  using A = Acc<T>;
  const Group g(lanes);
  const A over_tau = static_cast<A>(1 / a.tau);
  A sums[2] = {};
  for (int64_t first = first_sample(g); first < a.batch; first += sample_step(g)) {
    const int64_t b = first + g.index;
    const bool live = b < a.batch;
    A margin = 0;
    if (!f.given) {
      A to_pos = 0, to_neg = 0;
      if (live) {
        const T* user = static_cast<const T*>(a.user_emb) + checked(a.users[b], a.num_users) * a.d;
        const T* pos = static_cast<const T*>(a.item_emb) + checked(a.pos[b], a.num_items) * a.d;
        const T* neg = static_cast<const T*>(a.item_emb) + checked(a.neg[b], a.num_items) * a.d;
        for (int64_t c = g.lane * V; c < a.d; c += g.size * V) {
          const Pack<T, V> u = load<V>(user + c), p = load<V>(pos + c), n = load<V>(neg + c);
          to_pos += dot(u, p);
          to_neg += dot(u, n);
        }
      }
      margin = group_sum(to_pos, g) - group_sum(to_neg, g);
    } else if (live) {
      margin = static_cast<const A*>(f.given)[b];
    }
    if (!live || g.lane != 0) continue;
    if (f.margin) static_cast<A*>(f.margin)[b] = margin;
    sums[0] -= logistic(margin).log_p;
    if (a.teacher) {
      const A t = static_cast<const A*>(a.teacher)[b] * over_tau;
      sums[1] += pair_kd(logistic(t), logistic(margin * over_tau), a.bernoulli);
    }
  }
  sum_over_grid(sums, static_cast<A*>(f.partial), f.ticket, [&](const A(&total)[2]) {
    const A batch = static_cast<A>(a.batch);
    *static_cast<A*>(f.bpr) = total[0] / batch;
    *static_cast<A*>(f.pair) = static_cast<A>(a.tau * a.tau) * total[1] / batch;
  });
}

template <class T, int V>
__global__ void __launch_bounds__(kBlock) bpr_backward_kernel(BprArgs a, BprBackward o, int lanes) {
  using A = Acc<T>;
  const Group g(lanes);
  const A over_tau = static_cast<A>(1 / a.tau), tau = static_cast<A>(a.tau), batch = static_cast<A>(a.batch);
  const A by_bpr = *static_cast<const A*>(o.grad_bpr) / batch, by_pair = *static_cast<const A*>(o.grad_pair) / batch;
  for (int64_t b = first_sample(g) + g.index; b < a.batch; b += sample_step(g)) {
    const A margin = static_cast<const A*>(o.margin)[b];
    A coef = -by_bpr * logistic(margin).q;
    if (a.teacher) {
      const A t_logit = static_cast<const A*>(a.teacher)[b] * over_tau, s_logit = margin * over_tau;
      const Logistic<A> t = logistic(t_logit), s = logistic(s_logit);
      coef += by_pair * tau * pair_kd_grad_student(t, s, a.bernoulli);
      if (o.grad_teacher && g.lane == 0) {
        static_cast<A*>(o.grad_teacher)[b] = by_pair * tau * pair_kd_grad_teacher(t, s, t_logit, s_logit, a.bernoulli);
      }
    }
    if (g.lane == 0) {
      if (o.grad_margin) static_cast<A*>(o.grad_margin)[b] = coef;
      if (o.coef) {
        static_cast<A*>(o.coef)[2 * b] = coef;
        static_cast<A*>(o.coef)[2 * b + 1] = -coef;
        o.pairs[2 * b] = a.pos[b];
        o.pairs[2 * b + 1] = a.neg[b];
      }
    }
    if (!o.grad_user && !o.grad_item) continue;
    const int64_t user = checked(a.users[b], a.num_users) * a.d, pos = checked(a.pos[b], a.num_items) * a.d,
                  neg = checked(a.neg[b], a.num_items) * a.d;
    for (int64_t c = g.lane * V; c < a.d; c += g.size * V) {
      if (o.grad_user) {
        const Pack<T, V> p = load<V>(static_cast<const T*>(a.item_emb) + pos + c);
        const Pack<T, V> n = load<V>(static_cast<const T*>(a.item_emb) + neg + c);
        A x[V] = {};
        axpy(x, coef, p);
        axpy(x, -coef, n);
        atomic_add(static_cast<A*>(o.grad_user) + user + c, x);
      }
      if (o.grad_item) {
        const Pack<T, V> u = load<V>(static_cast<const T*>(a.user_emb) + user + c);
        A x[V] = {}, y[V] = {};
        axpy(x, coef, u);
        axpy(y, -coef, u);
        atomic_add(static_cast<A*>(o.grad_item) + pos + c, x);
        atomic_add(static_cast<A*>(o.grad_item) + neg + c, y);
      }
    }
  }
}

int lanes_of(const BprArgs& a) { return a.user_emb ? lanes_for(a.dtype, a.wide, a.d) : 1; }

}  // namespace

int64_t bpr_blocks(const BprArgs& a) {
  const int64_t blocks = ceil_div(a.batch, kBlock / lanes_of(a));
  return blocks < kMaxBlocks ? blocks : kMaxBlocks;
}

void bpr_forward(const BprArgs& a, const BprForward& f, void* stream) {
  dispatch(a.dtype, a.wide, [&](auto tag) {
    using T = typename decltype(tag)::T;
    launch("bpr_kd forward", bpr_forward_kernel<T, decltype(tag)::V>, Grid{bpr_blocks(a), kBlock, stream}, a, f,
           lanes_of(a));
  });
}

void bpr_backward(const BprArgs& a, const BprBackward& g, void* stream) {
  dispatch(a.dtype, a.wide, [&](auto tag) {
    using T = typename decltype(tag)::T;
    launch("bpr_kd backward", bpr_backward_kernel<T, decltype(tag)::V>, Grid{bpr_blocks(a), kBlock, stream}, a, g,
           lanes_of(a));
  });
}

}  // namespace mmkd::cuda
