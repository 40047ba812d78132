// Exact all-ranking top-k on the CPU: tiles of scores are compared with each user's k-th best while still in registers,
// and only what is above it is kept. No score matrix exists.
#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/losses.h"
#include "cpu/topk_kernel.h"

namespace mmkd {
namespace {

constexpr int64_t kGroups = 8;            // tiles of users that share a pass over a block of panels
constexpr int64_t kPanelBytes = 1 << 17;  // a block of panels stays in the second-level cache

// Items each user must not get: CSR over the rows of user_emb.
struct Exclusion {
  const int64_t* rowptr = nullptr;
  const void* col = nullptr;
  bool col64 = false;

  // The user's excluded items, sorted.
  void row(int64_t user, std::vector<int64_t>& out) const {
    out.clear();
    if (!rowptr) return;
    for (int64_t j = rowptr[user]; j < rowptr[user + 1]; ++j) {
      out.push_back(col64 ? static_cast<const int64_t*>(col)[j] : static_cast<const int32_t*>(col)[j]);
    }
    if (!std::is_sorted(out.begin(), out.end())) std::sort(out.begin(), out.end());
  }
};

// Moves the best k of [first, last), more than k, to its front, the k-th of them last. As std::nth_element, but without
// a branch on what compares how, which in a buffer without order is guessed wrong every other time.
template <class C>
void select(C* first, C* last, int64_t k) {
  C* const kth = first + (k - 1);
  for (int rounds = 0; last - first > 16 && rounds < 32; ++rounds) {
    C a = first[0], b = first[(last - first) / 2], c = last[-1];
    if (b < a) std::swap(a, b);
    if (c < b) b = c < a ? a : c;  // the middle one: something is before it and something behind
    const C pivot = b;
    C* split = first;
    for (C* i = first; i != last; ++i) {
      const C x = *i;
      *i = *split;
      *split = x;
      split += x < pivot;
    }
    (kth < split ? last : first) = split;
  }
  std::nth_element(first, kth, last);
}

// The best k of one user so far, in a buffer that is cut back to k when it is full: in no order, then what came since,
// in order of items, with those he must not get.
template <class A>
class Best {
 public:
  // k: no more than there are items, and at least 1.
  void start(int64_t k, int64_t user, const Exclusion& exclusion) {
    k_ = k;
    buffer_.resize(static_cast<size_t>(capacity() + kMostPanel));
    end = buffer_.data();
    cut_ = 0;
    exclusion.row(user, excluded_);
    next_ = excluded_.data();
    floor = -std::numeric_limits<A>::infinity();
  }

  bool full() const { return end - buffer_.data() > capacity(); }

  // Drops what is excluded, and all but the best k. Items come in ascending order, so one that only equals the floor
  // loses to those that set it.
  void cut() {
    Candidate<A>*const first = buffer_.data(), *to = first + cut_;
    const int64_t* const last = excluded_.data() + excluded_.size();
    for (const Candidate<A>* c = to; c != end; ++c) {
      const int64_t item = c->item_of();
      while (next_ != last && *next_ < item) ++next_;
      if (next_ == last || *next_ != item) *to++ = *c;
    }
    if (to - first > k_) {
      select(first, to, k_);
      to = first + k_;
      floor = first[k_ - 1].score_of();
    }
    end = to;
    cut_ = to - first;
  }

  // The best `k`, which may be more than `start` was told: padded.
  void write(int64_t k, A* scores, int64_t* items) {
    cut();
    std::sort(buffer_.data(), end);
    for (int64_t i = 0; i < k; ++i) {
      const bool there = i < cut_;
      scores[i] = there ? buffer_[i].score_of() : -std::numeric_limits<A>::infinity();
      items[i] = there ? buffer_[i].item_of() : -1;
    }
  }

  A floor;
  Candidate<A>* end;  // room for kMostPanel more, unless it is full

 private:
  int64_t capacity() const { return 2 * k_ + 32; }

