// Memory of the CPU ops' results.
#pragma once
#include <initializer_list>

#include "check.h"

namespace mmkd {

// A fresh tensor on the device of `like`. Results of 4 MB and more are built on blocks that are kept when the tensor
// dies and used again: a step asks for the same few tables each time, and what the C library's allocator hands out for
// them is often fresh pages, whose first touch costs several times what the kernel writes into them.
Tensor empty(std::initializer_list<int64_t> sizes, const Tensor& like, ScalarType type);

inline Tensor empty(std::initializer_list<int64_t> sizes, const Tensor& like) {
  return empty(sizes, like, like.scalar_type());
}

}  // namespace mmkd
