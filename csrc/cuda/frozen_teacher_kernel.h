// What a student's step asks of the frozen teacher, on a GPU (spec section 3).
#pragma once
#include <stdint.h>

#include "cpu/dtype.h"

namespace mmkd::cuda {

// A is the element type, float or double: F^m = C^m + K Z^m.
struct FrozenArgs {
  DType dtype;
  const void* content;        // C, [modalities, num_nodes, d]
  const void* design;         // K, [num_nodes, e]
  const void* ids;            // [num_nodes, d]
  const void* omega;          // [modalities]
  const void* state;          // Z, [modalities, e, d]
  const int64_t* nodes;       // [3 batch + num_targets]: users, observed items, negatives, further nodes
  const int64_t* candidates;  // [batch, list], items; item x is node first_item + x
  int64_t modalities, num_nodes, d, e, batch, list, num_targets, first_item;
};

struct FrozenOutputs {
  void* margin;   // [batch]
  void* logits;   // [modalities, batch, list]
  void* targets;  // [modalities, num_targets, d]
  void* heads;    // [modalities, 3 batch, d]: F of the users, observed items, negatives
};
// Whether a modality's Z and the rows of a few samples fit on the chip; if not, there is no kernel.
bool frozen_fits(const FrozenArgs& a);
void frozen_teacher(const FrozenArgs& a, const FrozenOutputs& o, void* stream);

// A gradient that is not given is null.
struct FrozenGradients {
  const void* margin;   // [batch]
  const void* logits;   // [modalities, batch, list]
  const void* targets;  // [modalities, num_targets, d]
  const void* heads;    // as they came out
  void* rows;           // [modalities, 3 batch, d] scratch: gradients of the heads
  void* through;        // [modalities, batch, e] scratch: of F_u Z^T
  void* parts;          // [frozen_parts, modalities, e, d] scratch
  void* state;          // [modalities, e, d], the result
};
int64_t frozen_parts(const FrozenArgs& a);
void frozen_teacher_backward(const FrozenArgs& a, const FrozenGradients& g, void* stream);

}  // namespace mmkd::cuda
