#include "host/compact_kernel.h"

#define MMKD_INLINE inline __attribute__((always_inline))

// No std:: templates here (see cpu/vec.h). A kernel for its popcnt and tzcnt, which plain x86-64 has not.
namespace mmkd {
namespace MMKD_ISA {
namespace {

using host::BatchView;
using host::Filling;
using host::Localised;
using host::NodeBits;

MMKD_INLINE void mark(uint64_t* bits, int64_t node) { bits[node >> 6] |= uint64_t{1} << (node & 63); }

// How many marked nodes are below `node`.
MMKD_INLINE int64_t position(const NodeBits& bits, int64_t node) {
  const uint64_t below = (uint64_t{1} << (node & 63)) - 1;
  return bits.rank[node >> 6] + __builtin_popcountll(bits.all[node >> 6] & below);
}

// Marked nodes from `from` on, as long as they are below `until`.
MMKD_INLINE int64_t* listed(const uint64_t* bits, int64_t from, int64_t until, int64_t* out) {
  for (int64_t w = from >> 6; w << 6 < until; ++w) {
    uint64_t left = bits[w];
    if (w == from >> 6) left &= ~uint64_t{0} << (from & 63);
    if (until - (w << 6) < 64) left &= (uint64_t{1} << (until & 63)) - 1;
    for (; left; left &= left - 1) *out++ = (w << 6) + __builtin_ctzll(left);
  }
  return out;
}

// first, first + 1, ..., first + size - 1, first, ...
MMKD_INLINE int64_t* around(int64_t first, int64_t size, int64_t count, int64_t* out) {
  for (int64_t i = 0, at = 0; i < count; ++i) {
    *out++ = first + at;
    at = at + 1 == size ? 0 : at + 1;
  }
  return out;
}

}  // namespace

int64_t mark_nodes(const BatchView& b, const NodeBits& bits) {
  for (int64_t i = 0; i < b.size; ++i) {
    const int64_t* row = b.candidates + i * b.width;
    mark(bits.touched, b.users[i]);
    for (int64_t k = 0; k < b.width && k < 2; ++k) mark(bits.touched, b.num_users + row[k]);
    for (int64_t k = 2; k < b.width; ++k) mark(bits.all, b.num_users + row[k]);
  }
  for (int64_t i = 0; i < b.num_extra; ++i) mark(bits.all, b.extra[i]);
  int64_t all = 0, touched = 0;
  for (int64_t w = 0; w < bits.words; ++w) {
    bits.rank[w] = all;
    bits.all[w] |= bits.touched[w];
    all += __builtin_popcountll(bits.all[w]);
    touched += __builtin_popcountll(bits.touched[w]);
  }
  bits.rank[bits.words] = all;
  return touched;
}

void localise_nodes(const BatchView& b, const NodeBits& bits, int64_t num_own, const Filling& filling,
                    const Localised& out) {
  const int64_t nodes = b.num_users + b.num_items, first_item = num_own + filling.users;
  int64_t* end = listed(bits.all, 0, b.num_users, out.rows);
  end = around(0, b.num_users, filling.users, end);
  end = listed(bits.all, b.num_users, nodes, end);
  end = around(b.num_users, b.num_items, filling.items, end);
  for (int64_t i = 0; i < end - out.rows; ++i) out.counts[i] = 0;
  for (int64_t i = 0; i < b.size; ++i) {
    const int64_t own = position(bits, b.users[i]);
    out.users[i] = own;
    out.counts[own] += 1;
    for (int64_t k = 0; k < b.width; ++k) {
      const int64_t at = i * b.width + k, where = position(bits, b.num_users + b.candidates[at]) - num_own;
      out.candidates[at] = where;
      if (k < 2) out.counts[first_item + where] += 1;
    }
  }
  for (int64_t i = 0; i < b.num_extra; ++i) {
    out.extra[i] = position(bits, b.extra[i]) + (b.extra[i] < b.num_users ? 0 : filling.users);
  }
  int64_t* last = listed(bits.touched, 0, nodes, out.touched);
  const int64_t known = last - out.touched;
  for (int64_t i = 0; i < known; ++i) {
    const int64_t node = out.touched[i];
    out.touched_counts[i] = out.counts[position(bits, node) + (node < b.num_users ? 0 : filling.users)];
  }
  around(0, nodes, filling.touched, last);
  for (int64_t i = 0; i < filling.touched; ++i) out.touched_counts[known + i] = 0;
}

}  // namespace MMKD_ISA
}  // namespace mmkd
