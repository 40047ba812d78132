#include "cpu/topk_kernel.h"

#include "cpu/vec.h"

namespace mmkd {
namespace MMKD_ISA {
namespace {

// Bit i: lane i is above the floor. NaN never is.
MMKD_INLINE uint32_t lanes_above(vf v, float floor) {
#if defined(MMKD_ISA_avx512)
  return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(v), _mm512_set1_ps(floor), _CMP_GT_OQ);
#elif defined(MMKD_ISA_avx2)
  return _mm256_movemask_ps(_mm256_cmp_ps(reinterpret_cast<__m256>(v), _mm256_set1_ps(floor), _CMP_GT_OQ));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kF32; ++i) bits |= static_cast<uint32_t>(v[i] > floor) << i;
  return bits;
#endif
}
MMKD_INLINE uint32_t lanes_above(vd v, double floor) {
#if defined(MMKD_ISA_avx512)
  return _mm512_cmp_pd_mask(reinterpret_cast<__m512d>(v), _mm512_set1_pd(floor), _CMP_GT_OQ);
#elif defined(MMKD_ISA_avx2)
  return _mm256_movemask_pd(_mm256_cmp_pd(reinterpret_cast<__m256d>(v), _mm256_set1_pd(floor), _CMP_GT_OQ));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kF32 / 2; ++i) bits |= static_cast<uint32_t>(v[i] > floor) << i;
  return bits;
#endif
}

// Appends a vector's lanes of `above`.
template <class A>
MMKD_INLINE Candidate<A>* append(Candidate<A>* to, typename Vec<A>::V scores, uint32_t above, int64_t first) {
  A score[Vec<A>::size];
  Vec<A>::store(score, scores);
  for (; above; above &= above - 1) {
    const int lane = __builtin_ctz(above);
    *to++ = Candidate<A>::of(score[lane], first + lane);
  }
  return to;
}
#if defined(MMKD_ISA_avx512)
// Candidate<float>::of for all lanes, those of `above` moved to the front. Writes whole vectors.
template <>
MMKD_INLINE Candidate<float>* append(Candidate<float>* to, vf scores, uint32_t above, int64_t first) {
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i even = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(8));
  const __mmask16 mask = static_cast<__mmask16>(above);
  const __m512i item = _mm512_maskz_compress_epi32(
      mask, _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int>(static_cast<uint32_t>(first)))));
  const __m512i bits = _mm512_maskz_compress_epi32(mask, reinterpret_cast<__m512i>(scores + 0.0f));
  const __m512i positive = _mm512_andnot_si512(_mm512_srai_epi32(bits, 31), _mm512_set1_epi32(0x7fffffff));
  const __m512i falling = _mm512_xor_si512(bits, positive);
  _mm512_storeu_si512(to, _mm512_permutex2var_epi32(item, even, falling));
  _mm512_storeu_si512(to + 8, _mm512_permutex2var_epi32(item, odd, falling));
  return to + __builtin_popcount(above);
}
#endif

// Twelve accumulators of two vectors per user stay in registers over the whole inner product.
template <class A>
bool tile_typed(TopkTile& t) {
  using W = Vec<A>;
  using V = typename W::V;
  constexpr int width = 2 * W::size;
  const A* panel = static_cast<const A*>(t.panel);
  const A* u[kTileUsers];
  for (int r = 0; r < kTileUsers; ++r) u[r] = static_cast<const A*>(t.users[r]);
  V low[kTileUsers] = {}, high[kTileUsers] = {};
  for (int64_t c = 0; c < t.d; ++c) {
    const V p0 = W::load(panel + c * width), p1 = W::load(panel + c * width + W::size);
#pragma GCC unroll 8
    for (int r = 0; r < kTileUsers; ++r) {
      const A x = u[r][c];
      low[r] += x * p0;
      high[r] += x * p1;
    }
  }
  const A* floors = static_cast<const A*>(t.floors);
  const uint32_t there_low = t.there & ((1u << W::size) - 1), there_high = t.there >> W::size;
  uint32_t above[kTileUsers], above_high[kTileUsers], any = 0;
#pragma GCC unroll 8
  for (int r = 0; r < kTileUsers; ++r) {
    above[r] = lanes_above(low[r], floors[r]) & there_low;
    above_high[r] = lanes_above(high[r], floors[r]) & there_high;
    any |= above[r] | above_high[r];
  }
  if (!any) return false;
  // Every user, whether he has any or not: who has is not to be foreseen.
#pragma GCC unroll 8
  for (int r = 0; r < kTileUsers; ++r) {
    Candidate<A>* to = append<A>(static_cast<Candidate<A>*>(t.kept[r]), low[r], above[r], t.first);
    t.kept[r] = append<A>(to, high[r], above_high[r], t.first + W::size);
  }
  return true;
}

}  // namespace

int topk_panel_width(bool f64) { return 2 * (f64 ? Vec<double>::size : Vec<float>::size); }

bool topk_tile(TopkTile& t) { return t.f64 ? tile_typed<double>(t) : tile_typed<float>(t); }

}  // namespace MMKD_ISA
}  // namespace mmkd
