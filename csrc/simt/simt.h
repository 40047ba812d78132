// Runs CUDA kernels' own source on a CPU, for tests. Every CUDA thread is a fiber; barriers, warp exchanges and atomics
// are the points where another thread may go on, picked by a seeded generator. So a missing barrier shows as a changed
// result, shared memory starts as NaN, and a barrier or exchange that not all threads reach is an error. Under
// AddressSanitizer every array (global and shared) ends where it ends.
//
// Not modelled: memory that becomes visible late (a missing __threadfence), speed.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
#include <string.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <functional>
#include <source_location>
#include <string>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace simt {

using Site = std::source_location;

struct Index {
  unsigned x, y, z;
};
Index thread_index();
Index block_index();
Index block_size();
Index grid_size();

// Launches: grid_x * grid_y blocks in random order, `body` once per thread. Throws std::runtime_error for what the
// kernel did wrong. The address of `kernel` in its library goes into the file MMKD_SIMT_LAUNCHED names, if it does.
void run(const char* name, const void* kernel, int64_t grid_x, int64_t grid_y, int block, int64_t shared_bytes,
         const std::function<void()>& body);
// Seed of the schedules from here on.
void set_schedule(uint64_t seed);
// Launches so far, and the threads they ran.
int64_t launches();

[[noreturn]] void fail(const std::string& what, const Site& site);
void barrier(const Site& site);
void maybe_switch();
void* shared(const void* key, int64_t bytes);
void* dynamic_shared();

enum class Exchange { shuffle, ballot, sync };
// Waits until all lanes of `mask` are here. shuffle: `value` (up to 16 bytes) becomes that of `lane`; ballot: the
// returned mask has the bits of the lanes with a non-zero value.
unsigned exchange(Exchange kind, unsigned mask, void* value, int bytes, int lane, const Site& site);

template <class T>
T shuffle(unsigned mask, T value, int lane, const Site& site) {
  static_assert(sizeof(T) <= 16);
  exchange(Exchange::shuffle, mask, &value, sizeof(T), lane, site);
  return value;
}

inline int lane_of() { return static_cast<int>(thread_index().x % 32); }

template <class T>
T atomic_add(T* p, T x) {
  maybe_switch();
  const T old = *p;
  *p = old + x;
  return old;
}

}  // namespace simt

#define threadIdx (::simt::thread_index())
#define blockIdx (::simt::block_index())
#define blockDim (::simt::block_size())
#define gridDim (::simt::grid_size())

#define MMKD_SHARED(T, name, count)      \
  static const char simt_key_##name = 0; \
  T* const name = static_cast<T*>(::simt::shared(&simt_key_##name, sizeof(T) * (count)))
#define MMKD_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(::simt::dynamic_shared())

inline void __syncthreads(simt::Site site = simt::Site::current()) { simt::barrier(site); }
inline void __syncwarp(unsigned mask = 0xffffffffu, simt::Site site = simt::Site::current()) {
  simt::exchange(simt::Exchange::sync, mask, nullptr, 0, 0, site);
}
inline void __threadfence() {}
inline void __trap(simt::Site site = simt::Site::current()) {
  simt::fail("__trap(): a check in the kernel failed", site);
}

template <class T>
T __shfl_sync(unsigned mask, T x, int lane, int width = 32, simt::Site site = simt::Site::current()) {
  return simt::shuffle(mask, x, (simt::lane_of() & ~(width - 1)) + (lane & (width - 1)), site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int bits, int = 32, simt::Site site = simt::Site::current()) {
  return simt::shuffle(mask, x, simt::lane_of() ^ bits, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, unsigned delta, int = 32, simt::Site site = simt::Site::current()) {
  const int lane = simt::lane_of(), from = lane - static_cast<int>(delta);
  return simt::shuffle(mask, x, from < 0 ? lane : from, site);
}
inline unsigned __ballot_sync(unsigned mask, int on, simt::Site site = simt::Site::current()) {
  return simt::exchange(simt::Exchange::ballot, mask, &on, sizeof on, 0, site);
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

inline float atomicAdd(float* p, float x) { return simt::atomic_add(p, x); }
inline double atomicAdd(double* p, double x) { return simt::atomic_add(p, x); }
inline unsigned atomicAdd(unsigned* p, unsigned x) { return simt::atomic_add(p, x); }
// As on sm_90: whole and aligned, but each number by itself.
inline float4 atomicAdd(float4* p, float4 x, simt::Site site = simt::Site::current()) {
  if (reinterpret_cast<uintptr_t>(p) % 16) simt::fail("a misaligned float4", site);
  float* at = reinterpret_cast<float*>(p);
  return {atomicAdd(at, x.x), atomicAdd(at + 1, x.y), atomicAdd(at + 2, x.z), atomicAdd(at + 3, x.w)};
}
