// Embedding KD by scaled cosine error on a GPU (spec section 4).
#pragma once
#include <stdint.h>

#include "cpu/dtype.h"

namespace mmkd::cuda {

// A means the accumulator type.
struct EmbArgs {
  DType dtype;
  bool wide;             // rows may be moved 16 bytes at a time
  const void* student;   // [n, d]
  const void* teachers;  // [modalities, n, d]
  const void* weights;   // [modalities] A
  void* stats;           // [n, 1 + 2 modalities] A: <e, e>, then <e, f>, <f, f> of each; written forward, read backward
  int64_t n, d, modalities;
  double gamma;
};

struct EmbForward {
  void* partial;     // [emb_blocks] A scratch
  unsigned* ticket;  // one zero
  void* loss;        // A scalar
};
int64_t emb_blocks(const EmbArgs& a);
void emb_forward(const EmbArgs& a, const EmbForward& f, void* stream);

struct EmbBackward {
  const void* grad;     // A scalar
  void* grad_student;   // [n, d], or null
  void* grad_teachers;  // [modalities, n, d], or null
};
void emb_backward(const EmbArgs& a, const EmbBackward& g, void* stream);

}  // namespace mmkd::cuda
