// A batch's nodes, each once, and where its users and items are among them.
#pragma once
#include <cstdint>
#include <vector>

namespace mmkd::host {

struct BatchView {
  const int64_t* users;       // [size]
  const int64_t* candidates;  // [size, width]
  const int64_t* extra;       // [num_extra] node ids
  int64_t size, width, num_extra;
  int64_t num_users, num_items;
};

// Nodes are users 0..num_users-1, then items.
class Compact {
 public:
  // Refuses an id out of range.
  explicit Compact(const BatchView& batch);

  int64_t num_rows() const { return rank_.back(); }
  int64_t num_local_users() const { return position(num_users_); }

  // rows [num_rows], ascending node ids.
  void rows(int64_t* out) const;
  // users [size] and candidates [size, width] as positions among the users and among the items of `rows`; extra
  // [num_extra] as positions in `rows`; counts [num_rows]: how often a row stands in (user, candidate 0, candidate 1).
  void localise(const BatchView& batch, int64_t* users, int64_t* candidates, int64_t* extra, float* counts) const;

 private:
  void mark(int64_t node) { bits_[node >> 6] |= uint64_t{1} << (node & 63); }
  void rank();
  // How many marked nodes are below `node`.
  int64_t position(int64_t node) const {
    return rank_[node >> 6] + __builtin_popcountll(bits_[node >> 6] & ((uint64_t{1} << (node & 63)) - 1));
  }

  int64_t num_users_;
  std::vector<uint64_t> bits_;  // a bit a node
  std::vector<int64_t> rank_;   // marked nodes before each word of bits, and in all
};

}  // namespace mmkd::host
