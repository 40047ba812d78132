#include "cpu/processor.h"

#include <algorithm>
#include <cstdlib>

#if defined(MMKD_X86)
#include <cpuid.h>
#endif

namespace mmkd {
namespace {

constexpr int64_t kLeast = int64_t{32} << 20;

const char* setting(const char* name) {
  const char* text = std::getenv(name);
  return text && *text ? text : nullptr;
}

#if defined(MMKD_X86)
// The caches are listed one by one, with the same fields, by Intel in leaf 4 and by AMD in another.
int64_t largest_cache(unsigned leaf) {
  constexpr unsigned kMost = 16;
  int64_t largest = 0;
  for (unsigned i = 0; i < kMost; ++i) {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (!__get_cpuid_count(leaf, i, &eax, &ebx, &ecx, &edx) || (eax & 31) == 0) break;
    const int64_t ways = (ebx >> 22) + 1, partitions = (ebx >> 12 & 1023) + 1, line = (ebx & 4095) + 1;
    largest = std::max(largest, ways * partitions * line * (static_cast<int64_t>(ecx) + 1));
  }
  return largest;
}

bool intel() { return __builtin_cpu_is("intel"); }
int64_t cache_said() { return largest_cache(intel() ? 4 : 0x8000001Du); }
#else
bool intel() { return false; }
int64_t cache_said() { return 0; }
#endif

}  // namespace

bool prefetches_far() {
  static const bool far = [] {
    const char* text = setting("MMKD_FAR_PREFETCH");
    return text ? *text != '0' : !intel();
  }();
  return far;
}

int64_t last_level_cache() {
  static const int64_t bytes = [] {
    const char* text = setting("MMKD_CACHE_MB");
    if (text) return std::clamp<int64_t>(std::strtol(text, nullptr, 10), 1, int64_t{1} << 20) << 20;
    return std::max(kLeast, cache_said());
  }();
  return bytes;
}

}  // namespace mmkd
