#include "cpu/scatter.h"

#include "cpu/parallel.h"
#include "cpu/spmm.h"

namespace mmkd {
namespace {

// Entries sorted by target with a counting sort, which keeps the order of equal targets: a CSR matrix.
template <class A>
Tensor scatter(const RowEntries<A>& entries, const Tensor& table, int64_t num_rows) {
  const int64_t n = static_cast<int64_t>(entries.target.size());
  std::vector<int64_t> rowptr(num_rows + 1, 0), next, col(n);
  std::vector<A> value(n);
  for (int64_t r : entries.target) ++rowptr[r + 1];
  for (int64_t r = 0; r < num_rows; ++r) rowptr[r + 1] += rowptr[r];
  next.assign(rowptr.begin(), rowptr.end() - 1);
  for (int64_t e = 0; e < n; ++e) {
    const int64_t at = next[entries.target[e]]++;
    col[at] = entries.source[e];
    value[at] = entries.coef[e];
  }
  Tensor out = empty({num_rows, table.size(1)}, table);
  SpmmArgs a{};
  a.dtype = dtype_of(table);
  a.col64 = true;
  a.rowptr = rowptr.data();
  a.col = col.data();
  a.x = table.const_data_ptr();
  a.value = value.data();
  a.out = out.mutable_data_ptr();
  a.num_rows = num_rows;
  a.num_cols = table.size(0);
  a.nnz = n;
  a.d = table.size(1);
  a.alpha = 1.0;
  run_spmm(a);
  return out;
}

}  // namespace

Tensor scatter_rows(const RowEntries<float>& entries, const Tensor& table, int64_t num_rows) {
  return scatter(entries, table, num_rows);
}
Tensor scatter_rows(const RowEntries<double>& entries, const Tensor& table, int64_t num_rows) {
  return scatter(entries, table, num_rows);
}

void check_ids(const Tensor& ids, const char* name, int64_t bound) {
  check_type(ids, name, ScalarType::Long);
  MMKD_CHECK(ids.is_contiguous(), name, ": expected a contiguous tensor");
  const int64_t* p = data<int64_t>(ids);
  const int64_t n = ids.numel();
  uint64_t worst = 0;
  for (int64_t i = 0; i < n; ++i) worst = std::max(worst, static_cast<uint64_t>(p[i]));
  if (n == 0 || worst < static_cast<uint64_t>(bound)) return;
  for (int64_t i = 0; i < n; ++i) {
    MMKD_CHECK(p[i] >= 0 && p[i] < bound, name, ": entry ", i, " is ", p[i], ", expected [0, ", bound, ")");
  }
}

}  // namespace mmkd
