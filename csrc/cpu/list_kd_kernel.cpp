#include "cpu/list_kd_kernel.h"

#include "cpu/vec.h"
#include "cpu/vmath.h"

namespace mmkd {
namespace MMKD_ISA {
namespace {

template <class T>
bool scores_typed(const ListScoresArgs& a, int64_t begin, int64_t end) {
  const T* user_emb = static_cast<const T*>(a.user_emb);
  const T* item_emb = static_cast<const T*>(a.item_emb);
  Acc<T>* logits = static_cast<Acc<T>*>(a.logits);
  if (!in_range(a.users + begin, end - begin, a.num_users)) return false;
  if (!in_range(a.candidates + begin * a.k, (end - begin) * a.k, a.num_items)) return false;
  for (int64_t b = begin; b < end; ++b) {
    const T* user = user_emb + a.users[b] * a.d;
    if (b + 2 < end) prefetch_row(user_emb + a.users[b + 2] * a.d, a.d);
    for (int64_t k = 0; k < a.k; ++k) {
      const int64_t here = b * a.k + k, ahead = here + 12;
      if (ahead < end * a.k) prefetch_row(item_emb + a.candidates[ahead] * a.d, a.d);
      logits[here] = dot(user, item_emb + a.candidates[here] * a.d, a.d);
    }
  }
  return true;
}

// K logits of each of up to Vec<A>::size samples, one sample to a lane; the lanes left over are zero.
template <class A>
MMKD_INLINE void load_lanes(const A* logits, int64_t k, int64_t count, A over_tau, A* out) {
  constexpr int64_t lanes = Vec<A>::size;
  for (int64_t j = 0; j < k; ++j) {
    for (int64_t i = 0; i < lanes; ++i) out[j * lanes + i] = i < count ? logits[i * k + j] * over_tau : A(0);
  }
}

template <class A>
MMKD_INLINE void store_lanes(const A* values, int64_t k, int64_t count, A* out) {
  constexpr int64_t lanes = Vec<A>::size;
  for (int64_t j = 0; j < k; ++j) {
    for (int64_t i = 0; i < count; ++i) out[i * k + j] = values[j * lanes + i];
  }
}

// The negatives' softmax: z[1..K) becomes z - max and e = exp of it, so that log q_k = z_k - log_sum.
template <class A>
struct Softmax {
  typename Vec<A>::V sum, log_sum, margin;  // margin: z_0 - logsumexp of the negatives
};

template <class A>
MMKD_INLINE Softmax<A> negatives(A* z, A* e, int64_t k) {
  using W = Vec<A>;
  using V = typename W::V;
  V top = W::load(z + W::size);
  for (int64_t j = 2; j < k; ++j) {
    const V v = W::load(z + j * W::size);
    top = v > top ? v : top;
  }
  V sum = V();
  for (int64_t j = 1; j < k; ++j) {
    const V shifted = W::load(z + j * W::size) - top, ex = Num<V>::exp(shifted);
    W::store(z + j * W::size, shifted);
    W::store(e + j * W::size, ex);
    sum += ex;
  }
  const V log_sum = Num<V>::log(sum);
  return {sum, log_sum, (W::load(z) - top) - log_sum};
}

// KL(q^T || q^S) = sum_k q^T_k (z^T_k - z^S_k) + log_sum^S - log_sum^T.
template <class A>
MMKD_INLINE typename Vec<A>::V kl_negatives(const A* zt, const A* et, const Softmax<A>& t, const A* zs,
                                            const Softmax<A>& s, int64_t k) {
  using W = Vec<A>;
  typename W::V dot = typename W::V();
  for (int64_t j = 1; j < k; ++j) {
    dot += W::load(et + j * W::size) * (W::load(zt + j * W::size) - W::load(zs + j * W::size));
  }
  return dot / t.sum + (s.log_sum - t.log_sum);
}

template <class A>
double loss_typed(const ListKdArgs& a, int64_t begin, int64_t end, A* scratch) {
  using W = Vec<A>;
  using V = typename W::V;
  const A over_tau = static_cast<A>(1 / a.tau);
  const V alpha = V() + static_cast<A>(a.alpha), beta = V() + static_cast<A>(a.beta);
  const A* weight = static_cast<const A*>(a.weight);
  const int64_t tile = a.k * W::size;
  A *zs = scratch, *zt = scratch + tile, *e = scratch + 2 * tile;
  double total = 0;
  for (int64_t b = begin; b < end; b += W::size) {
    const int64_t count = end - b < W::size ? end - b : W::size;
    load_lanes(static_cast<const A*>(a.logits) + b * a.k, a.k, count, over_tau, zs);
    const Softmax<A> s = negatives(zs, e, a.k);
    const Logistic<V> ls = logistic(s.margin);
    V loss = V();
    for (int64_t m = 0; m < a.modalities; ++m) {
      load_lanes(static_cast<const A*>(a.teacher) + (m * a.batch + b) * a.k, a.k, count, over_tau, zt);
      const Softmax<A> t = negatives(zt, e, a.k);
      const V kl_q = kl_negatives(zt, e, t, zs, s, a.k);
      loss += weight[m] * list_kd(logistic(t.margin), ls, kl_q, alpha, beta, a.coupled);
    }
    for (int64_t i = 0; i < count; ++i) total += static_cast<double>(loss[i]);
  }
  return total * a.tau * a.tau;
}

// The gradients; with kLoss also the sum of the losses.
template <bool kLoss, class A>
double grad_typed(const ListKdArgs& a, int64_t begin, int64_t end, A* scratch) {
  using W = Vec<A>;
  using V = typename W::V;
  const A over_tau = static_cast<A>(1 / a.tau), scale = static_cast<A>(a.scale * a.tau);
  const V alpha = V() + static_cast<A>(a.alpha), beta = V() + static_cast<A>(a.beta);
  const A* weight = static_cast<const A*>(a.weight);
  const int64_t tile = a.k * W::size;
  A *zs = scratch, *es = scratch + tile, *zt = scratch + 2 * tile, *et = scratch + 3 * tile, *gs = scratch + 4 * tile;
  double total = 0;
  for (int64_t b = begin; b < end; b += W::size) {
    const int64_t count = end - b < W::size ? end - b : W::size;
    load_lanes(static_cast<const A*>(a.logits) + b * a.k, a.k, count, over_tau, zs);
    const Softmax<A> s = negatives(zs, es, a.k);
    const Logistic<V> ls = logistic(s.margin);
    const V over_sum_s = scale / s.sum;
    memset(gs, 0, tile * sizeof(A));
    V loss = V();
    for (int64_t m = 0; m < a.modalities; ++m) {
      const int64_t at = (m * a.batch + b) * a.k;
      load_lanes(static_cast<const A*>(a.teacher) + at, a.k, count, over_tau, zt);
      const Softmax<A> t = negatives(zt, et, a.k);
      const Logistic<V> lt = logistic(t.margin);
      if (a.grad_student) {
        const ListGradStudent<V> g = list_kd_grad_student(lt, ls, alpha, beta, a.coupled);
        const V top = weight[m] * g.top, spread = weight[m] * g.spread, over_sum_t = scale / t.sum;
        W::store(gs, W::load(gs) + scale * top);
        for (int64_t j = 1; j < a.k; ++j) {
          const V qs = W::load(es + j * W::size) * over_sum_s, qt = W::load(et + j * W::size) * over_sum_t;
          W::store(gs + j * W::size, W::load(gs + j * W::size) + (spread * (qs - qt) - top * qs));
        }
      }
      const V kl_q = kLoss || a.grad_teacher ? kl_negatives(zt, et, t, zs, s, a.k) : V();
      if (kLoss) loss += weight[m] * list_kd(lt, ls, kl_q, alpha, beta, a.coupled);
      if (a.grad_teacher) {
        const ListGradTeacher<V> g = list_kd_grad_teacher(lt, t.margin, s.margin, kl_q, alpha, beta, a.coupled);
        const V over_sum = scale * weight[m] / t.sum, shift = s.log_sum - t.log_sum - kl_q;
        for (int64_t j = 1; j < a.k; ++j) {
          const V delta = W::load(zt + j * W::size) - W::load(zs + j * W::size) + shift;
          W::store(zt + j * W::size, W::load(et + j * W::size) * over_sum * (g.spread * delta - g.top));
        }
        W::store(zt, scale * weight[m] * g.top);
        store_lanes(zt, a.k, count, static_cast<A*>(a.grad_teacher) + at);
      }
    }
    if (a.grad_student) store_lanes(gs, a.k, count, static_cast<A*>(a.grad_student) + b * a.k);
    for (int64_t i = 0; kLoss && i < count; ++i) total += static_cast<double>(loss[i]);
  }
  return total * a.tau * a.tau;
}

}  // namespace

bool list_scores(const ListScoresArgs& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::f32:
      return scores_typed<float>(a, begin, end);
    case DType::f64:
      return scores_typed<double>(a, begin, end);
    case DType::bf16:
      return scores_typed<bf16_t>(a, begin, end);
    default:
      return scores_typed<f16_t>(a, begin, end);
  }
}

int64_t list_kd_lanes(bool f64) { return f64 ? Vec<double>::size : Vec<float>::size; }

double list_kd_loss(const ListKdArgs& a, int64_t begin, int64_t end, void* scratch) {
  return a.f64 ? loss_typed(a, begin, end, static_cast<double*>(scratch))
               : loss_typed(a, begin, end, static_cast<float*>(scratch));
}

void list_kd_grad(const ListKdArgs& a, int64_t begin, int64_t end, void* scratch) {
  a.f64 ? grad_typed<false>(a, begin, end, static_cast<double*>(scratch))
        : grad_typed<false>(a, begin, end, static_cast<float*>(scratch));
}

double list_kd_both(const ListKdArgs& a, int64_t begin, int64_t end, void* scratch) {
  return a.f64 ? grad_typed<true>(a, begin, end, static_cast<double*>(scratch))
               : grad_typed<true>(a, begin, end, static_cast<float*>(scratch));
}

}  // namespace MMKD_ISA
}  // namespace mmkd
