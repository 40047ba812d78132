// One step of AdamW for a vector of elements. Included only by *_kernel.cpp (see vec.h).
#pragma once
#include "cpu/spmm_kernel.h"
#include "cpu/vmath.h"

namespace mmkd {
namespace MMKD_ISA {

// A product that may not be fused with the sum it goes into.
template <class V>
MMKD_INLINE V rounded(V x) {
#if defined(MMKD_ISA_avx512)
  asm("" : "+v"(x));
#elif defined(__SSE2__)
  asm("" : "+x"(x));
#endif
  return x;
}

template <class T>
struct StepSizes {
  T keep, lerp, beta2, square, root, eps, size;

  explicit StepSizes(const AdamwArgs& a)
      : keep(static_cast<T>(1 - a.lr * a.weight_decay)),
        lerp(static_cast<T>(1 - a.beta1)),
        beta2(static_cast<T>(a.beta2)),
        square(static_cast<T>(1 - a.beta2)),
        root(static_cast<T>(a.root)),
        eps(static_cast<T>(a.eps)),
        size(static_cast<T>(a.size)) {}
};

// Rounds where torch's fused AdamW does, so that a run has the same bits with either. V: a vector, or one number.
template <class V, class T>
MMKD_INLINE void adamw_step(V g, V& w, V& m, V& v, T l2, const StepSizes<T>& k) {
  if (l2 != T(0)) g += rounded(w * l2);
  w = rounded(w * k.keep);
  const V change = g - m;
  m = k.lerp < T(0.5) ? multiply_add(change, V{} + k.lerp, m) : multiply_add(change, V{} + (k.lerp - T(1)), g);
  v = multiply_add(rounded(g * k.square), g, rounded(v * k.beta2));
  const V denominator = Num<V>::sqrt(v) / k.root + k.eps;
  w += (m * -k.size) / denominator;
}

}  // namespace MMKD_ISA
}  // namespace mmkd
