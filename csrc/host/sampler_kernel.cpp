#include "host/sampler_kernel.h"

#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(MMKD_ISA_avx512)
#define MMKD_VBYTES 64
#elif defined(MMKD_ISA_avx2)
#define MMKD_VBYTES 32
#else
#define MMKD_VBYTES 16
#endif
#define MMKD_INLINE inline __attribute__((always_inline))

// No std:: templates here (see cpu/vec.h).
namespace mmkd {
namespace MMKD_ISA {
namespace {

using host::DrawArgs;
using host::kDrawn;
using host::kLine;
using host::UserRow;

typedef uint64_t Wide __attribute__((vector_size(MMKD_VBYTES)));
constexpr int kWide = MMKD_VBYTES / 8;
constexpr int kChains = MMKD_VBYTES == 64 ? 4 : 2;  // independent vectors in flight, all in registers
constexpr int kGroup = 16;                          // negatives of a sample that are compared with its row together
constexpr uint32_t kLongRow = 512;  // from here on a search per negative beats comparing with every item
constexpr uint32_t kNegative = 1u << 31;
constexpr uint64_t kHigh = 0xFFFFFFFF00000000u;

struct Row {
  const uint32_t* item;
  uint32_t size;
};

// (low 32 bits of each lane) * m.
MMKD_INLINE Wide times(Wide a, uint32_t m) {
#if defined(MMKD_ISA_avx512)
  return (Wide)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
#elif defined(MMKD_ISA_avx2)
  return (Wide)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
#elif defined(__SSE2__)
  return (Wide)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(m));
#else
  return (a & ~kHigh) * m;
#endif
}
MMKD_INLINE uint64_t times(uint64_t a, uint32_t m) { return (a & ~kHigh) * m; }

// Philox4x32-10. A word is the low half of its 64 bits; the high half holds whatever is left there, and is never read.
template <int N, class V>
MMKD_INLINE void philox(V (&w)[4][N], uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const V a = times(w[0][n], 0xD2511F53u), b = times(w[2][n], 0xCD9E8D57u);
      w[0][n] = (b >> 32) ^ w[1][n] ^ static_cast<uint64_t>(k0);
      w[1][n] = b;
      w[2][n] = (a >> 32) ^ w[3][n] ^ static_cast<uint64_t>(k1);
      w[3][n] = a;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// use(n, w0, w1, w2, w3) gets the words of the counters (first + n .. first + n + kWide - 1, c1, step, epoch).
template <class F>
MMKD_INLINE void words(const DrawArgs& a, uint32_t first, uint32_t c1, const F& use) {
  Wide iota;
  for (int l = 0; l < kWide; ++l) iota[l] = static_cast<uint64_t>(l);
  for (int n = 0; n < kDrawn; n += kChains * kWide) {
    Wide w[4][kChains];
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) {
      w[0][c] = iota + static_cast<uint64_t>(first + static_cast<uint32_t>(n + c * kWide));
      w[1][c] = Wide{} + c1;
      w[2][c] = Wide{} + a.step;
      w[3][c] = Wide{} + a.epoch;
    }
    philox(w, a.seed);
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) use(n + c * kWide, w[0][c], w[1][c], w[2][c], w[3][c]);
  }
}

MMKD_INLINE uint32_t below(uint64_t word, uint32_t bound) { return static_cast<uint32_t>(times(word, bound) >> 32); }

// How many of the row are below `item`.
MMKD_INLINE uint32_t rank(const Row& row, uint32_t item) {
  uint32_t lo = 0, hi = row.size;
  while (lo < hi) {
    const uint32_t mid = lo + (hi - lo) / 2;
    if (row.item[mid] < item) {
      lo = mid + 1;
    } else {
      hi = mid;
    }
  }
  return lo;
}

MMKD_INLINE bool contains(const Row& row, uint32_t item) {
  const uint32_t r = rank(row, item);
  return r < row.size && row.item[r] == item;
}

// The n-th (from 0) of the numbers that are not in the row: n plus how many of the row come before it.
uint32_t nth_other(const Row& row, uint32_t n) {
  uint32_t lo = 0, hi = row.size;
  while (lo < hi) {
    const uint32_t mid = lo + (hi - lo) / 2;
    if (row.item[mid] - mid <= n) {
      lo = mid + 1;
    } else {
      hi = mid;
    }
  }
  return n + lo;
}

// Negative j of a sample whose first draw was refused.
uint32_t redraw(const DrawArgs& a, uint32_t sample, uint32_t j, const Row& row) {
  for (uint32_t r = 1;; ++r) {
    uint64_t w[4][1] = {{sample}, {kNegative | r << 16 | j >> 2}, {a.step}, {a.epoch}};
    philox(w, a.seed);
    const uint64_t word = w[j & 3][0];
    if (r == a.rounds) return nth_other(row, below(word, a.num_items - row.size));
    const uint32_t item = below(word, a.num_items);
    if (!contains(row, item)) return item;
  }
}

// False only if none of item[0..n) is in the row, n a multiple of 4. Rows are read by whole cache lines, so that most
// take the same number of steps.
MMKD_INLINE bool may_contain(const Row& row, const uint32_t* item, int n) {
  if (row.size >= kLongRow) return true;
#if defined(MMKD_ISA_avx512)
  __mmask16 hit = 0;
  for (uint32_t i = 0; i < row.size; i += kLine) {
    const __m512i mine = _mm512_loadu_si512(row.item + i);
    for (int j = 0; j < n; j += 4) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        hit |= _mm512_cmpeq_epi32_mask(mine, _mm512_set1_epi32(static_cast<int>(item[j + k])));
      }
    }
  }
  return hit != 0;
