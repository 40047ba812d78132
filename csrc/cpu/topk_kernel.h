// One register tile of all-ranking scores: kTileUsers users against one packed panel of items.
#pragma once
#include <stdint.h>
#include <string.h>

#include "cpu/isa.h"

namespace mmkd {

// Baseline code and every instruction set have these, so they are part of whoever uses them: the linker could else keep
// one set's for all.
#define MMKD_PART_OF __attribute__((always_inline)) inline

// A score and its item as one value whose order is the ranking's: higher score first, equal scores by lower id.
template <class A>
struct Candidate;
template <>
struct Candidate<double> {
  double score;
  int64_t item;
  MMKD_PART_OF static Candidate of(double score, int64_t item) { return {score, item}; }
  MMKD_PART_OF bool operator<(const Candidate& o) const { return score != o.score ? score > o.score : item < o.item; }
  MMKD_PART_OF double score_of() const { return score; }
  MMKD_PART_OF int64_t item_of() const { return item; }
};
// One 64-bit number: the score's bits, mapped so that integers fall where floats rise, above the item.
template <>
struct Candidate<float> {
  uint64_t key;  // ascending: best first
  MMKD_PART_OF static Candidate of(float score, int64_t item) {
    const float plus = score + 0.0f;  // -0 is 0
    uint32_t bits;
    memcpy(&bits, &plus, sizeof bits);
    return {static_cast<uint64_t>(falling(bits)) << 32 | static_cast<uint32_t>(item)};
  }
  MMKD_PART_OF bool operator<(const Candidate& o) const { return key < o.key; }
  MMKD_PART_OF float score_of() const {
    const uint32_t bits = falling(static_cast<uint32_t>(key >> 32));
    float score;
    memcpy(&score, &bits, sizeof score);
    return score;
  }
  MMKD_PART_OF int64_t item_of() const { return static_cast<uint32_t>(key); }

  // Its own inverse.
  MMKD_PART_OF static uint32_t falling(uint32_t bits) { return bits & 0x80000000u ? bits : bits ^ 0x7fffffffu; }
};

#undef MMKD_PART_OF

constexpr int kTileUsers = 6;
constexpr int kMostPanel = 32;  // items of a panel, at most (AVX-512, float32)

struct TopkTile {
  bool f64;                       // everything is float64, else float32
  const void* users[kTileUsers];  // rows of d numbers
  const void* panel;              // [d, panel_width]: the items' columns side by side
  const void* floors;             // [kTileUsers]; a score counts only above its user's
  void* kept[kTileUsers];         // where a user's candidates that count are appended, in order of items: moved on
                                  // behind them; kMostPanel candidates fit there
  int64_t d, first;               // the panel's first item
  uint32_t there;                 // bit i: the panel has an item i
};

// Items per panel of this instruction set.
MMKD_KERNEL(int topk_panel_width(bool f64))
// Appends what counts. Whether anything did.
MMKD_KERNEL(bool topk_tile(TopkTile& t))

}  // namespace mmkd
