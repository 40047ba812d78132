// List scores and disentangled list-wise KD on a GPU (spec section 4).
#pragma once
#include <stdint.h>

#include "cpu/dtype.h"

namespace mmkd::cuda {

// A means the accumulator type.
struct ListArgs {
  DType dtype;                // of the tables; of the logits where there are no tables
  bool wide;                  // rows may be moved 16 bytes at a time
  const void* user_emb;       // [num_users, d]
  const void* item_emb;       // [num_items, d]
  const int64_t* users;       // [batch]
  const int64_t* candidates;  // [batch, k]
  const void* teacher;        // [modalities, batch, k] A
  const void* weight;         // [modalities] A
  int64_t batch, k, d, num_users, num_items, modalities;
  double alpha, beta, tau;
  bool coupled;
};

struct ListForward {
  const void* given;  // [batch, k] A logits, or null: they are computed into `logits`
  void* logits;       // [batch, k] A
  void* partial;      // [list_blocks] A scratch
  unsigned* ticket;   // one zero
  void* loss;         // A scalar; null: scores only
};
int64_t list_blocks(const ListArgs& a);
void list_forward(const ListArgs& a, const ListForward& f, void* stream);

// Tables' gradients are added by atomics, and may be null; so may grad_teacher.
struct ListBackward {
  const void* grad;    // A scalar: of the loss
  const void* logits;  // [batch, k] A
  const void* given;   // [batch, k] A gradients of the scores, or null: they come from the loss
  void* coef;          // [batch, k] A, where they go; null: they stay on the chip
  void* grad_user;     // [num_users, d] A
  void* grad_item;     // [num_items, d] A
  void* grad_teacher;  // [modalities, batch, k] A
};
// Whether the K coefficients of every warp fit on the chip; if not, `coef` is needed.
bool list_fits(const ListArgs& a);
void list_backward(const ListArgs& a, const ListBackward& g, void* stream);

}  // namespace mmkd::cuda
