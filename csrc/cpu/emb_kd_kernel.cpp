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
MMKD_INLINE void products(const T* e, const T* f, int64_t d, Acc<T>& ef, Acc<T>& ff) {
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

// A vector of rows. A row of length 0 has cosine 0 and no gradient; a NaN row stays NaN.
template <class A>
struct Cosines {
  using V = typename Vec<A>::V;
  V norms, value, error;           // |e| |f| (1 where that is 0), cos, max(1 - cos, 0)
  decltype(V{} < V{}) dead, past;  // no cosine; 1 - cos < 0
  MMKD_INLINE Cosines(V ee, V ef, V ff) {
    const V zero{}, one = zero + A(1);
    dead = (ee <= zero) | (ff <= zero);
    norms = dead ? one : Num<V>::sqrt(ee) * Num<V>::sqrt(ff);
    value = dead ? zero : ef / norms;
    const V rest = one - value;
    past = rest < zero;
    error = past ? zero : rest;
  }
};

template <class A>
MMKD_INLINE typename Vec<A>::V all_raised(typename Vec<A>::V v, A gamma) {
  if (gamma == A(2)) return v * v;
  if (gamma == A(1)) return v;
  typename Vec<A>::V out;
  for (int i = 0; i < Vec<A>::size; ++i) out[i] = raised(v[i], gamma);
  return out;
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

// out = b * e + sum_m a[m * every] * f^m, each vector of columns written once.
template <class T>
MMKD_INLINE void student_row(T* out, Acc<T> b, const T* e, const Acc<T>* weight, int64_t every, const T* f,
                             int64_t step, int64_t count, int64_t d, bool stream) {
  using W = Vec<T>;
  int64_t c = 0;
  for (; c + W::size <= d; c += W::size) {
    typename W::V s = b * W::load(e + c);
    for (int64_t m = 0; m < count; ++m) s += weight[m * every] * W::load(f + m * step + c);
    put(out + c, s, stream);
  }
  for (; c < d; ++c) {
    Acc<T> s = b * Element<T>::load(e + c);
    for (int64_t m = 0; m < count; ++m) s += weight[m * every] * Element<T>::load(f + m * step + c);
    Element<T>::store(out + c, s);
  }
}

// What is known of a vector of rows once they were read: <e, e>, then <e, f> and <f, f> of each teacher.
template <class A>
struct Stats {
  static constexpr int64_t lanes = Vec<A>::size;
  A ee[lanes], ef[kMostTeachers * lanes], ff[kMostTeachers * lanes];

  MMKD_INLINE explicit Stats(int64_t m_count) {  // rows that are not there are zero
    const typename Vec<A>::V zero{};
    Vec<A>::store(ee, zero);
    for (int64_t m = 0; m < m_count; ++m) {
      Vec<A>::store(ef + m * lanes, zero);
      Vec<A>::store(ff + m * lanes, zero);
    }
  }
  MMKD_INLINE Cosines<A> cosines(int64_t m) const {
    return {Vec<A>::load(ee), Vec<A>::load(ef + m * lanes), Vec<A>::load(ff + m * lanes)};
  }
  // The same, row after row.
  MMKD_INLINE void save(A* rows, int64_t count, int64_t m_count) const {
    for (int64_t i = 0; i < count; ++i) {
      *rows++ = ee[i];
      for (int64_t m = 0; m < m_count; ++m) {
        *rows++ = ef[m * lanes + i];
        *rows++ = ff[m * lanes + i];
      }
    }
  }
  MMKD_INLINE void restore(const A* rows, int64_t count, int64_t m_count) {
    for (int64_t i = 0; i < count; ++i) {
      ee[i] = *rows++;
      for (int64_t m = 0; m < m_count; ++m) {
        ef[m * lanes + i] = *rows++;
        ff[m * lanes + i] = *rows++;
      }
    }
  }
};

// Gradients of rows [first, first + count).
template <class T>
MMKD_INLINE void grad_rows(const EmbKDArgs& a, int64_t first, int64_t count, const Stats<Acc<T>>& stats) {
  using A = Acc<T>;
  using V = typename Vec<A>::V;
  constexpr int64_t lanes = Vec<A>::size;
  const int64_t m_count = a.num_teachers, d = a.d, step = a.n * d;
  const A gamma = static_cast<A>(a.gamma), scale = static_cast<A>(a.scale) * gamma;
  const A* weights = static_cast<const A*>(a.weights);
  const T* e = static_cast<const T*>(a.student) + first * d;
  const T* f = static_cast<const T*>(a.teachers) + first * d;
  A across[kMostTeachers * lanes], along_e[lanes], along_f[lanes];
  const V zero{};
  V shrink{};
  for (int64_t m = 0; m < m_count; ++m) {
    const Cosines<A> cos = stats.cosines(m);
    const V slope =
        cos.dead | cos.past ? zero : -scale * weights[m] * all_raised<A>(cos.error, gamma - 1);  // d loss / d cos
    Vec<A>::store(across + m * lanes, slope / cos.norms);
    shrink -= cos.dead ? zero : slope * cos.value / Vec<A>::load(stats.ee);
    if (!a.grad_teachers) continue;
    Vec<A>::store(along_f, cos.dead ? zero : -slope * cos.value / Vec<A>::load(stats.ff + m * lanes));
    T* out = static_cast<T*>(a.grad_teachers) + m * step + first * d;
    for (int64_t i = 0; i < count; ++i) {
      blend(out + i * d, across[m * lanes + i], e + i * d, along_f[i], f + m * step + i * d, d, a.stream);
    }
  }
  if (!a.grad_student) return;
  Vec<A>::store(along_e, shrink);
  T* out = static_cast<T*>(a.grad_student) + first * d;
  for (int64_t i = 0; i < count; ++i) {
    student_row(out + i * d, along_e[i], e + i * d, across + i, lanes, f + i * d, step, m_count, d, a.stream);
  }
}

template <class T>
void grads_typed(const EmbKDArgs& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  constexpr int64_t lanes = Vec<A>::size;
  const int64_t wide = 1 + 2 * a.num_teachers;
  for (int64_t first = begin; first < end; first += lanes) {
    const int64_t count = end - first < lanes ? end - first : lanes;
    Stats<A> stats(a.num_teachers);
    stats.restore(static_cast<const A*>(a.stats) + first * wide, count, a.num_teachers);
    grad_rows<T>(a, first, count, stats);
  }
  if (a.stream) finish_streams();
}

template <class T>
double losses_typed(const EmbKDArgs& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  using V = typename Vec<A>::V;
  constexpr int64_t lanes = Vec<A>::size;
  const int64_t m_count = a.num_teachers, d = a.d, wide = 1 + 2 * m_count;
  const A* weights = static_cast<const A*>(a.weights);
  const bool wanted = a.grad_student || a.grad_teachers;
  double total = 0;
  for (int64_t first = begin; first < end; first += lanes) {
    const int64_t count = end - first < lanes ? end - first : lanes;
    const T* e = static_cast<const T*>(a.student) + first * d;
    Stats<A> stats(m_count);
    for (int64_t i = 0; i < count; ++i) stats.ee[i] = dot(e + i * d, e + i * d, d);
    V loss{};
    for (int64_t m = 0; m < m_count; ++m) {
      const T* f = static_cast<const T*>(a.teachers) + (m * a.n + first) * d;
      for (int64_t i = 0; i < count; ++i) {
        products(e + i * d, f + i * d, d, stats.ef[m * lanes + i], stats.ff[m * lanes + i]);
      }
      loss += weights[m] * all_raised<A>(stats.cosines(m).error, static_cast<A>(a.gamma));
    }
    A losses[lanes];
    Vec<A>::store(losses, loss);
    for (int64_t i = 0; i < count; ++i) total += static_cast<double>(losses[i]);
    stats.save(static_cast<A*>(a.stats) + first * wide, count, m_count);
    if (wanted) grad_rows<T>(a, first, count, stats);  // while the rows are in the first cache
  }
  if (wanted && a.stream) finish_streams();
  return total;
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
