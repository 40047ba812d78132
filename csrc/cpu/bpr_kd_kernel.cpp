#include "cpu/bpr_kd_kernel.h"

#include "cpu/vec.h"
#include "loss_math.h"

namespace mmkd {
namespace MMKD_ISA {
namespace {

constexpr int kAhead = 4;  // samples between a prefetch and its use

template <class T>
MMKD_INLINE void prefetch_row(const T* row, int64_t d) {
  const char* p = reinterpret_cast<const char*>(row);
  const int64_t bytes = d * static_cast<int64_t>(sizeof(T)) < 512 ? d * static_cast<int64_t>(sizeof(T)) : 512;
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(p + b);
}

template <class T>
void margins_typed(const MarginArgs& a, int64_t begin, int64_t end) {
  const T* users = static_cast<const T*>(a.user_emb);
  const T* items = static_cast<const T*>(a.item_emb);
  Acc<T>* margin = static_cast<Acc<T>*>(a.margin);
  for (int64_t b = begin; b < end; ++b) {
    if (b + kAhead < end) {
      prefetch_row(users + a.users[b + kAhead] * a.d, a.d);
      prefetch_row(items + a.pos[b + kAhead] * a.d, a.d);
      prefetch_row(items + a.neg[b + kAhead] * a.d, a.d);
    }
    const T* u = users + a.users[b] * a.d;
    margin[b] = dot(u, items + a.pos[b] * a.d, a.d) - dot(u, items + a.neg[b] * a.d, a.d);
  }
}

template <class A>
void losses_typed(const PairArgs& a, int64_t begin, int64_t end) {
  const A* margin = static_cast<const A*>(a.margin);
  const A* teacher = static_cast<const A*>(a.teacher);
  const A tau = static_cast<A>(a.tau), tau2 = tau * tau;
  for (int64_t b = begin; b < end; ++b) {
    static_cast<A*>(a.bpr)[b] = -logistic(margin[b]).log_p;
    static_cast<A*>(a.pair)[b] =
        teacher ? tau2 * pair_kd(logistic(teacher[b] / tau), logistic(margin[b] / tau), a.bernoulli) : A(0);
  }
}

template <class A>
void grads_typed(const PairArgs& a, int64_t begin, int64_t end) {
  const A* margin = static_cast<const A*>(a.margin);
  const A* teacher = static_cast<const A*>(a.teacher);
  const A tau = static_cast<A>(a.tau), to_bpr = static_cast<A>(a.scale_bpr), to_pair = static_cast<A>(a.scale_pair) * tau;
  for (int64_t b = begin; b < end; ++b) {
    A g = -to_bpr * logistic(margin[b]).q;
    if (teacher) {
      const A tl = teacher[b] / tau, sl = margin[b] / tau;
      const Logistic<A> t = logistic(tl), s = logistic(sl);
      g += to_pair * pair_kd_grad_student(t, s, a.bernoulli);
      if (a.grad_teacher) {
        static_cast<A*>(a.grad_teacher)[b] = to_pair * pair_kd_grad_teacher(t, s, tl, sl, a.bernoulli);
      }
    }
    if (a.grad_margin) static_cast<A*>(a.grad_margin)[b] = g;
  }
}

}  // namespace

void bpr_margins(const MarginArgs& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::f32:
      return margins_typed<float>(a, begin, end);
    case DType::f64:
      return margins_typed<double>(a, begin, end);
    case DType::bf16:
      return margins_typed<bf16_t>(a, begin, end);
    default:
      return margins_typed<f16_t>(a, begin, end);
  }
}

void bpr_kd_losses(const PairArgs& a, int64_t begin, int64_t end) {
  a.f64 ? losses_typed<double>(a, begin, end) : losses_typed<float>(a, begin, end);
}

void bpr_kd_grads(const PairArgs& a, int64_t begin, int64_t end) {
  a.f64 ? grads_typed<double>(a, begin, end) : grads_typed<float>(a, begin, end);
}

}  // namespace MMKD_ISA
}  // namespace mmkd
