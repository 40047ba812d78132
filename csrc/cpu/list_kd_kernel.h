// List scores and list-wise KD for a block of samples. A lane of a vector is a sample.
#pragma once
#include <stdint.h>

#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace mmkd {

struct ListScoresArgs {
  DType dtype;
  const void* user_emb;       // [num_users, d]
  const void* item_emb;       // [num_items, d]
  const int64_t* users;       // [B]
  const int64_t* candidates;  // [B, K]
  int64_t num_users, num_items, d, k;
  void* logits;  // [B, K] accumulator type
};
// logits of samples [begin, end). False if one of their indices is out of range: then nothing of theirs was read.
MMKD_KERNEL(bool list_scores(const ListScoresArgs& a, int64_t begin, int64_t end))

struct ListKdArgs {
  bool f64;             // the accumulator type of everything below
  const void* logits;   // [B, K] student
  const void* teacher;  // [M, B, K]
  const void* weight;   // [M]
  int64_t batch, k, modalities;
  double alpha, beta, tau;
  bool coupled;
  double scale;        // of the gradients: upstream gradient / B
  void* grad_student;  // [B, K]; null: not wanted
  void* grad_teacher;  // [M, B, K]; null: not wanted
};
// Vectors of K lanes that a block needs as scratch.
constexpr int kListScratch = 5;
// Lanes of a vector of the instruction set in use.
MMKD_KERNEL(int64_t list_kd_lanes(bool f64))
// The sum of the losses of samples [begin, end). scratch: kListScratch * K vectors.
MMKD_KERNEL(double list_kd_loss(const ListKdArgs& a, int64_t begin, int64_t end, void* scratch))
MMKD_KERNEL(void list_kd_grad(const ListKdArgs& a, int64_t begin, int64_t end, void* scratch))
// Both: the gradients that are not null, and the sum.
MMKD_KERNEL(double list_kd_both(const ListKdArgs& a, int64_t begin, int64_t end, void* scratch))

}  // namespace mmkd
