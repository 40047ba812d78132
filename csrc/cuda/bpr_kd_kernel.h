// BPR and pairwise KD on a GPU (spec section 4).
#pragma once
#include <stdint.h>

#include "cpu/dtype.h"

namespace mmkd::cuda {

// A means the accumulator type.
struct BprArgs {
  DType dtype;           // of the tables; of the margins where there are no tables
  bool wide;             // rows may be moved 16 bytes at a time
  const void* user_emb;  // [num_users, d]; null: margins are given
  const void* item_emb;  // [num_items, d]
  const int64_t* users;  // [batch]
  const int64_t* pos;
  const int64_t* neg;
  const void* teacher;  // [batch] A, or null
  int64_t batch, num_users, num_items, d;
  double tau;
  bool bernoulli;
};

struct BprForward {
  const void* given;  // [batch] A margins, or null: they are computed into `margin`
  void* margin;
  void* partial;     // [bpr_blocks, 2] A scratch
  unsigned* ticket;  // one zero
  void* bpr;         // A scalars
  void* pair;
};
int64_t bpr_blocks(const BprArgs& a);
void bpr_forward(const BprArgs& a, const BprForward& f, void* stream);

// Every output may be null. Tables' gradients are added by atomics.
struct BprBackward {
  const void* margin;    // [batch] A
  const void* grad_bpr;  // A scalars
  const void* grad_pair;
  void* grad_user;     // [num_users, d] A
  void* grad_item;     // [num_items, d] A
  void* grad_margin;   // [batch] A
  void* grad_teacher;  // [batch] A
  void* coef;          // [batch, 2] A: dL/d<user, pos>, dL/d<user, neg>
  int64_t* pairs;      // [batch, 2]: pos, neg
};
void bpr_backward(const BprArgs& a, const BprBackward& g, void* stream);

}  // namespace mmkd::cuda
