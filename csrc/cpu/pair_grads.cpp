#include "cpu/pair_grads.h"

#include <algorithm>
#include <bit>
#include <utility>

namespace mmkd {
namespace {

constexpr int kDigit = 11;  // widest radix digit, in bits
constexpr int kPasses = (32 + kDigit - 1) / kDigit;
constexpr int64_t kRowsAPiece = 1024;  // table rows a thread writes at a time
constexpr int64_t kFew = 256;          // pairs, and rows, that one thread is done with at once
constexpr int64_t kSortAPart = 2048;   // positions worth a thread of their own to sort

bool in_range(const int64_t* index, int64_t n, int64_t bound) {
  uint64_t worst = 0;
  for (int64_t i = 0; i < n; ++i) worst = std::max(worst, static_cast<uint64_t>(index[i]));
  return n == 0 || worst < static_cast<uint64_t>(bound);
}

template <class T>
std::unique_ptr<T[]> scratch(int64_t n) {
  return std::unique_ptr<T[]>(new T[n]);
}

}  // namespace

RowGroups::RowGroups(int64_t n, int64_t num_rows, int64_t first, int64_t last)
    : first(first),
      last(last),
      order(scratch<uint64_t>(n + 1)),
      rows(scratch<uint32_t>(n)),
      starts(scratch<uint32_t>(n + 1)),
      spare_(scratch<uint64_t>(n + 1)),
      n_(n),
      num_rows_(num_rows) {
  starts[0] = 0;
}

// A stable radix sort by row, so that the positions of a row stay in the batch's order.
bool RowGroups::build(const int64_t* index) {
  const uint64_t span = static_cast<uint64_t>(last - first);
  const int bits = span > 1 ? std::bit_width(span - 1) : 0;
  uint64_t worst = 0;
  int64_t n = 0;  // positions kept; written without a branch, one place more than there are
  for (int64_t i = 0; i < n_; ++i) {
    const uint64_t row = static_cast<uint64_t>(index[i]), local = row - static_cast<uint64_t>(first);
    worst = std::max(worst, row);
    order[n] = local << 32 | static_cast<uint64_t>(i);
    n += local < span;
  }
  if (n_ && worst >= static_cast<uint64_t>(num_rows_)) return false;
  const bool sorted = std::is_sorted(order.get(), order.get() + n);  // of others that is known after a few
  const int passes = sorted ? 0 : (bits + kDigit - 1) / kDigit, digit = passes ? (bits + passes - 1) / passes : 0;
  const uint32_t mask = (1u << digit) - 1;
  uint32_t place[kPasses][1 << kDigit];
  for (int p = 0; p < passes; ++p) std::fill_n(place[p], 1 << digit, 0u);
  for (int64_t i = 0; i < n; ++i) {
    for (int p = 0; p < passes; ++p) ++place[p][order[i] >> (32 + p * digit) & mask];
  }
  for (int p = 0; p < passes; ++p) {
    uint32_t before = 0;
    for (uint32_t v = 0; v <= mask; ++v) before += std::exchange(place[p][v], before);
    const int shift = 32 + p * digit;
    for (int64_t i = 0; i < n; ++i) spare_[place[p][order[i] >> shift & mask]++] = order[i];
    order.swap(spare_);
  }
  uint32_t last = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t row = static_cast<uint32_t>(order[i] >> 32);
    if (i == 0 || row != last) {
      rows[count] = row + static_cast<uint32_t>(first);
      starts[count++] = static_cast<uint32_t>(i);
    }
    last = row;
  }
  starts[count] = static_cast<uint32_t>(n);
  return true;
}

PairGrads::PairGrads(const PairTables& tables, const int64_t* users, const int64_t* candidates, int64_t batch,
                     int64_t fan, bool need_user, bool need_item)
    : tables_(tables),
      users_(users),
      candidates_(candidates),
      batch_(batch),
      fan_(fan),
      need_user_(need_user),
      need_item_(need_item) {
  const auto split = [](std::vector<RowGroups>& groups, int64_t n, int64_t rows) {
    // Sorting a long index list is shared out by ranges of rows.
    const int64_t parts = std::clamp<int64_t>(n / kSortAPart, 1, torch::stable::get_num_threads());
    for (int64_t p = 0; p < parts; ++p) groups.emplace_back(n, rows, rows * p / parts, rows * (p + 1) / parts);
  };
  if (need_item) split(item_groups_, batch * fan, tables.num_items);
  if (need_user) split(user_groups_, batch, tables.num_users);
}

