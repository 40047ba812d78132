#include "cpu/blocks.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <unordered_map>
#include <vector>

#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)  // the sanitizer is to see every end of every tensor
#define MMKD_KEEPS_BLOCKS 1
#include <sys/mman.h>

// torch >= 2.11; null in an older one, where memory comes from torch alone.
extern "C" __attribute__((weak, visibility("default"))) int32_t
torch_from_blob(void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset,
                int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* out, int32_t layout,
                const uint8_t* opaque, int64_t opaque_size, void (*deleter)(void* data, void* context), void* context);
#endif

namespace mmkd {
namespace {

Tensor torch_empty(std::initializer_list<int64_t> sizes, const Tensor& like, ScalarType type) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), type);
}

#ifdef MMKD_KEEPS_BLOCKS

constexpr size_t kHuge = size_t{1} << 21;  // bytes of a huge page
constexpr size_t kLeast = 2 * kHuge;       // smaller results are torch's own

// Blocks of whole huge pages. Those that nobody holds are kept up to a limit; the one given back last is used first,
// being the likeliest to be in a cache, and beyond the limit the oldest go back to the system.
class Blocks {
 public:
  // At least `asked` bytes.
  void* take(size_t asked) {
    const size_t bytes = (asked + kHuge - 1) / kHuge * kHuge;
    const std::lock_guard<std::mutex> hold(mutex_);
    auto best = free_.end();
    for (auto b = free_.begin(); b != free_.end(); ++b) {
      if (b->bytes >= bytes && b->bytes <= bytes + bytes / 4 && (best == free_.end() || b->bytes <= best->bytes))
        best = b;
    }
    if (best == free_.end()) return map(bytes, asked / kHuge * kHuge);
    void* at = best->at;
    kept_ -= best->bytes;
    free_.erase(best);
    return at;
  }

  void give(void* at) {
    const std::lock_guard<std::mutex> hold(mutex_);
    free_.push_back({at, sizes_.at(at)});
    kept_ += free_.back().bytes;
    shrink(limit_);
  }

  // Bytes that went back to the system.
  int64_t release() {
    const std::lock_guard<std::mutex> hold(mutex_);
    const size_t before = kept_;
    shrink(0);
    return static_cast<int64_t>(before - kept_);
  }

 private:
  struct Block {
    void* at;
    size_t bytes;
  };

  static size_t limit() {
    const char* text = std::getenv("MMKD_KEEP_MB");
    const long mb = text ? std::strtol(text, nullptr, 10) : 256;
    return static_cast<size_t>(std::clamp(mb, 0L, 1L << 20)) << 20;
  }

  // The first `huge` bytes of it in huge pages: what is asked for mostly ends within one, and the rest of that would be
  // memory nobody uses.
  void* map(size_t bytes, size_t huge) {
    void* got = mmap(nullptr, bytes + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (got == MAP_FAILED) return nullptr;
    const uintptr_t from = reinterpret_cast<uintptr_t>(got), at = (from + kHuge - 1) & ~(kHuge - 1);
    if (at > from) munmap(got, at - from);
    if (at < from + kHuge) munmap(reinterpret_cast<void*>(at + bytes), from + kHuge - at);
    madvise(reinterpret_cast<void*>(at), huge, MADV_HUGEPAGE);
    sizes_[reinterpret_cast<void*>(at)] = bytes;
    return reinterpret_cast<void*>(at);
  }

  void shrink(size_t limit) {
    auto end = free_.begin();
    for (; end != free_.end() && kept_ > limit; ++end) {
      kept_ -= end->bytes;
      sizes_.erase(end->at);
      munmap(end->at, end->bytes);
    }
    free_.erase(free_.begin(), end);
  }

  std::mutex mutex_;
  std::vector<Block> free_;                  // the one given back last at the end
  std::unordered_map<void*, size_t> sizes_;  // of all blocks, held or not
  size_t kept_ = 0;
  const size_t limit_ = limit();
};

// Never destroyed: tensors may die after everything else.
Blocks& blocks() {
  static Blocks* all = new Blocks;
  return *all;
}

void give_back(void* at, void*) { blocks().give(at); }

#endif

int64_t release_memory() {
#ifdef MMKD_KEEPS_BLOCKS
  return blocks().release();
#else
  return 0;
#endif
}

}  // namespace

Tensor empty(std::initializer_list<int64_t> sizes, const Tensor& like, ScalarType type) {
#ifdef MMKD_KEEPS_BLOCKS
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  size_t bytes = type == ScalarType::Double || type == ScalarType::Long                                  ? 8
                 : type == ScalarType::Float || type == ScalarType::Int                                  ? 4
                 : type == ScalarType::BFloat16 || type == ScalarType::Half || type == ScalarType::Short ? 2
                                                                                                         : 0;
  for (int64_t size : sizes) bytes *= static_cast<size_t>(size);
  if (bytes < kLeast || !torch_from_blob || !like.is_cpu()) return torch_empty(sizes, like, type);
  void* at = blocks().take(bytes);
  if (!at) return torch_empty(sizes, like, type);  // whose own message says how much was asked for
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t axis = sizes.size(); axis-- > 1;) strides[axis - 1] = strides[axis] * sizes.begin()[axis];
  const auto device = like.device();
  AtenTensorHandle handle;
  const int32_t failed =
      torch_from_blob(at, static_cast<int64_t>(sizes.size()), sizes.begin(), strides.data(), 0, to<int32_t>(from(type)),
                      to<int32_t>(from(device.type())), device.index(), &handle,
                      to<int32_t>(from(torch::headeronly::Layout::Strided)), nullptr, 0, give_back, nullptr);
  if (!failed) return Tensor(handle);
  blocks().give(at);
#endif
  return torch_empty(sizes, like, type);
}

}  // namespace mmkd

STABLE_TORCH_LIBRARY_IMPL(mmkd, CompositeExplicitAutograd, m) {
  m.impl("release_memory", TORCH_BOX(&mmkd::release_memory));
}
