// Draws samples of the stream that mmkd/reference/sampling.py writes down.
#pragma once
#include <stdint.h>

#include "cpu/isa.h"

namespace mmkd::host {

constexpr int64_t kDrawn = 64;  // samples drawn together: their ways to memory overlap, and they fit the first cache
constexpr int64_t kLine = 16;   // items in a cache line; rows start at one and are filled up with kNoItem
constexpr uint32_t kNoItem = 0xFFFFFFFFu;

// A user with at least one item; all of it is one read.
struct UserRow {
  int64_t begin;  // into `item`
  uint32_t user, size;
};

// What is drawn from, and where in the stream.
struct DrawArgs {
  const UserRow* rows;   // [num_rows], as often as the user is to be drawn
  const uint32_t* item;  // strictly ascending in every row
  uint32_t num_rows, num_items;
  uint32_t rounds;  // draws before the exact fallback
  uint64_t seed;
  uint32_t epoch, step;
  int64_t num_negatives;
  int64_t* users;       // [size]
  int64_t* candidates;  // [size, num_negatives + 1], the positive first
};

}  // namespace mmkd::host

namespace mmkd {

// Samples begin .. end - 1.
MMKD_KERNEL(void draw(const host::DrawArgs& a, int64_t begin, int64_t end))

}  // namespace mmkd
