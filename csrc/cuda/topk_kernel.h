// Exact top-k by inner product on a GPU (spec section 5).
#pragma once
#include <stdint.h>

#include "cpu/dtype.h"

namespace mmkd::cuda {

// A means the accumulator type. The items are cut into `splits` ranges; each gives its own list of k, and the lists are
// merged: equal scores by lower item id, so the cut does not show in the result.
struct TopkArgs {
  DType dtype;
  bool wide;              // rows may be moved 16 bytes at a time
  const void* user_emb;   // [num_users, d]
  const void* item_emb;   // [num_items, d]
  const int64_t* users;   // [n], or null: row i for position i
  const int64_t* rowptr;  // [num_users + 1] items never returned, or null
  const void* col;        // int64 if col64, else int32
  bool col64;
  int64_t n, num_users, num_items, d, k, splits;
  void* list_scores;  // [n, splits, k] A scratch
  int32_t* list_ids;  // [n, splits, k] scratch
  void* scores;       // [n, k] A
  int64_t* ids;       // [n, k]
};
// Enough ranges to fill a device, and not so many that merging their lists costs more than it gains.
int64_t topk_splits(int64_t n, int64_t num_items, int64_t k);
void topk(const TopkArgs& a, void* stream);

}  // namespace mmkd::cuda
