#include "cpu/student_kernel.h"

#include "cpu/small_products.h"

namespace mmkd {
namespace MMKD_ISA {
namespace {

template <class A>
Rows<A> in_order(const void* base, int64_t stride, int64_t first) {
  return {static_cast<const A*>(base) + first * stride, stride, nullptr};
}

template <class A>
void state_typed(const PromptStateArgs& a, int64_t begin, int64_t end) {
  const int64_t n = end - begin, wide = a.modalities * a.d;
  A* square = static_cast<A*>(a.square) + begin * a.ep;
  product<A>(in_order<A>(a.stacked, a.k, begin), n, a.k, static_cast<const A*>(a.stacked_t), a.ep, nullptr, square,
             a.ep, a.ep);
  for (int64_t m = 0; m < a.modalities; ++m) {
    A* out = static_cast<A*>(a.state) + (m * a.e + begin) * a.d;
    product<A>(in_order<A>(square, a.ep, 0), n, a.e, static_cast<const A*>(a.mixed) + m * a.d, wide, nullptr, out, a.d,
               a.d);
  }
}

template <class A>
void square_grads_typed(const PromptStateArgs& a, int64_t begin, int64_t end) {
  A* square = static_cast<A*>(a.square) + begin * a.ep;
  const Rows<A> before = in_order<A>(square, a.ep, 0);
  for (int64_t m = 0; m < a.modalities; ++m) {
    product<A>(in_order<A>(a.state, a.d, m * a.e + begin), end - begin, a.d,
               static_cast<const A*>(a.mixed_t) + m * a.d * a.ep, a.ep, m ? &before : nullptr, square, a.ep, a.ep);
  }
}

// (G + G^T) V
template <class A>
void grads_typed(const PromptStateArgs& a, int64_t begin, int64_t end) {
  const A *square = static_cast<const A*>(a.square), *stacked = static_cast<const A*>(a.stacked);
  A* out = static_cast<A*>(a.grad) + begin * a.k;
  product<A>(in_order<A>(square, a.ep, begin), end - begin, a.e, stacked, a.k, nullptr, out, a.k, a.k);
  add_outer(square + begin, a.ep, end - begin, stacked, a.k, a.k, a.e, out);
}

constexpr int64_t kRowsAhead = 8;

template <class A>
double squares_typed(const L2Args& a, int64_t begin, int64_t end) {
  const A *table = static_cast<const A*>(a.table), *weights = static_cast<const A*>(a.weights);
  double sum = 0;
  for (int64_t i = begin; i < end; ++i) {
    if (i + kRowsAhead < end && weights[i + kRowsAhead] != 0) prefetch_row(table + a.rows[i + kRowsAhead] * a.d, a.d);
    if (weights[i] == 0) continue;
    const A* row = table + a.rows[i] * a.d;
    sum += static_cast<double>(weights[i] * dot(row, row, a.d));
  }
  return sum;
}

}  // namespace

void prompt_state(const PromptStateArgs& a, int64_t begin, int64_t end) {
  a.f64 ? state_typed<double>(a, begin, end) : state_typed<float>(a, begin, end);
}

void prompt_square_grads(const PromptStateArgs& a, int64_t begin, int64_t end) {
  a.f64 ? square_grads_typed<double>(a, begin, end) : square_grads_typed<float>(a, begin, end);
}

void prompt_grads(const PromptStateArgs& a, int64_t begin, int64_t end) {
  a.f64 ? grads_typed<double>(a, begin, end) : grads_typed<float>(a, begin, end);
}

double weighted_squares(const L2Args& a, int64_t begin, int64_t end) {
  return a.f64 ? squares_typed<double>(a, begin, end) : squares_typed<float>(a, begin, end);
}

}  // namespace MMKD_ISA
}  // namespace mmkd