#else
  constexpr uint32_t lanes = MMKD_VBYTES / 4;
  typedef uint32_t Items __attribute__((vector_size(MMKD_VBYTES)));
  Items hit = {};
  for (uint32_t i = 0; i < row.size; i += lanes) {
    Items mine;
    memcpy(&mine, row.item + i, sizeof mine);
    for (int j = 0; j < n; j += 4) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) hit |= (Items)(mine == item[j + k]);
    }
  }
  uint64_t parts[MMKD_VBYTES / 8], any = 0;
  memcpy(parts, &hit, sizeof hit);
  for (int i = 0; i < MMKD_VBYTES / 8; ++i) any |= parts[i];
  return any != 0;
#endif
}

MMKD_INLINE void widen(int64_t* out, const uint32_t* item, int n) {
#if defined(MMKD_ISA_avx512)
  const __m512i all = _mm512_loadu_si512(item);
  const __mmask16 wanted = static_cast<__mmask16>((1u << n) - 1);
  _mm512_mask_storeu_epi64(out, static_cast<__mmask8>(wanted), _mm512_cvtepu32_epi64(_mm512_castsi512_si256(all)));
  _mm512_mask_storeu_epi64(out + 8, static_cast<__mmask8>(wanted >> 8),
                           _mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64(all, 1)));
#else
  for (int j = 0; j < n; ++j) out[j] = item[j];
#endif
}

// out[l * stride ..] = the 128 bits {even[l], odd[l]} for each lane.
MMKD_INLINE void interleave(Wide even, Wide odd, uint32_t* out, int stride) {
  Wide low, high;  // of each 128 bits
  for (int l = 0; l < kWide; l += 2) {
    low[l] = l;
    low[l + 1] = l + kWide;
    high[l] = l + 1;
    high[l + 1] = l + 1 + kWide;
  }
  low = __builtin_shuffle(even, odd, low);
  high = __builtin_shuffle(even, odd, high);
  for (int l = 0; l < kWide; l += 2) {
    memcpy(out + l * stride, reinterpret_cast<const char*>(&low) + 8 * l, 16);
    memcpy(out + (l + 1) * stride, reinterpret_cast<const char*>(&high) + 8 * l, 16);
  }
}

