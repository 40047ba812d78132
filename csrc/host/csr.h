// Sparse patterns on the host: what makes one well formed, and how one is built from pairs of ids.
#pragma once
#include <cstdint>
#include <vector>

namespace mmkd::host {

template <class Col>
struct CsrView {
  const int64_t* rowptr;  // [num_rows + 1]
  const Col* col;         // [nnz]
  int64_t num_rows, num_cols, nnz;
};

struct Csr {
  std::vector<int64_t> rowptr;
  std::vector<int32_t> col;
};

// Refuses a rowptr that does not run from 0 to nnz without falling, and a column outside [0, num_cols). Returns whether
// the columns of every row are strictly ascending.
template <class Col>
bool check_csr(const CsrView<Col>& m);

// The distinct pairs (rows[i], cols[i]) as CSR, columns ascending.
Csr csr_from_edges(const int64_t* rows, const int64_t* cols, int64_t num_edges, int64_t num_rows, int64_t num_cols);

// The transposed pattern, columns ascending.
Csr csr_transpose(const CsrView<int32_t>& m);

// Some rows of a pattern, in the order asked for. Of `m` it checks what it reads.
Csr csr_rows(const CsrView<int32_t>& m, const int64_t* rows, int64_t num_rows);

}  // namespace mmkd::host
