// A batch's nodes as bits, and where its users and items are among them.
#pragma once
#include <stdint.h>

#include "cpu/isa.h"

namespace mmkd::host {

// Nodes are users 0..num_users-1, then items.
struct BatchView {
  const int64_t* users;       // [size]
  const int64_t* candidates;  // [size, width]
  const int64_t* extra;       // [num_extra] node ids
  int64_t size, width, num_extra;
  int64_t num_users, num_items;
};

// Sets of nodes, a bit each, and how many are in them before each word of bits (and in all, behind the last).
struct NodeBits {
  uint64_t *all, *touched;  // [words]; `touched`: what stands in (user, candidate 0, candidate 1)
  int64_t* rank;            // [words + 1], of `all`
  int64_t words;
};

// Nodes that fill up: `users` of them behind the batch's own users, `items` behind its items, `touched` behind those.
struct Filling {
  int64_t users, items, touched;
};

struct Localised {
  int64_t* rows;        // [num_rows]
  int64_t* users;       // [size], positions among the users of rows
  int64_t* candidates;  // [size, width], positions among its items
  int64_t* extra;       // [num_extra], positions in rows
  float* counts;        // [num_rows], how often a row stands in (user, candidate 0, candidate 1)
  int64_t* touched;     // nodes of `NodeBits::touched`
  float* touched_counts;
};

}  // namespace mmkd::host

namespace mmkd {

// Fills cleared bits, and their ranks; returns how many are touched. Ids are checked.
MMKD_KERNEL(int64_t mark_nodes(const host::BatchView& b, const host::NodeBits& bits))
// `num_own` users are among the marked.
MMKD_KERNEL(void localise_nodes(const host::BatchView& b, const host::NodeBits& bits, int64_t num_own,
                                const host::Filling& filling, const host::Localised& out))

}  // namespace mmkd
