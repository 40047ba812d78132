// Gradients of two embedding tables from a batch of weighted (user, item) pairs, without atomics: the batch is grouped
// by the row it touches, and every row is summed in the batch's order and written once. Bit-equal for any number of
// threads.
#pragma once
#include <atomic>
#include <memory>
#include <tuple>
#include <vector>

#include "cpu/losses.h"
#include "cpu/scatter_kernel.h"

namespace mmkd {

// The positions of an index list that name a row of [first, last), grouped by that row.
class RowGroups {
 public:
  RowGroups(int64_t n, int64_t num_rows, int64_t first, int64_t last);
  // False, and nothing usable, if an index is outside [0, num_rows). Allocates nothing, throws nothing.
  bool build(const int64_t* index);

  int64_t first, last;                       // the range of rows
  std::unique_ptr<uint64_t[]> order;         // row << 32 | position, sorted
  std::unique_ptr<uint32_t[]> rows, starts;  // [count], [count + 1]
  int64_t count = 0;

  // These rows of a result as beginning with rows of `source`, the one at an index's position for the row it names.
  BaseRows base(int64_t shift, void* source) const {
    return {order.get(), rows.get(), starts.get(), count, shift, source};
  }

 private:
  std::unique_ptr<uint64_t[]> spare_;
  int64_t n_, num_rows_;
};

// Two tables of embeddings.
struct PairTables {
  DType dtype;
  const void* user_emb;  // [num_users, d]
  const void* item_emb;  // [num_items, d]
  int64_t num_users, num_items, d;
};

inline PairTables tables_of(const Tensor& user_emb, const Tensor& item_emb) {
  return {dtype_of(user_emb), user_emb.const_data_ptr(), item_emb.const_data_ptr(),
          user_emb.size(0),   item_emb.size(0),          user_emb.size(1)};
}

// Where a gradient goes, and what its rows begin as.
struct GradTable {
  void* out;  // null: not needed
  BaseRows base;
};

// Pair (b, k) of weight w adds w * item_emb[c_bk] to the gradient of user u_b and w * user_emb[u_b] to that of item
// c_bk.
class PairGrads {
 public:
  // users: [batch], candidates: [batch, fan].
  PairGrads(const PairTables& tables, const int64_t* users, const int64_t* candidates, int64_t batch, int64_t fan,
            bool need_user, bool need_item);

  // Grouping, for the caller to run beside his own work: group(t) for t in [0, tasks()), in any order or at once.
  int64_t tasks() const { return static_cast<int64_t>(item_groups_.size() + user_groups_.size()) + 2; }
  void group(int64_t task);
  // Whether every index was in range; a gradient may only be written if so.
  bool good() const { return good_.load(); }

  // weights: [batch, fan], accumulator type. Gradients in the tables' dtype; the users' is its base where it was not
  // needed of the pairs.
  void write(const void* weights, const GradTable& user, const GradTable& item) const;
  // Into new tensors; empty where not needed.
  std::tuple<Tensor, Tensor> write(const void* weights, const Tensor& user_emb, const Tensor& item_emb) const;

 private:
  PairTables tables_;
  const int64_t *users_, *candidates_;
  int64_t batch_, fan_;
  bool need_user_, need_item_;
  std::atomic<bool> good_{true};
  std::vector<RowGroups> item_groups_, user_groups_;
};

}  // namespace mmkd
