// LightGCN propagation as other ops call it.
#pragma once
#include "check.h"

namespace mmkd {

// The op `propagate`, or with `mixed` `propagate_mixed`. name: what the caller's x is called.
Tensor propagate_as(const Tensor& rowptr, const Tensor& col, const Tensor& scale, const Tensor& x, int64_t num_layers,
                    const OptTensor& rows, bool mixed, const char* name = "x");

}  // namespace mmkd
