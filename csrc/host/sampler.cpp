#include "host/sampler.h"

#include <algorithm>
#include <limits>
#include <thread>

#include "host/check.h"
#include "host/sampler_kernel.h"

namespace mmkd::host {
template <class Col>
Sampler::Sampler(const CsrView<Col>& train, int rounds) : rounds_(static_cast<uint32_t>(rounds)) {
  constexpr int64_t most = std::numeric_limits<uint32_t>::max();
  if (rounds < 1 || rounds > 1 << 14) refuse("rounds: expected 1 to 2^14, got ", rounds);
  if (train.num_cols < 1 || train.num_cols > most) refuse("num_items: expected 1 to 2^32 - 1, got ", train.num_cols);
  if (train.num_rows > most) refuse("num_users: expected up to 2^32 - 1, got ", train.num_rows);
  if (!check_csr(train)) refuse("col: expected strictly ascending items in every row; sort them and merge duplicates");
  num_items_ = static_cast<uint32_t>(train.num_cols);
  int64_t full = 0, first_full = -1;
  for (int64_t u = 0; u < train.num_rows; ++u) {
    const int64_t degree = train.rowptr[u + 1] - train.rowptr[u];
    if (degree > 0) active_.push_back(static_cast<uint32_t>(u));
    if (degree == train.num_cols && full++ == 0) first_full = u;
  }
  if (active_.empty()) refuse("train holds no interactions; there is nothing to sample");
  if (full) {
    refuse("user ", first_full, " has all ", num_items_, " items in train (", full,
           " such users), so no negative exists; remove the user or add items");
  }
  rowptr_.assign(train.rowptr, train.rowptr + train.num_rows + 1);
  item_.reserve(train.nnz + kRowPad);
  item_.assign(train.col, train.col + train.nnz);
  item_.resize(train.nnz + kRowPad);
}
template Sampler::Sampler(const CsrView<int32_t>&, int);
template Sampler::Sampler(const CsrView<int64_t>&, int);

void Sampler::batch(const Place& place, int64_t size, int64_t num_negatives, int64_t* users, int64_t* candidates,
                    int threads) const {
  const DrawArgs args{rowptr_.data(), item_.data(), active_.data(), static_cast<uint32_t>(active_.size()), num_items_,
                      rounds_,        place.seed,   place.epoch,    place.step,                            num_negatives,
                      users,          candidates};
  const int64_t blocks = (size + kDrawn - 1) / kDrawn;
  const int64_t pieces = std::clamp<int64_t>(threads, 1, std::max<int64_t>(blocks, 1));
  const auto run = [&](int64_t p) {
    const int64_t begin = blocks * p / pieces * kDrawn, end = blocks * (p + 1) / pieces * kDrawn;
    MMKD_ON_ISA(draw(args, begin, std::min(end, size)));
  };
  isa();  // a wrong MMKD_CPU_ISA raises here and not in a thread
  std::vector<std::jthread> others;
  for (int64_t p = 1; p < pieces; ++p) others.emplace_back(run, p);
  run(0);
}

}  // namespace mmkd::host
