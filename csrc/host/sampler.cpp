#include "host/sampler.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <new>
#include <thread>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "host/check.h"

namespace mmkd::host {
namespace {

// Rows are read at random: huge pages, where the system gives them on request, save a page walk for each.
uint32_t* new_items(int64_t n) {
  constexpr size_t huge = size_t{1} << 21;
  const size_t bytes = static_cast<size_t>(n) * sizeof(uint32_t);
  const size_t align = bytes >= huge ? huge : kLine * sizeof(uint32_t);
  auto* p = static_cast<uint32_t*>(std::aligned_alloc(align, (bytes + align - 1) / align * align));
  if (!p) throw std::bad_alloc();
#if defined(__linux__)
  if (align == huge) madvise(p, (bytes + align - 1) / align * align, MADV_HUGEPAGE);
#endif
  return p;
}

}  // namespace

void Sampler::Free::operator()(uint32_t* p) const { std::free(p); }
template <class Col>
Sampler::Sampler(const CsrView<Col>& train, int rounds, bool by_pair) : rounds_(static_cast<uint32_t>(rounds)) {
  constexpr int64_t most = std::numeric_limits<uint32_t>::max();
  if (rounds < 1 || rounds > 1 << 14) refuse("rounds: expected 1 to 2^14, got ", rounds);
  if (train.num_cols < 1 || train.num_cols > most) refuse("num_items: expected 1 to 2^32 - 1, got ", train.num_cols);
  if (train.num_rows > most) refuse("num_users: expected up to 2^32 - 1, got ", train.num_rows);
  if (!check_csr(train)) refuse("col: expected strictly ascending items in every row; sort them and merge duplicates");
  num_items_ = static_cast<uint32_t>(train.num_cols);
  int64_t full = 0, first_full = -1, filled = 0;
  for (int64_t u = 0; u < train.num_rows; ++u) {
    const int64_t size = train.rowptr[u + 1] - train.rowptr[u];
    if (size == train.num_cols && full++ == 0) first_full = u;
    const int64_t tickets = by_pair ? size : size > 0;  // equal chances for every pair, or for every user
    rows_.insert(rows_.end(), tickets, {filled, static_cast<uint32_t>(u), static_cast<uint32_t>(size)});
    filled += (size + kLine - 1) / kLine * kLine;
  }
  if (static_cast<int64_t>(rows_.size()) > most)
    refuse("train: expected up to 2^32 - 1 interactions, got ", rows_.size());
  if (rows_.empty()) refuse("train holds no interactions; there is nothing to sample");
  if (full) {
    refuse("user ", first_full, " has all ", num_items_, " items in train (", full,
           " such users), so no negative exists; remove the user or add items");
  }
  item_.reset(new_items(filled));
  std::fill_n(item_.get(), filled, kNoItem);
  for (size_t t = 0; t < rows_.size(); t += by_pair ? rows_[t].size : 1) {
    const UserRow& r = rows_[t];
    std::copy_n(train.col + train.rowptr[r.user], r.size, item_.get() + r.begin);
  }
}
template Sampler::Sampler(const CsrView<int32_t>&, int, bool);
template Sampler::Sampler(const CsrView<int64_t>&, int, bool);

void Sampler::batch(const Place& place, int64_t size, int64_t num_negatives, int64_t* users, int64_t* candidates,
                    int threads) const {
  const DrawArgs args{rows_.data(), item_.get(), static_cast<uint32_t>(rows_.size()),
                      num_items_,   rounds_,     place.seed,
                      place.epoch,  place.step,  num_negatives,
                      users,        candidates};
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
