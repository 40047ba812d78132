#include "cpu/bpr_kd_kernel.h"

#include "cpu/vec.h"
#include "cpu/vmath.h"

namespace mmkd {
namespace MMKD_ISA {
namespace {

constexpr int kAhead = 4;  // samples between a prefetch and its use

template <class T>
bool margins_typed(const MarginArgs& a, int64_t begin, int64_t end) {
  const T* users = static_cast<const T*>(a.user_emb);
  const T* items = static_cast<const T*>(a.item_emb);
  Acc<T>* margin = static_cast<Acc<T>*>(a.margin);
  if (!in_range(a.users + begin, end - begin, a.num_users) || !in_range(a.pos + begin, end - begin, a.num_items) ||
      !in_range(a.neg + begin, end - begin, a.num_items)) {
    return false;
  }
  for (int64_t b = begin; b < end; ++b) {
    if (b + kAhead < end) {
      prefetch_row(users + a.users[b + kAhead] * a.d, a.d);
      prefetch_row(items + a.pos[b + kAhead] * a.d, a.d);
      prefetch_row(items + a.neg[b + kAhead] * a.d, a.d);
    }
    const T* u = users + a.users[b] * a.d;
    margin[b] = dot(u, items + a.pos[b] * a.d, a.d) - dot(u, items + a.neg[b] * a.d, a.d);
  }
  return true;
}

// What the losses are made of, for up to Vec<A>::size samples: one sample to a lane, lanes left over are zero.
template <class A>
struct Pair {
  using V = typename Vec<A>::V;
  Logistic<V> own;         // of the margin
  V student_x, teacher_x;  // margins / tau
  Logistic<V> student, teacher;
};

template <class A>
MMKD_INLINE typename Vec<A>::V load_some(const A* p, int64_t count) {
  if (count == Vec<A>::size) return Vec<A>::load(p);
  typename Vec<A>::V v{};
  memcpy(&v, p, static_cast<size_t>(count) * sizeof(A));
  return v;
}

template <class A>
MMKD_INLINE Pair<A> pair_of(const PairArgs& a, int64_t b, int64_t count) {
  Pair<A> p;
  const typename Vec<A>::V margin = load_some(static_cast<const A*>(a.margin) + b, count);
  p.own = logistic(margin);
  if (!a.teacher) return p;
  const A over_tau = static_cast<A>(1 / a.tau);
  p.student_x = margin * over_tau;
  p.teacher_x = load_some(static_cast<const A*>(a.teacher) + b, count) * over_tau;
  p.student = a.tau == 1 ? p.own : logistic(p.student_x);
  p.teacher = logistic(p.teacher_x);
  return p;
}

template <class A>
PairLosses losses_typed(const PairArgs& a, int64_t begin, int64_t end) {
  PairLosses sum{0, 0};
  for (int64_t b = begin; b < end; b += Vec<A>::size) {
    const int64_t count = end - b < Vec<A>::size ? end - b : Vec<A>::size;
    const Pair<A> p = pair_of<A>(a, b, count);
    for (int64_t i = 0; i < count; ++i) sum.bpr -= static_cast<double>(p.own.log_p[i]);
    if (!a.teacher) continue;
    const typename Vec<A>::V kd = pair_kd(p.teacher, p.student, a.bernoulli);
    for (int64_t i = 0; i < count; ++i) sum.pair += static_cast<double>(kd[i]);
  }
  sum.pair *= a.tau * a.tau;
  return sum;
}

template <class A>
void grads_typed(const PairArgs& a, int64_t begin, int64_t end) {
  using V = typename Vec<A>::V;
  const A to_bpr = static_cast<A>(a.scale_bpr), to_pair = static_cast<A>(a.scale_pair * a.tau);
  for (int64_t b = begin; b < end; b += Vec<A>::size) {
    const int64_t count = end - b < Vec<A>::size ? end - b : Vec<A>::size;
    const size_t bytes = static_cast<size_t>(count) * sizeof(A);
    const Pair<A> p = pair_of<A>(a, b, count);
    V g = p.own.q * -to_bpr;
    if (a.teacher) {
      g += to_pair * pair_kd_grad_student(p.teacher, p.student, a.bernoulli);
      if (a.grad_teacher) {
        const V t = to_pair * pair_kd_grad_teacher(p.teacher, p.student, p.teacher_x, p.student_x, a.bernoulli);
        memcpy(static_cast<A*>(a.grad_teacher) + b, &t, bytes);
      }
    }
    if (a.grad_margin) memcpy(static_cast<A*>(a.grad_margin) + b, &g, bytes);
    if (!a.grad_pair) continue;
    A* both = static_cast<A*>(a.grad_pair) + 2 * b;
    for (int64_t i = 0; i < count; ++i) both[2 * i] = g[i], both[2 * i + 1] = -g[i];
  }
}

}  // namespace

bool bpr_margins(const MarginArgs& a, int64_t begin, int64_t end) {
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

PairLosses bpr_kd_losses(const PairArgs& a, int64_t begin, int64_t end) {
  return a.f64 ? losses_typed<double>(a, begin, end) : losses_typed<float>(a, begin, end);
}

void bpr_kd_grads(const PairArgs& a, int64_t begin, int64_t end) {
  a.f64 ? grads_typed<double>(a, begin, end) : grads_typed<float>(a, begin, end);
}

}  // namespace MMKD_ISA
}  // namespace mmkd
