// exp, log, log1p and sqrt of a vector, for the loss kernels. Included only by *_kernel.cpp (see vec.h).
#pragma once
#include "cpu/vec.h"
#include "loss_math.h"

namespace mmkd {
namespace MMKD_ISA {

typedef int64_t vi64 __attribute__((vector_size(MMKD_VBYTES)));

// Layout of a number, and how many terms of a series reach its last bit.
template <class V>
struct Format;
template <>
struct Format<vf> {
  typedef vi32 Bits;
  typedef float Scalar;
  static constexpr int mantissa = 23, bias = 127, exp_terms = 7, log_terms = 4;
  static constexpr float round = 0x1.8p23f, lowest = -87.0f;
  static constexpr float ln2_high = 0x1.63p-1f, ln2_low = -0x1.bd0106p-13f;
  static constexpr int32_t fraction = 0x7fffff, one = 0x3f800000, half_root = 0x3504f3;  // fraction of sqrt(2)
};
template <>
struct Format<vd> {
  typedef vi64 Bits;
  typedef double Scalar;
  static constexpr int mantissa = 52, bias = 1023, exp_terms = 13, log_terms = 10;
  static constexpr double round = 0x1.8p52, lowest = -708.0;
  static constexpr double ln2_high = 0x1.62e42fee00000p-1, ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr int64_t fraction = 0xfffffffffffff, one = 0x3ff0000000000000, half_root = 0x6a09e667f3bcd;
};

// e^x for x <= 0; 0 below `lowest`, NaN for NaN.
template <class V>
MMKD_INLINE V exp_vector(V x) {
  using F = Format<V>;
  using Bits = typename F::Bits;
  using S = typename F::Scalar;
  const V bounded = x < F::lowest ? V() + F::lowest : x;
  const V shifted = bounded * S(1.4426950408889634) + F::round;  // the nearest integer sits in the low bits
  const V n = shifted - F::round;
  const V r = (bounded - n * F::ln2_high) - n * F::ln2_low;
  V term = V() + S(1);
#pragma GCC unroll 16
  for (int i = F::exp_terms; i >= 1; --i) term = S(1) + term * (r * (S(1) / S(i)));
  const Bits scale = (reinterpret_cast<Bits>(shifted) + F::bias) << F::mantissa;
  return x < F::lowest ? V() : term * reinterpret_cast<V>(scale);
}

// log x for normal x > 0.
template <class V>
MMKD_INLINE V log_vector(V x) {
  using F = Format<V>;
  using Bits = typename F::Bits;
  using S = typename F::Scalar;
  const Bits u = reinterpret_cast<Bits>(x);
  const Bits up = ((u & F::fraction) > F::half_root) & 1;  // x = m 2^e with m in [sqrt(1/2), sqrt(2)]
  const Bits e = (u >> F::mantissa) - F::bias + up;
  const V m = reinterpret_cast<V>((u & F::fraction) | F::one) * (up ? V() + S(0.5) : V() + S(1));
  const V f = m - S(1), s = f / (m + S(1)), s2 = s * s;
  V series = V();
#pragma GCC unroll 16
  for (int i = F::log_terms; i >= 1; --i) series = s2 * (S(2) / S(2 * i + 1) + series);
  const V n = __builtin_convertvector(e, V);
  const V small = s * (S(2) + series);
  const V out = n * F::ln2_high + (small + n * F::ln2_low);
  return x == x ? out : x;
}

template <class V>
struct VectorNum {
  static MMKD_INLINE V exp(V x) { return exp_vector(x); }
  static MMKD_INLINE V log(V x) { return log_vector(x); }
  // For 0 <= x <= 1: the rounding of 1 + x is put back to first order.
  static MMKD_INLINE V log1p(V x) {
    const V u = x + 1;
    return log_vector(u) + (x - (u - 1)) / u;
  }
  static MMKD_INLINE V sqrt(V x) {
    V out;
    for (unsigned i = 0; i < sizeof(V) / sizeof x[0]; ++i) out[i] = Num<typename Format<V>::Scalar>::sqrt(x[i]);
    return out;
  }
};
template <>
struct Num<vf> : VectorNum<vf> {
#if defined(MMKD_ISA_avx512)
  static MMKD_INLINE vf sqrt(vf x) { return reinterpret_cast<vf>(_mm512_sqrt_ps(reinterpret_cast<__m512>(x))); }
#elif defined(MMKD_ISA_avx2)
  static MMKD_INLINE vf sqrt(vf x) { return reinterpret_cast<vf>(_mm256_sqrt_ps(reinterpret_cast<__m256>(x))); }
#endif
};
template <>
struct Num<vd> : VectorNum<vd> {};

}  // namespace MMKD_ISA
}  // namespace mmkd