// A block of samples on its way: find_users, then find_rows, then draw_positives and draw_negatives, each a block later
// than the one before, so that what it reads has arrived in the cache.
struct Block {
  int64_t first, count;
  uint64_t words[2][kDrawn];  // for user and positive
  const UserRow* who[kDrawn];
  Row rows[kDrawn];
  const uint32_t* pos[kDrawn];
};

MMKD_INLINE void find_users(const DrawArgs& a, Block& b, int64_t first, int64_t end) {
  b.first = first;
  b.count = end - first < kDrawn ? end - first : kDrawn;
  words(a, static_cast<uint32_t>(first), 0, [&](int n, Wide w0, Wide w1, Wide, Wide) {
    memcpy(b.words[0] + n, &w0, sizeof w0);
    memcpy(b.words[1] + n, &w1, sizeof w1);
  });
  for (int64_t s = 0; s < b.count; ++s) {
    b.who[s] = a.rows + below(b.words[0][s], a.num_rows);
    __builtin_prefetch(b.who[s]);
  }
}

MMKD_INLINE void find_rows(const DrawArgs& a, Block& b) {
  for (int64_t s = 0; s < b.count; ++s) {
    const UserRow r = *b.who[s];
    a.users[b.first + s] = r.user;
    b.rows[s] = {a.item + r.begin, r.size};
    b.pos[s] = b.rows[s].item + below(b.words[1][s], r.size);
    __builtin_prefetch(b.pos[s]);
    const uint32_t near = r.size < 8 * kLine ? r.size : 8 * kLine;
    for (uint32_t i = 0; i < near; i += kLine) __builtin_prefetch(b.rows[s].item + i);
  }
}

MMKD_INLINE void draw_positives(const DrawArgs& a, const Block& b) {
  const int64_t width = a.num_negatives + 1;
  for (int64_t s = 0; s < b.count; ++s) a.candidates[(b.first + s) * width] = *b.pos[s];
}

// Negatives g .. g + n - 1, n <= kGroup.
MMKD_INLINE void draw_negatives(const DrawArgs& a, const Block& b, int64_t g, int n) {
  const uint32_t first = static_cast<uint32_t>(b.first);
  uint32_t items[kDrawn][kGroup];
  for (int q = 0; 4 * q < n; ++q) {
    words(a, first, kNegative | static_cast<uint32_t>(g / 4 + q), [&](int l, Wide w0, Wide w1, Wide w2, Wide w3) {
      const Wide even = times(w0, a.num_items) >> 32 | (times(w1, a.num_items) & kHigh);
      const Wide odd = times(w2, a.num_items) >> 32 | (times(w3, a.num_items) & kHigh);
      interleave(even, odd, &items[l][4 * q], kGroup);
    });
  }
  for (int64_t s = 0; s < b.count; ++s) {
    const uint32_t* item = items[s];
    int64_t* out = a.candidates + (b.first + s) * (a.num_negatives + 1) + 1 + g;
    widen(out, item, n);
    if (!may_contain(b.rows[s], item, (n + 3) & ~3)) continue;
    for (int j = 0; j < n; ++j) {
      if (!contains(b.rows[s], item[j])) continue;
      out[j] = redraw(a, first + static_cast<uint32_t>(s), static_cast<uint32_t>(g + j), b.rows[s]);
    }
  }
}

}  // namespace

void draw(const DrawArgs& a, int64_t begin, int64_t end) {
  Block ring[3];
  const int64_t blocks = (end - begin + kDrawn - 1) / kDrawn;
  for (int64_t b = 0; b < blocks + 2; ++b) {
    if (b < blocks) find_users(a, ring[b % 3], begin + b * kDrawn, end);
    if (b >= 1 && b <= blocks) find_rows(a, ring[(b - 1) % 3]);
    if (b < 2) continue;
    const Block& ready = ring[(b - 2) % 3];
    draw_positives(a, ready);
    for (int64_t g = 0; g < a.num_negatives; g += kGroup) {
      const int64_t left = a.num_negatives - g;
      draw_negatives(a, ready, g, static_cast<int>(left < kGroup ? left : kGroup));
    }
  }
}

}  // namespace MMKD_ISA
}  // namespace mmkd
