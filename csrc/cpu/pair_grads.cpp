#include "cpu/pair_grads.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "cpu/scatter_kernel.h"

namespace mmkd {
namespace {

constexpr int kDigit = 11;  // widest radix digit, in bits
constexpr int kPasses = (32 + kDigit - 1) / kDigit;
constexpr int64_t kRowsAPiece = 1024;  // table rows a thread writes at a time

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

RowGroups::RowGroups(int64_t n, int64_t num_rows)
    : order(scratch<uint64_t>(n)), rows(scratch<uint32_t>(n)), starts(scratch<uint32_t>(n + 1)),
      spare_(scratch<uint64_t>(n)), n_(n), num_rows_(num_rows) {
  starts[0] = 0;
}

// A stable radix sort by row, so that the positions of a row stay in the batch's order.
bool RowGroups::build(const int64_t* index) {
  const int bits = num_rows_ > 1 ? std::bit_width(static_cast<uint64_t>(num_rows_ - 1)) : 0;
  const int passes = (bits + kDigit - 1) / kDigit, digit = passes ? (bits + passes - 1) / passes : 0;
  const uint32_t mask = (1u << digit) - 1;
  uint32_t place[kPasses][1 << kDigit];
  for (int p = 0; p < passes; ++p) std::fill_n(place[p], 1 << digit, 0u);
  for (int64_t i = 0; i < n_; ++i) {
    const uint64_t row = static_cast<uint64_t>(index[i]);
    if (row >= static_cast<uint64_t>(num_rows_)) return false;
    order[i] = row << 32 | static_cast<uint64_t>(i);
    for (int p = 0; p < passes; ++p) ++place[p][row >> (p * digit) & mask];
  }
  for (int p = 0; p < passes; ++p) {
    uint32_t before = 0;
    for (uint32_t v = 0; v <= mask; ++v) before += std::exchange(place[p][v], before);
    const int shift = 32 + p * digit;
    for (int64_t i = 0; i < n_; ++i) spare_[place[p][order[i] >> shift & mask]++] = order[i];
    order.swap(spare_);
  }
  uint32_t last = 0;
  for (int64_t i = 0; i < n_; ++i) {
    const uint32_t row = static_cast<uint32_t>(order[i] >> 32);
    if (i == 0 || row != last) {
      rows[count] = row;
      starts[count++] = static_cast<uint32_t>(i);
    }
    last = row;
  }
  starts[count] = static_cast<uint32_t>(n_);
  return true;
}

PairGrads::PairGrads(const Tensor& user_emb, const Tensor& item_emb, const int64_t* users, const int64_t* candidates,
                     int64_t batch, int64_t fan, bool need_user, bool need_item)
    : user_emb_(user_emb), item_emb_(item_emb), users_(users), candidates_(candidates), batch_(batch), fan_(fan),
      need_user_(need_user), need_item_(need_item), user_groups_(need_user ? batch : 0, user_emb.size(0)),
      item_groups_(need_item ? batch * fan : 0, item_emb.size(0)) {}

void PairGrads::group(int64_t task) {
  if (task == 0) {
    good_[0] = need_item_ ? item_groups_.build(candidates_) : in_range(candidates_, batch_ * fan_, item_emb_.size(0));
  } else {
    good_[1] = need_user_ ? user_groups_.build(users_) : in_range(users_, batch_, user_emb_.size(0));
  }
}

std::tuple<Tensor, Tensor> PairGrads::write(const void* weights) {
  const int64_t d = user_emb_.size(1), pairs = batch_ * fan_;
  const int64_t acc = accumulate_type(user_emb_.scalar_type()) == ScalarType::Double ? 8 : 4;
  const auto entry_id = scratch<uint32_t>(2 * pairs);
  const auto entry_weight = scratch<char>(2 * pairs * acc);
  const auto args = [&](const RowGroups& groups, const Tensor& table, const Tensor& source, Tensor& out) {
    SumRowsArgs a{};
    a.dtype = dtype_of(table);
    a.d = d;
    a.num_rows = table.size(0);
    a.order = groups.order.get();
    a.rows = groups.rows.get();
    a.starts = groups.starts.get();
    a.groups = groups.count;
    a.source = source.const_data_ptr();
    a.weight = weights;
    a.entry_id = entry_id.get();
    a.entry_weight = entry_weight.get();
    a.out = out.mutable_data_ptr();
    return a;
  };
  Tensor grad_user = need_user_ ? empty({user_emb_.size(0), d}, user_emb_) : empty({0}, user_emb_);
  Tensor grad_item = need_item_ ? empty({item_emb_.size(0), d}, item_emb_) : empty({0}, item_emb_);
  SumRowsArgs item = args(item_groups_, item_emb_, user_emb_, grad_item);
  item.source_id = users_;
  item.fan = 1;
  item.share = fan_;
  SumRowsArgs user = args(user_groups_, user_emb_, item_emb_, grad_user);
  user.source_id = candidates_;
  user.fan = fan_;
  user.share = 1;
  user.entry_id += pairs;
  user.entry_weight = static_cast<char*>(user.entry_weight) + pairs * acc;

  const auto pieces_of = [](bool need, int64_t rows, int64_t work) {
    // Small tables are cut finer than the zeros alone would ask for: there the sums are the work.
    return need ? std::max((rows + kRowsAPiece - 1) / kRowsAPiece, std::min<int64_t>(rows, 1 + work / 256)) : 0;
  };
  const int64_t item_pieces = pieces_of(need_item_, item.num_rows, pairs);
  const int64_t user_pieces = pieces_of(need_user_, user.num_rows, pairs);
  for_chunks(item_pieces + user_pieces, [&](int64_t c) {
    const bool is_item = c < item_pieces;
    const SumRowsArgs& a = is_item ? item : user;
    const int64_t p = is_item ? c : c - item_pieces, pieces = is_item ? item_pieces : user_pieces;
    MMKD_ON_ISA(sum_rows(a, a.num_rows * p / pieces, a.num_rows * (p + 1) / pieces));
  });
  return {grad_user, grad_item};
}

}  // namespace mmkd
