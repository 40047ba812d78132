#include "cuda/distill_kernel.h"
#include "cuda/emb_kd.cuh"
#include "cuda/list_kd.cuh"

namespace mmkd::cuda {
namespace {

constexpr int kWarps = static_cast<int>(kDistillWarps), kBlock = kWarps * kWarp;
constexpr int64_t kSharedBytes = 32 * 1024;

// BPR and PairKD of one sample, by one thread: adds to their sums and to the gradients of the first two scores.
template <class A>
__device__ __forceinline__ void pair_terms(const DistillArgs& a, int64_t b, const A* z, A* coef, A (&sums)[4]) {
  const A batch = static_cast<A>(a.list.batch), margin = z[0] - z[1];
  A change = 0;
  if (a.bpr != 0) {
    const Logistic<A> s = logistic(margin);
    sums[0] -= s.log_p;
    change -= static_cast<A>(a.bpr) / batch * s.q;
  }
  if (a.pair != 0) {
    const A over_tau = static_cast<A>(1 / a.pair_tau), by = static_cast<A>(a.pair * a.pair_tau) / batch;
    const A t_logit = static_cast<const A*>(a.margin)[b] * over_tau, s_logit = margin * over_tau;
    const Logistic<A> t = logistic(t_logit), s = logistic(s_logit);
    sums[1] += pair_kd(t, s, a.bernoulli);
    change += by * pair_kd_grad_student(t, s, a.bernoulli);
    if (a.grad_margin) {
      static_cast<A*>(a.grad_margin)[b] = by * pair_kd_grad_teacher(t, s, t_logit, s_logit, a.bernoulli);
    }
  }
  if (!coef) return;
  coef[0] += change;
  coef[1] -= change;
}

// A warp per sample. `sums`: BPR, PairKD, ListKD, in its first lane.
template <class T, int V>
__device__ __forceinline__ void samples(const DistillArgs& a, const Group& g, int64_t blocks, Acc<T>* shared,
                                        Acc<T> (&sums)[4]) {
  using A = Acc<T>;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t mine = (static_cast<int64_t>(blockIdx.x) * kWarps + warp), k = a.list.k;
  A* z = a.scratch ? static_cast<A*>(a.scratch) + mine * 2 * k : shared + warp * 2 * k;
  A* coef = a.grad_table ? z + k : nullptr;
  A* grad_user = static_cast<A*>(a.grad_table);
  A* grad_item = grad_user + a.list.num_users * a.list.d;
  const A scale = static_cast<A>(a.by_list * a.list.tau) / static_cast<A>(a.list.batch);
  for (int64_t b = mine; b < a.list.batch; b += blocks * kWarps) {
    __syncwarp();  // the last sample's readers are done
    scores_of<T, V>(a.list, g, b, z);
    __syncwarp();
    if (a.by_list != 0) {
      const A one = list_terms<true>(a.list, z, b, lane, scale, coef, static_cast<A*>(a.grad_logits));
      if (lane == 0) sums[2] += one;
    } else if (coef) {
      for (int64_t j = lane; j < k; j += kWarp) coef[j] = 0;
    }
    __syncwarp();
    if (lane == 0) pair_terms(a, b, z, coef, sums);
    if (!coef) continue;
    __syncwarp();
    scatter<T, V>(a.list, g, b, coef, grad_user, grad_item);
  }
}

// A group of lanes per node. `sums`: EmbKD, in its first lane.
template <class T, int V>
__device__ __forceinline__ void nodes(const DistillArgs& a, const Group& g, int64_t block, int64_t blocks,
                                      Acc<T> (&sums)[4]) {
  using A = Acc<T>;
  const A scale = static_cast<A>(a.by_emb * a.emb.gamma) / static_cast<A>(a.emb.n);
  for (int64_t first = (block * kWarps + threadIdx.x / kWarp) * g.count; first < a.emb.n;
       first += blocks * kWarps * g.count) {
    const int64_t i = first + g.index;
    const bool live = i < a.emb.n;
    const int64_t row = live ? checked(a.nodes[i], a.num_rows) * a.emb.d : 0;
    const T* e = static_cast<const T*>(a.emb.student) + row;
    sums[3] += emb_loss<T, V>(a.emb, e, i, live, g);
    if (!a.grad_table && !a.grad_targets) continue;
    __syncwarp();  // the stats are there
    for (int64_t c = g.lane * V; live && c < a.emb.d; c += g.size * V) {
      A student[V] = {};
      emb_gradient<T, V>(a.emb, e, i, c, scale, student, static_cast<T*>(a.grad_targets));
      if (a.grad_table) atomic_add(static_cast<A*>(a.grad_table) + row + c, student);
    }
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kBlock, 4) distill_kernel(DistillArgs a, int64_t sample_blocks, int lanes) {
  using A = Acc<T>;
  MMKD_DYNAMIC_SHARED(A, shared);
  const Group g(lanes);
  A sums[4] = {};
  if (blockIdx.x < sample_blocks) {
    samples<T, V>(a, g, sample_blocks, shared, sums);
  } else {
    nodes<T, V>(a, g, blockIdx.x - sample_blocks, gridDim.x - sample_blocks, sums);
  }
  sum_over_grid(sums, static_cast<A*>(a.partial), a.ticket, [&](const A(&total)[4]) {
    const A batch = a.list.batch ? static_cast<A>(a.list.batch) : A(1), n = a.emb.n ? static_cast<A>(a.emb.n) : A(1);
    const A terms[4] = {total[0] / batch, static_cast<A>(a.pair_tau * a.pair_tau) * total[1] / batch,
                        static_cast<A>(a.list.tau * a.list.tau) * total[2] / batch, total[3] / n};
    const A by[4] = {static_cast<A>(a.bpr), static_cast<A>(a.pair), static_cast<A>(a.by_list),
                     static_cast<A>(a.by_emb)};
    A loss = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      static_cast<A*>(a.terms)[i] = terms[i];
      loss += by[i] * terms[i];
    }
    *static_cast<A*>(a.loss) = loss;
  });
}

int64_t at_most(int64_t blocks) { return blocks < kMaxBlocks ? blocks : kMaxBlocks; }

int lanes_of(const DistillArgs& a) { return lanes_for(a.list.dtype, a.list.wide, a.list.d); }

int64_t blocks_of_nodes(const DistillArgs& a) {
  return a.by_emb != 0 ? at_most(ceil_div(a.emb.n, kBlock / lanes_of(a))) : 0;
}

int64_t shared_bytes(const DistillArgs& a) { return kWarps * 2 * a.list.k * (a.list.dtype == DType::f64 ? 8 : 4); }

}  // namespace

int64_t distill_sample_blocks(const DistillArgs& a) {
  return a.bpr != 0 || a.pair != 0 || a.by_list != 0 ? at_most(ceil_div(a.list.batch, kWarps)) : 0;
}

int64_t distill_blocks(const DistillArgs& a) { return distill_sample_blocks(a) + blocks_of_nodes(a); }

bool distill_fits(const DistillArgs& a) { return shared_bytes(a) <= kSharedBytes; }

void distill(const DistillArgs& a, void* stream) {
  const Grid grid{distill_blocks(a), kBlock, stream, a.scratch ? 0 : shared_bytes(a)};
  dispatch(a.list.dtype, a.list.wide, [&](auto tag) {
    using T = typename decltype(tag)::T;
    launch("distill", distill_kernel<T, decltype(tag)::V>, grid, a, distill_sample_blocks(a), lanes_of(a));
  });
}

}  // namespace mmkd::cuda
