// All losses of the student over one table, and its gradient, on a GPU (spec section 4).
#pragma once
#include "cuda/emb_kd_kernel.h"
#include "cuda/list_kd_kernel.h"

namespace mmkd::cuda {

// A means the accumulator type. A part whose weight is 0 is not looked at. Every gradient may be null.
struct DistillArgs {
  ListArgs list;         // users and items of the table; k >= 2
  EmbArgs emb;           // `student` is the table, its row for the i-th of n is nodes[i]
  const int64_t* nodes;  // [emb.n]
  int64_t num_rows;      // of the table: users, then items
  const void* margin;    // [batch] A, the teacher's
  double bpr, pair, by_list, by_emb, pair_tau;
  bool bernoulli;
  void* scratch;  // [distill_sample_blocks, warps of a block, 2 k] A, where the chip has no room for it (distill_fits)
  void* partial;  // [distill_blocks, 4] A scratch
  unsigned* ticket;    // one zero
  void* loss;          // A scalar
  void* terms;         // [4] A
  void* grad_table;    // [num_rows, d] A, added to by atomics
  void* grad_margin;   // [batch] A
  void* grad_logits;   // [modalities, batch, k] A
  void* grad_targets;  // [modalities, n, d]
};
constexpr int64_t kDistillWarps = 4;  // of a block
// 0: there is nothing to do.
int64_t distill_blocks(const DistillArgs& a);
// Of them, those that take samples; the others take nodes.
int64_t distill_sample_blocks(const DistillArgs& a);
bool distill_fits(const DistillArgs& a);
void distill(const DistillArgs& a, void* stream);

}  // namespace mmkd::cuda
