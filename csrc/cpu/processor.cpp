#include "cpu/processor.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(MMKD_X86)
#include <cpuid.h>
#endif

namespace mmkd {
namespace {

constexpr int64_t kLeast = int64_t{32} << 20;

// A whole number in [least, most] from the environment, or -1 where the variable is not set.
int64_t setting(const char* name, int64_t least, int64_t most) {
  const char* text = std::getenv(name);
  if (!text || !*text) return -1;
  char* end = nullptr;
  const long long value = std::strtoll(text, &end, 10);
  if (*end || value < least || value > most) {
    throw std::runtime_error(std::string(name) + ": expected a whole number from " + std::to_string(least) + " to " +
                             std::to_string(most) + ", got '" + text + "'");
  }
  return value;
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
    const int64_t wanted = setting("MMKD_FAR_PREFETCH", 0, 1);
    return wanted < 0 ? !intel() : wanted == 1;
  }();
  return far;
}

int64_t last_level_cache() {
  static const int64_t bytes = [] {
    const int64_t mb = setting("MMKD_CACHE_MB", 1, 1 << 20);
    return mb < 0 ? std::max(kLeast, cache_said()) : mb << 20;
  }();
  return bytes;
}

}  // namespace mmkd
