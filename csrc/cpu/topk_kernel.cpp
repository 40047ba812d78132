#include "cpu/topk_kernel.h"

#include "cpu/vec.h"

namespace mmkd {
namespace MMKD_ISA {
namespace {

// Twelve accumulators of two vectors per user stay in registers over the whole inner product.
template <class A>
uint32_t tile_typed(const TopkTile& t) {
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
  uint32_t hit = 0;
#pragma GCC unroll 8
  for (int r = 0; r < kTileUsers; ++r) {
    const auto above = (low[r] > floors[r]) | (high[r] > floors[r]);  // NaN is never above
    bool any = false;
    int64_t words[MMKD_VBYTES / 8];
    memcpy(words, &above, sizeof words);
    for (unsigned i = 0; i < MMKD_VBYTES / 8; ++i) any |= words[i] != 0;
    if (!any) continue;
    A* out = static_cast<A*>(t.scores) + r * width;
    W::store(out, low[r]);
    W::store(out + W::size, high[r]);
    hit |= 1u << r;
  }
  return hit;
}

}  // namespace

int topk_panel_width(bool f64) { return 2 * (f64 ? Vec<double>::size : Vec<float>::size); }

uint32_t topk_tile(const TopkTile& t) { return t.f64 ? tile_typed<double>(t) : tile_typed<float>(t); }

}  // namespace MMKD_ISA
}  // namespace mmkd
