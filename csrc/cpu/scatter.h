// Gradients into embedding tables as a sparse product: deterministic for any number of threads, each row written once.
#pragma once
#include <vector>

#include "check.h"

namespace mmkd {

// out[r] = sum over entries e with target[e] == r of coef[e] * table[source[e]], in order of e; rows without an entry
// are zero. All ids must have been checked. out: [num_rows, d], dtype of `table`.
template <class A>
struct RowEntries {
  std::vector<int64_t> target, source;
  std::vector<A> coef;  // the type sums are kept in

  explicit RowEntries(int64_t n) : target(n), source(n), coef(n) {}
};

Tensor scatter_rows(const RowEntries<float>& entries, const Tensor& table, int64_t num_rows);
Tensor scatter_rows(const RowEntries<double>& entries, const Tensor& table, int64_t num_rows);

// Raises, naming the argument and the entry, unless all of `ids` lie in [0, bound).
void check_ids(const Tensor& ids, const char* name, int64_t bound);

}  // namespace mmkd
