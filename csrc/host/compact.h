// A batch's nodes, each once, and where its users and items are among them.
#pragma once
#include <cstdint>
#include <vector>

#include "host/compact_kernel.h"

namespace mmkd::host {

class Compact {
 public:
  // Users, items and touched nodes are filled up to multiples of `multiple`, where there are any to fill up with.
  // Refuses an id out of range.
  Compact(const BatchView& batch, int64_t multiple);

  int64_t num_rows() const { return rank_.back() + filling_.users + filling_.items; }
  int64_t num_local_users() const { return num_own_ + filling_.users; }
  int64_t num_touched() const { return num_touched_ + filling_.touched; }

  // rows: ascending users, ascending items; those that fill up behind either.
  void localise(const BatchView& batch, const Localised& out);

 private:
  NodeBits bits() { return {all_.data(), touched_.data(), rank_.data(), static_cast<int64_t>(all_.size())}; }

  std::vector<uint64_t> all_, touched_;
  std::vector<int64_t> rank_;
  int64_t num_own_ = 0, num_touched_ = 0;
  Filling filling_{};
};

}  // namespace mmkd::host
