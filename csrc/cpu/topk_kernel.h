// One register tile of all-ranking scores: kTileUsers users against one packed panel of items.
#pragma once
#include <stdint.h>

#include "cpu/isa.h"

namespace mmkd {

constexpr int kTileUsers = 6;
constexpr int kMostPanel = 32;  // items of a panel, at most (AVX-512, float32)

struct TopkTile {
  bool f64;                       // everything is float64, else float32
  const void* users[kTileUsers];  // rows of d numbers
  const void* panel;              // [d, panel_width]: the items' columns side by side
  const void* floors;             // [kTileUsers]; a score counts only above its user's
  void* scores;                   // [kTileUsers, panel_width], a user's row is written where one of his scores counts
  uint32_t above[kTileUsers];     // out: bit i of a user's word: item i of the panel scores above his floor
  int64_t d;
};

// Items per panel of this instruction set.
MMKD_KERNEL(int topk_panel_width(bool f64))
// Whether any user has a score above his floor.
MMKD_KERNEL(bool topk_tile(TopkTile& t))

}  // namespace mmkd
