#include "host/compact.h"

#include "host/check.h"

namespace mmkd::host {
namespace {

// Words that hold a bit for each of `nodes` and one more.
int64_t words_of(int64_t nodes) { return nodes / 64 + 1; }

int64_t missing(int64_t n, int64_t multiple) { return (multiple - n % multiple) % multiple; }

void check(const BatchView& b, int64_t multiple) {
  if (b.num_users < 0 || b.num_items < 0) {
    refuse("num_users, num_items: expected >= 0, got ", b.num_users, " and ", b.num_items);
  }
  if (multiple < 1 || multiple > 1 << 20) refuse("multiple: expected 1 to 2^20, got ", multiple);
  check_ids("users", b.users, b.size, b.num_users);
  check_ids("candidates", b.candidates, b.size * b.width, b.num_items);
  check_ids("extra", b.extra, b.num_extra, b.num_users + b.num_items);
}

}  // namespace

Compact::Compact(const BatchView& b, int64_t multiple) {
  check(b, multiple);
  all_.assign(words_of(b.num_users + b.num_items), 0);
  touched_ = all_;
  rank_.assign(all_.size() + 1, 0);
  num_touched_ = MMKD_ON_ISA(mark_nodes(b, bits()));
  const int64_t word = b.num_users >> 6;
  const uint64_t below = (uint64_t{1} << (b.num_users & 63)) - 1;
  num_own_ = rank_[word] + __builtin_popcountll(all_[word] & below);
  if (b.num_users && b.num_items) {
    filling_ = {missing(num_own_, multiple), missing(rank_.back() - num_own_, multiple),
                missing(num_touched_, multiple)};
  }
}

void Compact::localise(const BatchView& b, const Localised& out) {
  MMKD_ON_ISA(localise_nodes(b, bits(), num_own_, filling_, out));
}

}  // namespace mmkd::host
