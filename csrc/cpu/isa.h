// Which instruction set the CPU kernels run with. Kernels are compiled once per set into mmkd::<set>::.
#pragma once

namespace mmkd {

enum class Isa : int { generic, avx2, avx512 };

// The set in use: the best the processor has, or the one named by MMKD_CPU_ISA or set_isa().
Isa isa();
const char* isa_name(Isa isa);
bool isa_supported(Isa isa);
// Raises std::runtime_error for an unknown name or a set that this processor or build lacks.
void set_isa(const char* name);

#if defined(MMKD_X86)
#define MMKD_ON_ISA(call)                                      \
  (::mmkd::isa() == ::mmkd::Isa::avx512 ? ::mmkd::avx512::call \
   : ::mmkd::isa() == ::mmkd::Isa::avx2 ? ::mmkd::avx2::call   \
                                        : ::mmkd::generic::call)
// Declares a kernel entry point in every namespace it is compiled into.
#define MMKD_KERNEL(declaration) \
  namespace generic {            \
  declaration;                   \
  }                              \
  namespace avx2 {               \
  declaration;                   \
  }                              \
  namespace avx512 {             \
  declaration;                   \
  }
#else
#define MMKD_ON_ISA(call) ::mmkd::generic::call
#define MMKD_KERNEL(declaration) \
  namespace generic {            \
  declaration;                   \
  }
#endif

}  // namespace mmkd
