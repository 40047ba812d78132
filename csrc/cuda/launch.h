// A launch: <<<>>> under nvcc, the executor of simt/ under g++. The only place that knows the difference.
#pragma once
#include <stdint.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace mmkd::cuda {

// The most blocks of a kernel whose threads step through the work by the size of the grid.
constexpr int64_t kMaxBlocks = 1024;

struct Grid {
  int64_t x;           // blocks; 0: nothing is launched
  int block;           // threads of a block
  void* stream;        // cudaStream_t
  int64_t shared = 0;  // dynamic shared memory in bytes
  int64_t y = 1;
  // The most dynamic shared memory the kernel is ever launched with, where that must be asked for (with the static
  // arrays beyond 48 KB). The same in every launch: what is asked for belongs to the kernel, and other threads launch
  // it too.
  int64_t most_shared = 0;
};

inline void check_grid(const Grid& g, const char* name) {
  if (g.x > 0x7fffffff || g.y > 65535) {
    throw std::runtime_error(std::string(name) + ": too large for one launch (" + std::to_string(g.x) + " x " +
                             std::to_string(g.y) + " blocks); pass fewer rows at a time");
  }
}

#if defined(__CUDACC__)
template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), const Grid& g, A&&... args) {
  if (g.x == 0) return;
  check_grid(g, name);
  if (g.most_shared > 0) {
    const cudaError_t granted =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(g.most_shared));
    if (granted != cudaSuccess) {
      cudaGetLastError();  // said here, and not once more by whoever asks next
      throw std::runtime_error(
          std::string("mmkd: ") + name + " needs " + std::to_string(g.most_shared) +
          " bytes of shared memory a block, more than this GPU has: " + cudaGetErrorString(granted));
    }
  }
  const dim3 blocks(static_cast<unsigned>(g.x), static_cast<unsigned>(g.y));
  kernel<<<blocks, g.block, static_cast<size_t>(g.shared), static_cast<cudaStream_t>(g.stream)>>>(
      std::forward<A>(args)...);
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("mmkd: launch of ") + name + " failed: " + cudaGetErrorString(status));
  }
}
#else
template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), const Grid& g, A&&... args) {
  if (g.x == 0) return;
  check_grid(g, name);
  simt::run(name, reinterpret_cast<const void*>(kernel), g.x, g.y, g.block, g.shared, [&] { kernel(args...); });
}
#endif

}  // namespace mmkd::cuda