  int64_t k_ = 0, cut_ = 0;  // cut_: entries that are no excluded ones
  std::vector<Candidate<A>> buffer_;
  std::vector<int64_t> excluded_;
  const int64_t* next_ = nullptr;  // the first excluded item that is not behind those dropped
};

template <class A>
struct Problem {
  const A* users;  // [U, d]
  int64_t num_items, d, k, width, panels;
  std::vector<A> packed;  // [panels, d, width], zero beyond the last item
  Exclusion exclusion;
};

template <class A>
void pack(Problem<A>& p, const A* items) {
  p.packed.assign(static_cast<size_t>(p.panels * p.d * p.width), A(0));
  for_range(p.panels, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * p.width; i < std::min(end * p.width, p.num_items); ++i) {
      A* to = p.packed.data() + (i / p.width) * p.d * p.width + i % p.width;
      for (int64_t c = 0; c < p.d; ++c) to[c * p.width] = items[i * p.d + c];
    }
  });
}

// Ranks `count` <= kGroups * kTileUsers users.
template <class A>
void rank(const Problem<A>& p, const int64_t* ids, int64_t count, Best<A>* best, A* scores, int64_t* items) {
  const int64_t most = std::clamp<int64_t>(p.k, 1, std::max<int64_t>(1, p.num_items));
  for (int64_t i = 0; i < count; ++i) best[i].start(most, ids[i], p.exclusion);
  const int64_t block =
      std::max<int64_t>(1, kPanelBytes / std::max<int64_t>(1, p.d * p.width * static_cast<int64_t>(sizeof(A))));
  A floors[kTileUsers];
  Candidate<A> nobody[kMostPanel];
  TopkTile t{std::is_same_v<A, double>, {}, nullptr, floors, {}, p.d, 0, 0};
  for (int64_t first = 0; first < p.panels; first += block) {
    for (int64_t group = 0; group < count; group += kTileUsers) {
      const int64_t here = std::min<int64_t>(kTileUsers, count - group);
      for (int64_t r = 0; r < kTileUsers; ++r) {  // a short last tile repeats its last user, who keeps nothing twice
        t.users[r] = p.users + ids[group + std::min(r, here - 1)] * p.d;
        floors[r] = r < here ? best[group + r].floor : std::numeric_limits<A>::infinity();
        t.kept[r] = r < here ? best[group + r].end : nobody;
      }
      for (int64_t panel = first; panel < std::min(first + block, p.panels); ++panel) {
        t.panel = p.packed.data() + panel * p.d * p.width;
        t.first = panel * p.width;
        t.there = static_cast<uint32_t>((uint64_t{1} << std::min(p.width, p.num_items - t.first)) - 1);
        if (!MMKD_ON_ISA(topk_tile(t))) continue;
        for (int64_t r = 0; r < here; ++r) {
          Best<A>& b = best[group + r];
          b.end = static_cast<Candidate<A>*>(t.kept[r]);
          if (!b.full()) continue;
          b.cut();
          floors[r] = b.floor;
          t.kept[r] = b.end;
        }
      }
    }
  }
  for (int64_t i = 0; i < count; ++i) best[i].write(p.k, scores + i * p.k, items + i * p.k);
}

template <class A>
void run(Problem<A>& p, const A* items, const int64_t* ids, int64_t n, A* scores, int64_t* out) {
  p.width = MMKD_ON_ISA(topk_panel_width(std::is_same_v<A, double>));
  p.panels = (p.num_items + p.width - 1) / p.width;
  pack(p, items);
  constexpr int64_t chunk = kGroups * kTileUsers;
  for_chunks((n + chunk - 1) / chunk, [&](int64_t c) {
    std::vector<Best<A>> best(static_cast<size_t>(std::min(chunk, n - c * chunk)));
    rank(p, ids + c * chunk, static_cast<int64_t>(best.size()), best.data(), scores + c * chunk * p.k,
         out + c * chunk * p.k);
  });
}

