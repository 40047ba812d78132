// Vectors for the kernels: GCC/Clang vector extensions, as wide as the instruction set this file is compiled for.
// Included only by *_kernel.cpp, always inside namespace mmkd::MMKD_ISA. No std:: templates here or in the kernels:
// a shared inline function compiled for AVX-512 could be the one the linker keeps for every processor.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "cpu/dtype.h"

#if defined(MMKD_ISA_avx512)
#define MMKD_VBYTES 64
#elif defined(MMKD_ISA_avx2)
#define MMKD_VBYTES 32
#else
#define MMKD_VBYTES 16
#endif
#define MMKD_INLINE inline __attribute__((always_inline))

namespace mmkd {
namespace MMKD_ISA {

typedef float vf __attribute__((vector_size(MMKD_VBYTES)));
typedef double vd __attribute__((vector_size(MMKD_VBYTES)));
typedef uint32_t vu32 __attribute__((vector_size(MMKD_VBYTES)));
typedef int32_t vi32 __attribute__((vector_size(MMKD_VBYTES)));
typedef uint16_t vu16h __attribute__((vector_size(MMKD_VBYTES / 2)));
constexpr int kF32 = MMKD_VBYTES / 4;  // floats in a vector

MMKD_INLINE float bits_to_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
MMKD_INLINE uint32_t float_to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

// float16 by bits, for processors without F16C; rounds to nearest even, keeps subnormals, Inf and NaN.
inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, fraction = h & 1023u;
  if (exponent == 31u) return bits_to_float(sign | 0x7f800000u | (fraction << 13));
  if (exponent != 0u) return bits_to_float(sign | ((exponent + 112u) << 23) | (fraction << 13));
  const float tiny = static_cast<float>(fraction) * 0x1p-24f;
  return sign ? -tiny : tiny;
}
inline uint16_t float_to_half(float f) {
  const uint32_t u = float_to_bits(f), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (a >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds past the largest half
  if (a < 0x38800000u) {                                               // subnormal half: let the FPU round
    const float shifted = bits_to_float(a) + 0.5f;
    return static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13));
}

// Scalar load/store of every element type; `Acc` is the type sums are kept in.
template <class T>
struct Element;
template <>
struct Element<float> {
  using Acc = float;
  static MMKD_INLINE float load(const float* p) { return *p; }
  static MMKD_INLINE void store(float* p, float v) { *p = v; }
};
template <>
struct Element<double> {
  using Acc = double;
  static MMKD_INLINE double load(const double* p) { return *p; }
  static MMKD_INLINE void store(double* p, double v) { *p = v; }
};
template <>
struct Element<bf16_t> {
  using Acc = float;
  static MMKD_INLINE float load(const bf16_t* p) { return bits_to_float(static_cast<uint32_t>(p->bits) << 16); }
  static MMKD_INLINE void store(bf16_t* p, float v) {
    const uint32_t u = float_to_bits(v);
    p->bits = v != v ? 0x7fc0u : static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
};
template <>
struct Element<f16_t> {
  using Acc = float;
  static MMKD_INLINE float load(const f16_t* p) { return half_to_float(p->bits); }
  static MMKD_INLINE void store(f16_t* p, float v) { p->bits = float_to_half(v); }
};

// One vector of `size` accumulators. load/store convert from and to the element type.
template <class T>
struct Vec;
template <>
struct Vec<float> {
  typedef vf V;
  static constexpr int size = kF32;
  static MMKD_INLINE V load(const float* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static MMKD_INLINE void store(float* p, V v) { memcpy(p, &v, sizeof v); }
};
template <>
struct Vec<double> {
  typedef vd V;
  static constexpr int size = MMKD_VBYTES / 8;
  static MMKD_INLINE V load(const double* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static MMKD_INLINE void store(double* p, V v) { memcpy(p, &v, sizeof v); }
};
template <>
struct Vec<bf16_t> {
  typedef vf V;
  static constexpr int size = kF32;
  static MMKD_INLINE V load(const bf16_t* p) {
    // The widening load by hand: convertvector becomes five instructions where one does it.
#if defined(MMKD_ISA_avx512)
    const __m512i u = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return reinterpret_cast<V>(_mm512_slli_epi32(u, 16));
#elif defined(MMKD_ISA_avx2)
    const __m256i u = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return reinterpret_cast<V>(_mm256_slli_epi32(u, 16));
#else
    vu16h h;
    memcpy(&h, p, sizeof h);
    return reinterpret_cast<V>(__builtin_convertvector(h, vu32) << 16);
#endif
  }
  static MMKD_INLINE void store(bf16_t* p, V v) {
    const vu32 u = reinterpret_cast<vu32>(v);
    const vu32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const vi32 nan = v != v;
    const vu32 out = (rounded & ~reinterpret_cast<vu32>(nan)) | (reinterpret_cast<vu32>(nan) & 0x7fc0u);
    const vu16h h = __builtin_convertvector(out, vu16h);
    memcpy(p, &h, sizeof h);
  }
};
template <>
struct Vec<f16_t> {
  typedef vf V;
  static constexpr int size = kF32;
  static MMKD_INLINE V load(const f16_t* p) {
#if defined(MMKD_ISA_avx512)
    return reinterpret_cast<V>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
    return reinterpret_cast<V>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    V v;
    for (int i = 0; i < size; ++i) v[i] = half_to_float(p[i].bits);
    return v;
#endif
  }
  static MMKD_INLINE void store(f16_t* p, V v) {
#if defined(MMKD_ISA_avx512)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(reinterpret_cast<__m512>(v), 0));
#elif defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(reinterpret_cast<__m256>(v), 0));
#else
    for (int i = 0; i < size; ++i) p[i].bits = float_to_half(v[i]);
#endif
  }
};

template <class T>
using Acc = typename Element<T>::Acc;

// Stores a vector at an address aligned to its size without reading the cache line first or keeping it.
template <class T>
MMKD_INLINE void store_past_caches(T* p, typename Vec<T>::V v) {
  Vec<T>::store(p, v);
}
#if defined(MMKD_ISA_avx512)
MMKD_INLINE void store_past_caches(float* p, vf v) { _mm512_stream_ps(p, reinterpret_cast<__m512>(v)); }
#elif defined(MMKD_ISA_avx2)
MMKD_INLINE void store_past_caches(float* p, vf v) { _mm256_stream_ps(p, reinterpret_cast<__m256>(v)); }
#endif
MMKD_INLINE void zero_past_caches(void* p, int64_t bytes) {
#if defined(MMKD_ISA_avx512) || defined(MMKD_ISA_avx2)
  const vf zero = {};
  for (int64_t b = 0; b < bytes; b += MMKD_VBYTES)
    store_past_caches(reinterpret_cast<float*>(static_cast<char*>(p) + b), zero);
#else
  memset(p, 0, bytes);
#endif
}
// Before other threads may read what was stored so.
MMKD_INLINE void finish_streams() {
#if defined(MMKD_ISA_avx512) || defined(MMKD_ISA_avx2)
  _mm_sfence();
#endif
}

// a * b + c, rounded once where the instruction set can: the compiler alone fuses them in one place and not in another.
MMKD_INLINE vf multiply_add(vf a, vf b, vf c) {
#if defined(MMKD_ISA_avx512)
  return reinterpret_cast<vf>(
      _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(MMKD_ISA_avx2)
  return reinterpret_cast<vf>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
  return a * b + c;
#endif
}
MMKD_INLINE vd multiply_add(vd a, vd b, vd c) {
#if defined(MMKD_ISA_avx512)
  return reinterpret_cast<vd>(
      _mm512_fmadd_pd(reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b), reinterpret_cast<__m512d>(c)));
#elif defined(MMKD_ISA_avx2)
  return reinterpret_cast<vd>(
      _mm256_fmadd_pd(reinterpret_cast<__m256d>(a), reinterpret_cast<__m256d>(b), reinterpret_cast<__m256d>(c)));
#else
  return a * b + c;
#endif
}

MMKD_INLINE float multiply_add(float a, float b, float c) {
#if defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
MMKD_INLINE double multiply_add(double a, double b, double c) {
#if defined(__FMA__)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

// Sum of a vector's lanes, in a fixed order: halves are added until one lane is left.
template <class A, class V>
MMKD_INLINE A halves_sum(V v) {
  A lanes[sizeof(V) / sizeof(A)];
  memcpy(lanes, &v, sizeof v);
  for (unsigned n = sizeof(V) / sizeof(A) / 2; n >= 1; n /= 2) {
    for (unsigned i = 0; i < n; ++i) lanes[i] += lanes[i + n];
  }
  return lanes[0];
}
MMKD_INLINE float lanes_added(vf v) {
#if defined(MMKD_ISA_avx512)
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(v));
#elif defined(MMKD_ISA_avx2)
  const __m256 w = reinterpret_cast<__m256>(v);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(w), _mm256_extractf128_ps(w, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  return halves_sum<float>(v);
#endif
}
MMKD_INLINE double lanes_added(vd v) {
#if defined(MMKD_ISA_avx512)
  return _mm512_reduce_add_pd(reinterpret_cast<__m512d>(v));
#else
  return halves_sum<double>(v);
#endif
}
template <class T>
MMKD_INLINE Acc<T> lane_sum(typename Vec<T>::V v) {
  return lanes_added(v);
}

// Inner product of two rows of length d. Four chains hide the latency of the multiply-add.
template <class T>
MMKD_INLINE Acc<T> dot(const T* a, const T* b, int64_t d) {
  using W = Vec<T>;
  typename W::V s0{}, s1{}, s2{}, s3{};
  int64_t c = 0;
  for (; c + 4 * W::size <= d; c += 4 * W::size) {
    s0 += W::load(a + c) * W::load(b + c);
    s1 += W::load(a + c + W::size) * W::load(b + c + W::size);
    s2 += W::load(a + c + 2 * W::size) * W::load(b + c + 2 * W::size);
    s3 += W::load(a + c + 3 * W::size) * W::load(b + c + 3 * W::size);
  }
  for (; c + W::size <= d; c += W::size) s0 += W::load(a + c) * W::load(b + c);
  Acc<T> sum = lane_sum<T>((s0 + s1) + (s2 + s3));
  for (; c < d; ++c) sum += Element<T>::load(a + c) * Element<T>::load(b + c);
  return sum;
}

// The first 512 bytes of a row, on their way into the first-level cache, or (kLevel 2) the second.
template <int kLevel = 3, class T>
MMKD_INLINE void prefetch_row(const T* row, int64_t d) {
  const char* p = reinterpret_cast<const char*>(row);
  for (int64_t b = 0; b < d * static_cast<int64_t>(sizeof(T)) && b < 512; b += 64) __builtin_prefetch(p + b, 0, kLevel);
}

// Whether every index lies in [0, bound).
MMKD_INLINE bool in_range(const int64_t* index, int64_t n, int64_t bound) {
  uint64_t worst = 0;
  for (int64_t i = 0; i < n; ++i)
    worst = static_cast<uint64_t>(index[i]) > worst ? static_cast<uint64_t>(index[i]) : worst;
  return n == 0 || worst < static_cast<uint64_t>(bound);
}

}  // namespace MMKD_ISA
}  // namespace mmkd
