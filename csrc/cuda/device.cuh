// What the kernels are written with. nvcc compiles them for a GPU; g++ compiles the same source against simt/simt.h,
// which runs a launch on the CPU (tests only).
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>
#include <stdint.h>

#include "cpu/dtype.h"

#if defined(__CUDACC__)
// A block's shared array, aligned for the widest Pack.
#define MMKD_SHARED(T, name, count) __shared__ __align__(64) T name[count]
// The bytes asked for at the launch.
#define MMKD_DYNAMIC_SHARED(T, name)      \
  extern __shared__ uint4 mmkd_dynamic[]; \
  T* const name = reinterpret_cast<T*>(mmkd_dynamic)
#else
#include "simt/simt.h"
#endif

#include "cuda/launch.h"
#include "loss_math.h"

namespace mmkd::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFull = 0xffffffffu;

// Acc: the type sums are kept in. kWide: elements in a 16-byte load.
template <class T>
struct Element {
  using Acc = float;
  static constexpr int kWide = 16 / sizeof(T);
};
template <>
struct Element<double> {
  using Acc = double;
  static constexpr int kWide = 2;
};
template <class T>
using Acc = typename Element<T>::Acc;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T>
__device__ __forceinline__ T narrow(Acc<T> x) {
  return x;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// V neighbouring elements, moved by one instruction.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T at[V];
};
template <int V, class T>
__device__ __forceinline__ Pack<T, V> load(const T* p) {
  return *reinterpret_cast<const Pack<T, V>*>(p);
}
template <int V, class T>
__device__ __forceinline__ Pack<T, V> zeros() {
  Pack<T, V> p;
#pragma unroll
  for (int v = 0; v < V; ++v) p.at[v] = narrow<T>(0);
  return p;
}
template <class T, int V>
__device__ __forceinline__ void store(T* p, const Acc<T> (&x)[V]) {
  Pack<T, V> out;
#pragma unroll
  for (int v = 0; v < V; ++v) out.at[v] = narrow<T>(x[v]);
  *reinterpret_cast<Pack<T, V>*>(p) = out;
}

// sum += w * x
template <class T, int V>
__device__ __forceinline__ void axpy(Acc<T> (&sum)[V], Acc<T> w, const Pack<T, V>& x) {
#pragma unroll
  for (int v = 0; v < V; ++v) sum[v] += w * widen(x.at[v]);
}
template <class T, int V>
__device__ __forceinline__ Acc<T> dot(const Pack<T, V>& a, const Pack<T, V>& b) {
  Acc<T> sum = 0;
#pragma unroll
  for (int v = 0; v < V; ++v) sum += widen(a.at[v]) * widen(b.at[v]);
  return sum;
}

// A warp is cut into groups of `size` lanes (a power of two); a group works on one row.
struct Group {
  int size, lane, index, count;  // lanes in a group, my lane in it, my group in the warp, groups in a warp
  unsigned mask;                 // my group's lanes

  __device__ __forceinline__ explicit Group(int size) : size(size) {
    const int lane_in_warp = static_cast<int>(threadIdx.x) % kWarp;
    lane = lane_in_warp & (size - 1);
    index = lane_in_warp / size;
    count = kWarp / size;
    mask = size == kWarp ? kFull : ((1u << size) - 1u) << (index * size);
  }
};

// Sum over the lanes of each group, in a fixed order. `mask`: the lanes that take part, whole groups.
template <class A>
__device__ __forceinline__ A group_sum(A x, const Group& g, unsigned mask = kFull) {
  for (int o = g.size / 2; o > 0; o /= 2) x += __shfl_xor_sync(mask, x, o);
  return x;
}
// Sum over the groups of a warp: each lane gets the sum of its column.
template <class A>
__device__ __forceinline__ A across_groups(A x, const Group& g) {
  for (int o = g.size; o < kWarp; o *= 2) x += __shfl_xor_sync(kFull, x, o);
  return x;
}
template <class A>
__device__ __forceinline__ A warp_sum(A x) {
#pragma unroll
  for (int o = kWarp / 2; o > 0; o /= 2) x += __shfl_xor_sync(kFull, x, o);
  return x;
}
template <class A>
__device__ __forceinline__ A warp_max(A x) {
#pragma unroll
  for (int o = kWarp / 2; o > 0; o /= 2) {
    const A y = __shfl_xor_sync(kFull, x, o);
    x = y > x ? y : x;
  }
  return x;
}

