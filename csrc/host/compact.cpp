#include "host/compact.h"

#include <algorithm>

#include "host/check.h"

namespace mmkd::host {
Compact::Compact(const BatchView& b) : num_users_(b.num_users) {
  if (b.num_users < 0 || b.num_items < 0) {
    refuse("num_users, num_items: expected >= 0, got ", b.num_users, " and ", b.num_items);
  }
  check_ids("users", b.users, b.size, b.num_users);
  check_ids("candidates", b.candidates, b.size * b.width, b.num_items);
  check_ids("extra", b.extra, b.num_extra, b.num_users + b.num_items);
  const int64_t words = (b.num_users + b.num_items) / 64 + 1;
  bits_.assign(words, 0);
  for (int64_t i = 0; i < b.size; ++i) mark(b.users[i]);
  for (int64_t i = 0; i < b.size * b.width; ++i) mark(num_users_ + b.candidates[i]);
  for (int64_t i = 0; i < b.num_extra; ++i) mark(b.extra[i]);
  rank();
}

void Compact::rank() {
  rank_.assign(bits_.size() + 1, 0);
  for (size_t w = 0; w < bits_.size(); ++w) rank_[w + 1] = rank_[w] + __builtin_popcountll(bits_[w]);
}

void Compact::rows(int64_t* out) const {
  for (size_t w = 0; w < bits_.size(); ++w) {
    for (uint64_t left = bits_[w]; left; left &= left - 1) {
      *out++ = static_cast<int64_t>(w) * 64 + __builtin_ctzll(left);
    }
  }
}

void Compact::localise(const BatchView& b, int64_t* users, int64_t* candidates, int64_t* extra, float* counts) const {
  const int64_t first_item = num_local_users();
  std::fill_n(counts, num_rows(), 0.0f);
  for (int64_t i = 0; i < b.size; ++i) {
    users[i] = position(b.users[i]);
    counts[users[i]] += 1;
    for (int64_t k = 0; k < b.width; ++k) {
      const int64_t where = position(num_users_ + b.candidates[i * b.width + k]);
      candidates[i * b.width + k] = where - first_item;
      if (k < 2) counts[where] += 1;
    }
  }
  for (int64_t i = 0; i < b.num_extra; ++i) extra[i] = position(b.extra[i]);
}

}  // namespace mmkd::host
