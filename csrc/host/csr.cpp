#include "host/csr.h"

#include <algorithm>
#include <limits>

#include "host/check.h"

namespace mmkd::host {
namespace {

void check_bound(const char* name, int64_t n) {
  if (n < 0 || n > std::numeric_limits<int32_t>::max()) refuse(name, ": expected 0 to 2^31 - 1, got ", n);
}

// Where each key's run begins, [bound + 1].
template <class Key>
std::vector<int64_t> starts_of(const Key* keys, int64_t n, int64_t bound) {
  std::vector<int64_t> start(bound + 1, 0);
  for (int64_t i = 0; i < n; ++i) ++start[keys[i] + 1];
  for (int64_t k = 0; k < bound; ++k) start[k + 1] += start[k];
  return start;
}

void merge_duplicates(Csr& m) {
  int64_t kept = 0, begin = 0;
  for (size_t r = 0; r + 1 < m.rowptr.size(); ++r) {
    const int64_t end = m.rowptr[r + 1], first = kept;
    for (int64_t j = begin; j < end; ++j) {
      if (kept == first || m.col[kept - 1] != m.col[j]) m.col[kept++] = m.col[j];
    }
    begin = end;
    m.rowptr[r + 1] = kept;
  }
  m.col.resize(kept);
}

}  // namespace

template <class Col>
bool check_csr(const CsrView<Col>& m) {
  if (m.num_rows < 0) refuse("rowptr: expected num_rows + 1 entries, got none");
  if (m.rowptr[0] != 0 || m.rowptr[m.num_rows] != m.nnz) {
    refuse("rowptr: expected to start at 0 and end at len(col) = ", m.nnz, ", got ", m.rowptr[0], " and ",
           m.rowptr[m.num_rows]);
  }
  for (int64_t r = 0; r < m.num_rows; ++r) {
    if (m.rowptr[r] > m.rowptr[r + 1]) {
      refuse("rowptr: falls from ", m.rowptr[r], " to ", m.rowptr[r + 1], " at row ", r);
    }
  }
  bool ascending = true;
  for (int64_t r = 0; r < m.num_rows; ++r) {
    for (int64_t j = m.rowptr[r]; j < m.rowptr[r + 1]; ++j) {
      if (m.col[j] < 0 || static_cast<int64_t>(m.col[j]) >= m.num_cols) {
        refuse("col: entry ", j, " (row ", r, ") is ", m.col[j], ", expected [0, ", m.num_cols, ")");
      }
      ascending &= j == m.rowptr[r] || m.col[j - 1] < m.col[j];
    }
  }
  return ascending;
}
template bool check_csr(const CsrView<int32_t>&);
template bool check_csr(const CsrView<int64_t>&);

// Two stable counting sorts, by column and then by row.
Csr csr_from_edges(const int64_t* rows, const int64_t* cols, int64_t num_edges, int64_t num_rows, int64_t num_cols) {
  check_bound("num_rows", num_rows);
  check_bound("num_cols", num_cols);
  check_ids("rows", rows, num_edges, num_rows);
  check_ids("cols", cols, num_edges, num_cols);
  struct Edge {
    int32_t row, col;
  };
  std::vector<Edge> by_col(num_edges);
  std::vector<int64_t> next = starts_of(cols, num_edges, num_cols);
  for (int64_t i = 0; i < num_edges; ++i) {
    by_col[next[cols[i]]++] = {static_cast<int32_t>(rows[i]), static_cast<int32_t>(cols[i])};
  }
  Csr out{starts_of(rows, num_edges, num_rows), std::vector<int32_t>(num_edges)};
  next = out.rowptr;
  for (const Edge& e : by_col) out.col[next[e.row]++] = e.col;
  merge_duplicates(out);
  return out;
}

Csr csr_transpose(const CsrView<int32_t>& m) {
  check_bound("num_cols", m.num_cols);
  check_csr(m);
  check_bound("num_rows", m.num_rows);
  Csr out{starts_of(m.col, m.nnz, m.num_cols), std::vector<int32_t>(m.nnz)};
  std::vector<int64_t> next = out.rowptr;
  for (int64_t r = 0; r < m.num_rows; ++r) {
    for (int64_t j = m.rowptr[r]; j < m.rowptr[r + 1]; ++j) out.col[next[m.col[j]]++] = static_cast<int32_t>(r);
  }
  return out;
}

Csr csr_rows(const CsrView<int32_t>& m, const int64_t* rows, int64_t num_rows) {
  check_ids("rows", rows, num_rows, m.num_rows);
  Csr out{std::vector<int64_t>(num_rows + 1, 0), {}};
  for (int64_t i = 0; i < num_rows; ++i) {
    const int64_t lo = m.rowptr[rows[i]], hi = m.rowptr[rows[i] + 1];
    if (lo < 0 || lo > hi || hi > m.nnz) {
      refuse("rowptr: row ", rows[i], " spans [", lo, ", ", hi, "), expected a range within [0, ", m.nnz, "]");
    }
    out.rowptr[i + 1] = out.rowptr[i] + hi - lo;
  }
  out.col.resize(out.rowptr[num_rows]);
  for (int64_t i = 0; i < num_rows; ++i) {
    std::copy(m.col + m.rowptr[rows[i]], m.col + m.rowptr[rows[i] + 1], out.col.begin() + out.rowptr[i]);
  }
  return out;
}

}  // namespace mmkd::host
