// The losses' maths for one sample, written once: V is float or double on a GPU, a vector of samples on a CPU.
// Num<V> gives the elementary functions; the CPU kernels specialise it for their vectors (cpu/vmath.h).
#pragma once
#include <math.h>

#if defined(__CUDACC__)
#define MMKD_FN __host__ __device__ __forceinline__
#else
#define MMKD_FN inline __attribute__((always_inline))
#endif
// CPU kernels are compiled once per instruction set, each into a namespace of its own.
#if defined(MMKD_ISA)
#define MMKD_MATHS MMKD_ISA
#else
#define MMKD_MATHS maths
#endif

namespace mmkd {
namespace MMKD_MATHS {

template <class V>
struct Num;
template <>
struct Num<float> {
  static MMKD_FN float exp(float x) { return expf(x); }
  static MMKD_FN float log(float x) { return logf(x); }
  static MMKD_FN float log1p(float x) { return log1pf(x); }
  static MMKD_FN float sqrt(float x) { return sqrtf(x); }
};
template <>
struct Num<double> {
  static MMKD_FN double exp(double x) { return ::exp(x); }
  static MMKD_FN double log(double x) { return ::log(x); }
  static MMKD_FN double log1p(double x) { return ::log1p(x); }
  static MMKD_FN double sqrt(double x) { return ::sqrt(x); }
};

// sigma(x), sigma(-x) and their logarithms from one exp and one log1p; finite for any finite x.
template <class V>
struct Logistic {
  V p, q, log_p, log_q;
};

template <class V>
MMKD_FN Logistic<V> logistic(V x) {
  const V zero = V() * 0;
  const V e = Num<V>::exp(x < zero ? x : -x);  // e^-|x|
  const V r = 1 / (e + 1), l = Num<V>::log1p(e);
  return {x < zero ? e * r : r, x < zero ? r : e * r, (x < zero ? x : zero) - l, (x < zero ? zero : -x) - l};
}

// KL( Bernoulli(t.p) || Bernoulli(s.p) ). Its gradient by the student's logit is t.q s.p - t.p s.q.
template <class V>
MMKD_FN V bernoulli_kl(const Logistic<V>& t, const Logistic<V>& s) {
  return t.p * (t.log_p - s.log_p) + t.q * (t.log_q - s.log_q);
}
template <class V>
MMKD_FN V bernoulli_kl_grad(const Logistic<V>& t, const Logistic<V>& s) {
  return t.q * s.p - t.p * s.q;
}

// PairKD of one sample without the factor tau^2, and its gradients by the student's and the teacher's logit (x / tau).
template <class V>
MMKD_FN V pair_kd(const Logistic<V>& t, const Logistic<V>& s, bool bernoulli) {
  return bernoulli ? bernoulli_kl(t, s) : t.p * (t.log_p - s.log_p);
}
template <class V>
MMKD_FN V pair_kd_grad_student(const Logistic<V>& t, const Logistic<V>& s, bool bernoulli) {
  return bernoulli ? bernoulli_kl_grad(t, s) : -(t.p * s.q);
}
// t_logit and s_logit are the logits themselves.
template <class V>
MMKD_FN V pair_kd_grad_teacher(const Logistic<V>& t, const Logistic<V>& s, V t_logit, V s_logit, bool bernoulli) {
  return t.p * t.q * (bernoulli ? t_logit - s_logit : 1 + (t.log_p - s.log_p));
}

// ListKD of one sample. Its binary part is a Bernoulli KL between the margins z_0 - logsumexp(z_1..): softmax_0 is the
// logistic of that margin, so log b- never meets log(1 - b+). kl_q is the KL over the negatives.
template <class V>
MMKD_FN V list_kd(const Logistic<V>& t, const Logistic<V>& s, V kl_q, V alpha, V beta, bool coupled) {
  return alpha * bernoulli_kl(t, s) + beta * (coupled ? t.q * kl_q : kl_q);
}

// d/ds_0 = top;  d/ds_k = -top q^S_k + spread (q^S_k - q^T_k).
template <class V>
struct ListGradStudent {
  V top, spread;
};
template <class V>
MMKD_FN ListGradStudent<V> list_kd_grad_student(const Logistic<V>& t, const Logistic<V>& s, V alpha, V beta,
                                                bool coupled) {
  return {alpha * bernoulli_kl_grad(t, s), coupled ? beta * t.q : beta};
}

// d/dt_0 = top;  d/dt_k = q^T_k (-top + spread (log q^T_k - log q^S_k - kl_q)).
template <class V>
struct ListGradTeacher {
  V top, spread;
};
template <class V>
MMKD_FN ListGradTeacher<V> list_kd_grad_teacher(const Logistic<V>& t, V t_margin, V s_margin, V kl_q, V alpha, V beta,
                                                bool coupled) {
  const V rise = alpha * (t_margin - s_margin) - (coupled ? beta * kl_q : V() * 0);
  return {t.p * t.q * rise, coupled ? beta * t.q : beta};
}

}  // namespace MMKD_MATHS
}  // namespace mmkd