// An index out of range stops the kernel, as torch's own indexing does; nothing is read through it.
__device__ __forceinline__ int64_t checked(int64_t index, int64_t bound) {
  if (static_cast<uint64_t>(index) >= static_cast<uint64_t>(bound)) __trap();
  return index;
}

// p[0..V) += x, in any order with other threads.
template <int V, class A>
__device__ __forceinline__ void atomic_add(A* p, const A (&x)[V]) {
#if defined(MMKD_SIMT) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
  if constexpr (V % 4 == 0 && sizeof(A) == 4) {
#pragma unroll
    for (int v = 0; v < V; v += 4) {
      atomicAdd(reinterpret_cast<float4*>(p + v), make_float4(x[v], x[v + 1], x[v + 2], x[v + 3]));
    }
    return;
  }
#endif
#pragma unroll
  for (int v = 0; v < V; ++v) atomicAdd(p + v, x[v]);
}

// Sums `value` over all threads of all blocks and calls done(sums) in one thread of the block that finishes last.
// The order is fixed: lanes, warps, then blocks by number. partial: [gridDim.x * N]; ticket: 0 before the launch.
template <int N, class A, class Done>
__device__ __forceinline__ void sum_over_grid(const A (&value)[N], A* partial, unsigned* ticket, Done done) {
  MMKD_SHARED(A, warps, kWarp * N);
  MMKD_SHARED(unsigned, last, 1);
  const int warp = threadIdx.x / kWarp, num_warps = blockDim.x / kWarp;
  A sum[N];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    sum[n] = warp_sum(value[n]);
    if (threadIdx.x % kWarp == 0) warps[warp * N + n] = sum[n];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      A s = 0;
      for (int w = 0; w < num_warps; ++w) s += warps[w * N + n];
      partial[blockIdx.x * N + n] = s;
    }
    __threadfence();
    last[0] = atomicAdd(ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last[0]) return;
  __threadfence();
#pragma unroll
  for (int n = 0; n < N; ++n) {
    A s = 0;
    for (unsigned b = threadIdx.x; b < gridDim.x; b += blockDim.x) {
      s += static_cast<const volatile A*>(partial)[b * N + n];
    }
    sum[n] = warp_sum(s);
    if (threadIdx.x % kWarp == 0) warps[warp * N + n] = sum[n];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      sum[n] = 0;
      for (int w = 0; w < num_warps; ++w) sum[n] += warps[w * N + n];
    }
    done(sum);
  }
}

// Calls f(Tag<T, V>) for an element type; V is the 16-byte width where `wide`, else 1.
template <class Type, int Width>
struct Tag {
  using T = Type;
  static constexpr int V = Width;
};
template <class F>
void dispatch(DType dtype, bool wide, F f) {
  switch (dtype) {
    case DType::f32:
      return wide ? f(Tag<float, 4>()) : f(Tag<float, 1>());
    case DType::bf16:
      return wide ? f(Tag<__nv_bfloat16, 8>()) : f(Tag<__nv_bfloat16, 1>());
    case DType::f16:
      return wide ? f(Tag<__half, 8>()) : f(Tag<__half, 1>());
    case DType::f64:
      return f(Tag<double, 1>());
  }
}
// The same by element type alone.
template <class F>
void dispatch_type(DType dtype, F f) {
  dispatch(dtype, false, f);
}

// Lanes that share a row of d elements.
inline int lanes_for(DType dtype, bool wide, int64_t d) {
  const int64_t each = !wide ? 1 : dtype == DType::f32 ? Element<float>::kWide : Element<__half>::kWide;
  int lanes = 1;
  while (lanes < kWarp && lanes * each < d) lanes *= 2;
  return lanes;
}
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace mmkd::cuda
