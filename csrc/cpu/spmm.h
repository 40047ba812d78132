// The sparse product for other ops of this library.
#pragma once
#include "cpu/spmm_kernel.h"

namespace mmkd {

// Runs the kernel over all rows in torch's threads; raises for a malformed matrix. `num_rows`, `nnz`, `rowptr`, `col` and
// `col64` of the arguments say what the matrix is.
void run_spmm(const SpmmArgs& args);

}  // namespace mmkd
