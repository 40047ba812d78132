#include "cuda/device.cuh"
#include "cuda/scatter_kernel.h"

namespace mmkd::cuda {
namespace {

constexpr int kBlock = 128;

template <class A>
__global__ void __launch_bounds__(kBlock)
    add_rows_kernel(const A* x, const int64_t* rows, int64_t n, int64_t num_rows, int64_t d, A* out) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x) / kWarp;
  if (i >= n) return;
  A* to = out + checked(rows[i], num_rows) * d;
  for (int64_t c = threadIdx.x % kWarp; c < d; c += kWarp) atomicAdd(to + c, x[i * d + c]);
}

// A warp per run of equal targets, at its first position.
template <class T>
__global__ void __launch_bounds__(kBlock) segment_sum_kernel(SegmentSumArgs a) {
  using A = Acc<T>;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x) / kWarp;
  if (first >= a.n || (first > 0 && a.target[first - 1] == a.target[first])) return;
  const int64_t target = checked(a.target[first], a.num_targets);
  const A* coef = static_cast<const A*>(a.coef);
  for (int64_t c = threadIdx.x % kWarp; c < a.d; c += kWarp) {
    A sum = 0;
    for (int64_t p = first; p < a.n && a.target[p] == target; ++p) {
      for (int64_t k = 0; k < a.terms; ++k) {
        const int64_t term = a.origin[p] * a.terms + k;
        const int64_t row = checked(a.map ? a.map[term / a.div] : term / a.div, a.num_src);
        sum += (coef ? coef[term] : A(1)) * widen(static_cast<const T*>(a.src)[row * a.d + c]);
      }
    }
    static_cast<T*>(a.out)[target * a.d + c] = narrow<T>(sum);
  }
}

}  // namespace

void add_rows(DType dtype, const void* x, const int64_t* rows, int64_t n, int64_t num_rows, int64_t d, void* out,
              void* stream) {
  const Grid grid{ceil_div(n * kWarp, kBlock), kBlock, stream};
  if (dtype == DType::f64) {
    launch("add rows", add_rows_kernel<double>, grid, static_cast<const double*>(x), rows, n, num_rows, d,
           static_cast<double*>(out));
  } else {
    launch("add rows", add_rows_kernel<float>, grid, static_cast<const float*>(x), rows, n, num_rows, d,
           static_cast<float*>(out));
  }
}

void segment_sum(const SegmentSumArgs& a, void* stream) {
  dispatch_type(a.dtype, [&](auto tag) {
    launch("segment sum", segment_sum_kernel<typename decltype(tag)::T>,
           Grid{ceil_div(a.n * kWarp, kBlock), kBlock, stream}, a);
  });
}

}  // namespace mmkd::cuda