void PairGrads::group(int64_t task) {
  const int64_t of_items = static_cast<int64_t>(item_groups_.size()),
                of_users = static_cast<int64_t>(user_groups_.size());
  bool good = true;
  if (task < of_items) {
    good = item_groups_[task].build(candidates_);
  } else if (task < of_items + of_users) {
    good = user_groups_[task - of_items].build(users_);
  } else if (task == of_items + of_users) {
    good = need_item_ || in_range(candidates_, batch_ * fan_, tables_.num_items);
  } else {
    good = need_user_ || in_range(users_, batch_, tables_.num_users);
  }
  if (!good) good_.store(false);
}

void PairGrads::write(const void* weights, const GradTable& user, const GradTable& item) const {
  const bool f64 = tables_.dtype == DType::f64;
  const int64_t d = tables_.d, acc = f64 ? 8 : 4, element = f64 ? 8 : tables_.dtype == DType::f32 ? 4 : 2;
  struct Piece {
    SumRowsArgs args;
    int64_t begin, end;
  };
  std::vector<Piece> pieces;
  std::vector<std::unique_ptr<char[]>> entries;
  const auto plan = [&](const std::vector<RowGroups>& all, int64_t table_rows, const void* source,
                        const int64_t* source_id, int64_t fan, int64_t share, const GradTable& grad) {
    for (const RowGroups& groups : all) {
      const int64_t n = static_cast<int64_t>(groups.starts[groups.count]) * fan, rows = groups.last - groups.first;
      SumRowsArgs a{};
      a.dtype = tables_.dtype;
      a.d = d;
      a.order = groups.order.get();
      a.rows = groups.rows.get();
      a.starts = groups.starts.get();
      a.groups = groups.count;
      a.source = source;
      a.source_id = source_id;
      a.weight = weights;
      a.fan = fan;
      a.share = share;
      entries.push_back(scratch<char>(n * 4));
      a.entry_id = reinterpret_cast<uint32_t*>(entries.back().get());
      entries.push_back(scratch<char>(n * acc));
      a.entry_weight = entries.back().get();
      a.out = grad.out;
      a.stream = past_caches(a.out, table_rows, d * element, 0.125);
      a.base = grad.base;
      // Small tables are cut finer than the zeros alone would ask for: there the sums are the work.
      const int64_t count = std::max((rows + kRowsAPiece - 1) / kRowsAPiece, std::min<int64_t>(rows, 1 + n / 512));
      for (int64_t p = 0; p < count; ++p) {
        pieces.push_back({a, groups.first + rows * p / count, groups.first + rows * (p + 1) / count});
      }
    }
  };
  plan(item_groups_, tables_.num_items, tables_.user_emb, users_, 1, fan_, item);
  plan(user_groups_, tables_.num_users, tables_.item_emb, candidates_, fan_, 1, user);
  std::vector<RowGroups> none;
  if (user.out && !need_user_) {  // its base is all there is
    none.emplace_back(0, tables_.num_users, 0, tables_.num_users);
    plan(none, tables_.num_users, nullptr, nullptr, 1, 1, user);
  }
  const int64_t numbers = (user.out ? tables_.num_users * d : 0) + (item.out ? tables_.num_items * d : 0);
  const bool small = batch_ * fan_ <= kFew && numbers <= kFew * 64;
  for_chunks(
      static_cast<int64_t>(pieces.size()),
      [&](int64_t c) { MMKD_ON_ISA(sum_rows(pieces[c].args, pieces[c].begin, pieces[c].end)); }, small);
}

std::tuple<Tensor, Tensor> PairGrads::write(const void* weights, const Tensor& user_emb, const Tensor& item_emb) const {
  Tensor grad_user = need_user_ ? empty({user_emb.size(0), tables_.d}, user_emb) : empty({0}, user_emb);
  Tensor grad_item = need_item_ ? empty({item_emb.size(0), tables_.d}, item_emb) : empty({0}, item_emb);
  write(weights, {need_user_ ? grad_user.mutable_data_ptr() : nullptr, {}},
        {need_item_ ? grad_item.mutable_data_ptr() : nullptr, {}});
  return {grad_user, grad_item};
}

}  // namespace mmkd
