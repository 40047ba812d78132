// The teacher's own losses over a batch (spec section 3): what its joint embedding is made of at the batch's rows,
// margins in all kinds of embeddings, and every row of all gradients.
#pragma once
#include <stdint.h>

#include "cpu/isa.h"

namespace mmkd {

// One kind of embeddings that pairs are ranked by.
struct Head {
  const void *users, *items;         // first row of each
  int64_t user_stride, item_stride;  // numbers from row to row
  void *margin, *coefficient;        // [B]; the second is dL / d margin
  bool ranked;                       // whether its loss has a weight
};

struct TeacherArgs {
  bool f64;  // everything: float64, else float32
  int64_t num_users, num_items, d, modalities;
  const void* ids;                            // [num_users + num_items, d]
  const void *user_features, *item_features;  // [num_users, M d], [num_items, M d]
  const void* omega;                          // [M]
  void* joint;                                // [num_users + num_items, d]
  void* inverse;                              // the same rows, M: 1 / max(length, eps), below 0 where that is eps
  const int64_t *users, *pos, *neg;           // [B]
  const Head* heads;                          // joint, modalities, prompt
  int64_t count;                              // of them
  void *grad_ids, *grad_users, *grad_items, *grad_prompt;  // null where not needed
};

// Positions of a batch that name rows of one side, by row: of users b, of items 2 b for the observed one and 2 b + 1
// for the other.
struct RowPositions {
  const uint64_t* order;   // row << 32 | position, sorted
  const uint32_t* rows;    // [groups] the rows named
  const uint32_t* starts;  // [groups + 1]
  int64_t groups;
  bool items;
};

// Rows [begin, end) of `joint` and `inverse`, users first.
MMKD_KERNEL(void teacher_rows(const TeacherArgs& a, int64_t begin, int64_t end))
// Margins of samples [begin, end) in every head that is ranked. False if an index is out of range: then nothing was
// read.
MMKD_KERNEL(bool teacher_margins(const TeacherArgs& a, int64_t begin, int64_t end))
// Gradients of rows [begin, end) of one side; rows that no position names become zero. scratch: d numbers.
MMKD_KERNEL(void teacher_grads(const TeacherArgs& a, const RowPositions& of, int64_t begin, int64_t end, void* scratch))

}  // namespace mmkd
