#include "cpu/emb_kd_kernel.h"

#include "cpu/vec.h"
#include "cpu/vmath.h"

namespace mmkd {
namespace MMKD_ISA {
namespace {

MMKD_INLINE float power(float x, float y) { return powf(x, y); }
MMKD_INLINE double power(double x, double y) { return pow(x, y); }

// v^gamma for v >= 0; the usual exponents without pow.
template <class A>
MMKD_INLINE A raised(A v, A gamma) {
  if (gamma == A(2)) return v * v;
  if (gamma == A(1)) return v;
  if (gamma == A(0)) return A(1);
  return v > 0 ? power(v, gamma) : A(0);
}

// <e, f> and <f, f> in one pass.
template <class T>
MMKD_INLINE void dots(const T* e, const T* f, int64_t d, Acc<T>& ef, Acc<T>& ff) {
  using W = Vec<T>;
  typename W::V ef0{}, ef1{}, ff0{}, ff1{};
  int64_t c = 0;
  for (; c + 2 * W::size <= d; c += 2 * W::size) {
    const typename W::V f0 = W::load(f + c), f1 = W::load(f + c + W::size);
    ef0 += W::load(e + c) * f0;
    ef1 += W::load(e + c + W::size) * f1;
    ff0 += f0 * f0;
    ff1 += f1 * f1;
  }
  ef = lane_sum<T>(ef0 + ef1);
  ff = lane_sum<T>(ff0 + ff1);
  for (; c < d; ++c) {
    const Acc<T> fc = Element<T>::load(f + c);
    ef += Element<T>::load(e + c) * fc;
    ff += fc * fc;
  }
}

template <class A>
struct Cosine {
  bool live;
  A value, norms;  // norms = |e| |f|
};
template <class A>
MMKD_INLINE Cosine<A> cosine(A ee, A ef, A ff) {
  const bool live = ee > 0 && ff > 0;
  const A norms = live ? Num<A>::sqrt(ee) * Num<A>::sqrt(ff) : A(1);
  return {live, live ? ef / norms : A(0), norms};
}

// (1 - cos)^gamma for a vector of rows; a row of length 0 has cosine 0, a NaN row stays NaN.
template <class A>
MMKD_INLINE typename Vec<A>::V scaled_error(typename Vec<A>::V ee, typename Vec<A>::V ef, typename Vec<A>::V ff,
                                            A gamma) {
  using V = typename Vec<A>::V;
  const V zero{}, one = zero + A(1);
  const auto dead = (ee <= zero) | (ff <= zero);
  const V norms = Num<V>::sqrt(ee) * Num<V>::sqrt(ff);
  const V rest = one - (dead ? zero : ef / (dead ? one : norms));
  const V bounded = rest < zero ? zero : rest;
  if (gamma == A(2)) return bounded * bounded;
  V out;
  for (int i = 0; i < Vec<A>::size; ++i) out[i] = raised(bounded[i], gamma);
  return out;
}

template <class T>
double losses_typed(const EmbKDArgs& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  using V = typename Vec<A>::V;
  constexpr int64_t lanes = Vec<A>::size;
  const int64_t m_count = a.num_teachers, d = a.d, wide = 1 + 2 * m_count;
  const A* weights = static_cast<const A*>(a.weights);
  double total = 0;
  for (int64_t i0 = begin; i0 < end; i0 += lanes) {
    const int64_t count = end - i0 < lanes ? end - i0 : lanes;
    const T* e = static_cast<const T*>(a.student) + i0 * d;
    A* stats = static_cast<A*>(a.stats) + i0 * wide;
    A own[lanes] = {};
    for (int64_t i = 0; i < count; ++i) own[i] = stats[i * wide] = dot(e + i * d, e + i * d, d);
    const V ee = Vec<A>::load(own);
    V loss{};
    for (int64_t m = 0; m < m_count; ++m) {
      const T* f = static_cast<const T*>(a.teachers) + (m * a.n + i0) * d;
      A ef[lanes] = {}, ff[lanes] = {};
      for (int64_t i = 0; i < count; ++i) {
        dots(e + i * d, f + i * d, d, ef[i], ff[i]);
        stats[i * wide + 1 + 2 * m] = ef[i];
        stats[i * wide + 2 + 2 * m] = ff[i];
      }
      loss += weights[m] * scaled_error<A>(ee, Vec<A>::load(ef), Vec<A>::load(ff), static_cast<A>(a.gamma));
    }
    for (int64_t i = 0; i < count; ++i) total += static_cast<double>(loss[i]);
  }
  return total;
}

template <class T>
MMKD_INLINE void put(T* out, typename Vec<T>::V v, bool stream) {
  stream ? store_past_caches(out, v) : Vec<T>::store(out, v);
}

// out = p * x + q * y
template <class T>
MMKD_INLINE void blend(T* out, Acc<T> p, const T* x, Acc<T> q, const T* y, int64_t d, bool stream) {
  using W = Vec<T>;
  int64_t c = 0;
  for (; c + W::size <= d; c += W::size) put(out + c, p * W::load(x + c) + q * W::load(y + c), stream);
  for (; c < d; ++c) Element<T>::store(out + c, p * Element<T>::load(x + c) + q * Element<T>::load(y + c));
}

// out = b * e + sum_m a[m] * f^m, each vector of columns written once.
template <class T>
MMKD_INLINE void student_row(T* out, Acc<T> b, const T* e, const Acc<T>* weight, const T* f, int64_t step,
                             int64_t count, int64_t d, bool stream) {
  using W = Vec<T>;
  int64_t c = 0;
  for (; c + W::size <= d; c += W::size) {
    typename W::V s = b * W::load(e + c);
    for (int64_t m = 0; m < count; ++m) s += weight[m] * W::load(f + m * step + c);
    put(out + c, s, stream);
  }
  for (; c < d; ++c) {
    Acc<T> s = b * Element<T>::load(e + c);
    for (int64_t m = 0; m < count; ++m) s += weight[m] * Element<T>::load(f + m * step + c);
    Element<T>::store(out + c, s);
  }
}

constexpr int64_t kTeachers = 16;  // teachers whose coefficients are held at a time

template <class T>
void grads_typed(const EmbKDArgs& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t m_count = a.num_teachers, d = a.d, step = a.n * d;
  const A gamma = static_cast<A>(a.gamma), scale = static_cast<A>(a.scale) * gamma;
  const A* weights = static_cast<const A*>(a.weights);
  for (int64_t i = begin; i < end; ++i) {
    const T* e = static_cast<const T*>(a.student) + i * d;
    const T* f = static_cast<const T*>(a.teachers) + i * d;
    const A* stats = static_cast<const A*>(a.stats) + i * (1 + 2 * m_count);
    A across_e[kTeachers], along_e = 0;
    for (int64_t m = 0; m < m_count; ++m) {
      const Cosine<A> cos = cosine(stats[0], stats[1 + 2 * m], stats[2 + 2 * m]);
      const A rest = 1 - cos.value;
      const A slope = cos.live && !(rest < 0) ? -scale * weights[m] * raised(rest, gamma - 1) : A(0);  // d loss / d cos
      const A across = slope / cos.norms;
      along_e -= cos.live ? slope * cos.value / stats[0] : A(0);
      if (a.grad_teachers) {
        const A along_f = cos.live ? -slope * cos.value / stats[2 + 2 * m] : A(0);
        blend(static_cast<T*>(a.grad_teachers) + i * d + m * step, across, e, along_f, f + m * step, d, a.stream);
      }
      across_e[m] = across;
    }
    if (a.grad_student) {
      student_row(static_cast<T*>(a.grad_student) + i * d, along_e, e, across_e, f, step, m_count, d, a.stream);
    }
  }
  if (a.stream) finish_streams();
}

}  // namespace

#define MMKD_BY_TYPE(function)                \
  switch (a.dtype) {                          \
    case DType::f32:                          \
      return function<float>(a, begin, end);  \
    case DType::f64:                          \
      return function<double>(a, begin, end); \
    case DType::bf16:                         \
      return function<bf16_t>(a, begin, end); \
    default:                                  \
      return function<f16_t>(a, begin, end);  \
  }

double emb_kd_losses(const EmbKDArgs& a, int64_t begin, int64_t end) { MMKD_BY_TYPE(losses_typed) }

void emb_kd_grads(const EmbKDArgs& a, int64_t begin, int64_t end) { MMKD_BY_TYPE(grads_typed) }

}  // namespace MMKD_ISA
}  // namespace mmkd
