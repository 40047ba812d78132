// Kernels with a bug in each: the tests see the executor or the sanitizers catch every one of them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "cuda/context.h"
#include "cuda/device.cuh"

namespace {

using torch::stable::Tensor;
constexpr int kBlock = 64;

enum Bug {
  kNone,
  kNoBarrier,
  kGlobalOverrun,
  kSharedOverrun,
  kDivergentShuffle,
  kDivergentBarrier,
  kLeftBarrier,
  kLost
};

// out[block] = sum of in[block * 64 ...]; right where there is no bug.
__global__ void row_sum(const float* in, float* out, int bug) {
  MMKD_SHARED(float, values, kBlock);
  MMKD_SHARED(float, sums, 2);
  const int t = threadIdx.x;
  values[bug == kSharedOverrun ? t + 1 : t] = in[blockIdx.x * kBlock + t + (bug == kGlobalOverrun ? 1 : 0)];
  if (bug == kDivergentBarrier && t < 32) {
    __syncthreads();
  } else if (bug == kLeftBarrier && t == 3) {
    return;
  } else if (bug != kNoBarrier) {
    __syncthreads();
  }
  float x = values[kBlock - 1 - t];
  if (bug == kDivergentShuffle) {
    if (t % 32 < 16) x += __shfl_xor_sync(0xffffffffu, x, 1);
    __syncwarp();
  } else {
    for (int o = 16; o > 0; o /= 2) x += __shfl_xor_sync(0xffffffffu, x, o);
  }
  if (t % 32 == 0) sums[t / 32] = x;
  __syncthreads();
  if (t == 0) out[blockIdx.x] = sums[0] + sums[1];
}

// Adds all inputs into out[0]; kLost does so without an atomic operation.
__global__ void total(const float* in, float* out, int bug) {
  const float x = in[blockIdx.x * kBlock + threadIdx.x];
  if (bug == kLost) {
    const float before = out[0];
    __syncwarp();
    out[0] = before + x;
  } else {
    atomicAdd(out, x);
  }
}

void planted(Tensor in, Tensor out, int64_t bug, bool atomic) {
  mmkd::cuda::launch(atomic ? "total" : "row sum", atomic ? total : row_sum,
                     mmkd::cuda::Grid{in.numel() / kBlock, kBlock, nullptr},
                     static_cast<const float*>(in.const_data_ptr()), static_cast<float*>(out.mutable_data_ptr()),
                     static_cast<int>(bug));
}

void set_schedule(int64_t seed) { simt::set_schedule(static_cast<uint64_t>(seed)); }
int64_t launches() { return simt::launches(); }
bool deterministic_flag() { return mmkd::cuda::deterministic(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mmkd_simt, m) {
  m.def("planted(Tensor input, Tensor(a!) out, int bug, bool atomic) -> ()");
  m.def("set_schedule(int seed) -> ()");
  m.def("launches() -> int");
  m.def("deterministic() -> bool");
}
STABLE_TORCH_LIBRARY_IMPL(mmkd_simt, CompositeExplicitAutograd, m) {
  m.impl("planted", TORCH_BOX(&planted));
  m.impl("set_schedule", TORCH_BOX(&set_schedule));
  m.impl("launches", TORCH_BOX(&launches));
  m.impl("deterministic", TORCH_BOX(&deterministic_flag));
}
