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
  uint32_t any = 0;
#pragma GCC unroll 8
  for (int r = 0; r < kTileUsers; ++r) {
    const uint32_t above = lanes_above(low[r], floors[r]) | lanes_above(high[r], floors[r]) << W::size;
    t.above[r] = above;
    any |= above;
    if (!above) continue;
    A* out = static_cast<A*>(t.scores) + r * width;
    W::store(out, low[r]);
    W::store(out + W::size, high[r]);
  }
  return any != 0;
}

}  // namespace

int topk_panel_width(bool f64) { return 2 * (f64 ? Vec<double>::size : Vec<float>::size); }

bool topk_tile(TopkTile& t) { return t.f64 ? tile_typed<double>(t) : tile_typed<float>(t); }

}  // namespace MMKD_ISA
}  // namespace mmkd
