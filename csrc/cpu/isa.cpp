#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace mmkd {
namespace {

constexpr Isa kAll[] = {Isa::generic, Isa::avx2, Isa::avx512};

Isa parse(const std::string& name) {
  for (Isa i : kAll) {
    if (name != isa_name(i)) continue;
    if (!isa_supported(i)) {
      throw std::runtime_error("MMKD_CPU_ISA: this processor or build has no '" + name + "' kernels");
    }
    return i;
  }
  throw std::runtime_error("MMKD_CPU_ISA: expected generic, avx2 or avx512, got '" + name + "'");
}

Isa best() {
  if (isa_supported(Isa::avx512)) return Isa::avx512;
  return isa_supported(Isa::avx2) ? Isa::avx2 : Isa::generic;
}

// -1 until first asked for, so that a wrong MMKD_CPU_ISA raises in the op and not while the library loads.
std::atomic<int> chosen{-1};

}  // namespace

const char* isa_name(Isa isa) { return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "generic"; }

bool isa_supported(Isa isa) {
#if defined(MMKD_X86)
  if (isa == Isa::avx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && isa_supported(Isa::avx2);
  }
  // Every processor with AVX2 and FMA also has F16C.
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return isa == Isa::generic;
}

Isa isa() {
  const int now = chosen.load(std::memory_order_relaxed);
  if (now >= 0) return static_cast<Isa>(now);
  const char* wanted = std::getenv("MMKD_CPU_ISA");
  const Isa pick = wanted && *wanted ? parse(wanted) : best();
  chosen.store(static_cast<int>(pick), std::memory_order_relaxed);
  return pick;
}

void set_isa(const char* name) {
  chosen.store(static_cast<int>(*name ? parse(name) : best()), std::memory_order_relaxed);
}

}  // namespace mmkd
