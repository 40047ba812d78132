// Scaled cosine error between the student's rows and M teachers' (spec section 4, paper Eq. 11).
#pragma once
#include <stdint.h>

#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace mmkd {

constexpr int64_t kMostTeachers = 16;  // their coefficients are kept in registers

struct EmbKDArgs {
  DType dtype;           // of student, teachers and their gradients
  const void* student;   // [n, d]
  const void* teachers;  // [M, n, d]
  const void* weights;   // [M] accumulator type, of each teacher
  void* stats;           // [n, 1 + 2M] accumulator type: <e, e>, then <e, f>, <f, f> of each teacher
  void* grad_student;    // [n, d] or null (backward)
  void* grad_teachers;   // [M, n, d] or null
  int64_t n, d, num_teachers;
  bool stream;  // gradients are written past the caches
  double gamma;
  double scale;  // of the gradients: incoming gradient / n
};
// The sum of the losses of rows [begin, end); their stats are written, and the gradients that are not null, at `scale`.
MMKD_KERNEL(double emb_kd_losses(const EmbKDArgs& a, int64_t begin, int64_t end))
MMKD_KERNEL(void emb_kd_grads(const EmbKDArgs& a, int64_t begin, int64_t end))

}  // namespace mmkd