Exclusion exclusion_of(const Tensor& rowptr, const Tensor& col, int64_t num_users, int64_t num_items) {
  check_dim(rowptr, "exclude[0] (rowptr)", 1);
  check_type(rowptr, "exclude[0] (rowptr)", ScalarType::Long);
  check_size(rowptr, "exclude[0] (rowptr)", 0, num_users + 1);
  check_dim(col, "exclude[1] (col)", 1);
  const bool col64 = col.scalar_type() == ScalarType::Long;
  MMKD_CHECK(col64 || col.scalar_type() == ScalarType::Int, "exclude[1] (col): expected int32 or int64");
  MMKD_CHECK(rowptr.is_contiguous() && col.is_contiguous(), "exclude: expected contiguous tensors");
  const int64_t *r = data<int64_t>(rowptr), nnz = col.numel();
  MMKD_CHECK(r[0] == 0 && r[num_users] == nnz,
             "exclude[0] (rowptr): expected to start at 0 and end at len(col) = ", nnz, ", got ", r[0], " and ",
             r[num_users]);
  for (int64_t u = 0; u < num_users; ++u) {
    MMKD_CHECK(r[u] <= r[u + 1], "exclude[0] (rowptr): falls from ", r[u], " to ", r[u + 1], " at row ", u);
  }
  for (int64_t j = 0; j < nnz; ++j) {
    const int64_t item = col64 ? data<int64_t>(col)[j] : data<int32_t>(col)[j];
    MMKD_CHECK(item >= 0 && item < num_items, "exclude[1] (col): entry ", j, " is ", item, ", expected [0, ", num_items,
               ")");
  }
  return {r, col.const_data_ptr(), col64};
}

std::tuple<Tensor, Tensor> topk(Tensor user_emb, Tensor item_emb, int64_t k, OptTensor users, OptTensor rowptr,
                                OptTensor col) {
  check_float(user_emb, "user_emb");
  check_dim(user_emb, "user_emb", 2);
  check_dim(item_emb, "item_emb", 2);
  check_type(item_emb, "item_emb", user_emb.scalar_type());
  check_size(item_emb, "item_emb", 1, user_emb.size(1));
  MMKD_CHECK(k >= 1, "k: expected >= 1, got ", k);
  MMKD_CHECK(rowptr.has_value() == col.has_value(), "exclude: expected both rowptr and col, or neither");
  const int64_t num_users = user_emb.size(0), num_items = item_emb.size(0);
  MMKD_CHECK(num_items <= UINT32_MAX, "item_emb: expected up to 2^32 - 1 rows, got ", num_items);
  Exclusion exclusion;
  if (rowptr) exclusion = exclusion_of(*rowptr, *col, num_users, num_items);
  std::vector<int64_t> everyone;
  if (users) {
    check_dim(*users, "users", 1);
    check_index(*users, "users", 1, users->size(0));
    check_entries(*users, "users", num_users);
  } else {
    everyone.resize(num_users);
    for (int64_t u = 0; u < num_users; ++u) everyone[u] = u;
  }
  const int64_t* ids = users ? data<int64_t>(*users) : everyone.data();
  const int64_t n = users ? users->numel() : num_users;
  const ScalarType acc = accumulate_type(user_emb.scalar_type());
  Tensor scores = empty({n, k}, user_emb, acc), items = empty({n, k}, user_emb, ScalarType::Long);
  // 16-bit tables are widened once: every number is used thousands of times.
  const bool same = user_emb.scalar_type() == acc;
  const Tensor wide_users = torch::stable::contiguous(same ? user_emb : torch::stable::to(user_emb, acc));
  const Tensor wide_items = torch::stable::contiguous(same ? item_emb : torch::stable::to(item_emb, acc));
  const auto solve = [&](auto zero) {
    using A = decltype(zero);
    Problem<A> p{data<A>(wide_users), num_items, user_emb.size(1), k, 0, 0, {}, exclusion};
    run(p, data<A>(wide_items), ids, n, mutable_data<A>(scores), mutable_data<int64_t>(items));
  };
  acc == ScalarType::Double ? solve(0.0) : solve(0.0f);
  return {scores, items};
}

}  // namespace
}  // namespace mmkd

STABLE_TORCH_LIBRARY_IMPL(mmkd, CPU, m) { m.impl("topk", TORCH_BOX(&mmkd::topk)); }
