// Element types as kernels know them: plain numbers, so that kernels need no torch header.
#pragma once
#include <cstdint>

namespace mmkd {

enum class DType : int { f32, f64, bf16, f16 };

struct bf16_t {
  uint16_t bits;
};
struct f16_t {
  uint16_t bits;
};

}  // namespace mmkd
