// teacher on the CPU: the ranking losses of a teacher's step and their gradients, from its propagated ids, features and
// prompt at a batch's rows. The batch is grouped by the rows it names, so every row of a gradient is summed in the
// batch's order and written once.
#include <vector>

#include "cpu/bpr_kd_kernel.h"
#include "cpu/losses.h"
#include "cpu/pair_grads.h"
#include "cpu/scratch.h"
#include "cpu/teacher_kernel.h"

namespace mmkd {
namespace {

constexpr int64_t kRows = 128;  // of joint embeddings, or of gradients, that a thread takes at a time

// What came in.
struct Given {
  const Tensor &ids, &user_features, &item_features;
  const OptTensor& prompt;
  const Tensor &users, &pos, &neg, &omega;
  double weights[3];  // of the joint embedding's loss, each modality's, the prompt's
};

void check_given(const Given& in) {
  const ScalarType type = in.ids.scalar_type();
  MMKD_CHECK(type == ScalarType::Float || type == ScalarType::Double, "ids: expected float32 or float64, got ",
             torch::headeronly::toString(type));
  check_dim(in.ids, "ids", 2);
  check_dim(in.user_features, "user_features", 2);
  check_dim(in.item_features, "item_features", 2);
  check_dim(in.omega, "omega", 1);
  const int64_t n = in.ids.size(0), d = in.ids.size(1), users = in.user_features.size(0);
  const int64_t items = in.item_features.size(0), wide = in.omega.size(0) * d;
  MMKD_CHECK(n <= UINT32_MAX, "ids: expected up to 2^32 - 1 rows, got ", n);
  MMKD_CHECK(users + items == n, "ids: expected ", users + items, " rows, of user_features and item_features, got ", n);
  check_shape(in.ids, "ids", {n, d}, type);
  check_shape(in.user_features, "user_features", {users, wide}, type);
  check_shape(in.item_features, "item_features", {items, wide}, type);
  check_shape(in.omega, "omega", {in.omega.size(0)}, type);
  MMKD_CHECK(in.weights[2] == 0 || in.prompt, "prompt: expected a tensor where its loss has a weight, got none");
  if (in.prompt) check_shape(*in.prompt, "prompt", {n, d}, type);
  check_dim(in.users, "users", 1);
  const int64_t batch = in.users.size(0);
  check_index(in.users, "users", 1, batch);
  check_index(in.pos, "pos", 1, batch);
  check_index(in.neg, "neg", 1, batch);
  MMKD_CHECK(batch <= UINT32_MAX / 2, "users: expected up to 2^31 - 1 entries, got ", batch);
}

template <class T>
class Ranked {
 public:
  explicit Ranked(const Given& in)
      : in_(in),
        batch_(in.users.size(0)),
        n_(in.ids.size(0)),
        modalities_(in.omega.size(0)),
        count_(modalities_ + (in.prompt ? 2 : 1)),
        joint_(empty({n_, in.ids.size(1)}, in.ids)),
        inverse_(empty({n_, modalities_}, in.ids)),
        numbers_(new T[2 * count_ * batch_]),
        sums_(count_ * num_blocks(batch_)) {
    a_.f64 = sizeof(T) == 8;
    a_.num_users = in.user_features.size(0);
    a_.num_items = in.item_features.size(0);
    a_.d = in.ids.size(1);
    a_.modalities = modalities_;
    a_.ids = in.ids.const_data_ptr();
    a_.user_features = in.user_features.const_data_ptr();
    a_.item_features = in.item_features.const_data_ptr();
    a_.omega = in.omega.const_data_ptr();
    a_.joint = joint_.mutable_data_ptr();
    a_.inverse = inverse_.mutable_data_ptr();
    a_.users = data<int64_t>(in.users);
    a_.pos = data<int64_t>(in.pos);
    a_.neg = data<int64_t>(in.neg);
    add_head(static_cast<const T*>(a_.joint), in.weights[0]);
    for (int64_t m = 0; m < modalities_; ++m)
      add_head(data<T>(in.user_features) + m * a_.d, data<T>(in.item_features) + m * a_.d, modalities_ * a_.d,
               in.weights[1]);
    if (in.prompt) add_head(data<T>(*in.prompt), in.weights[2]);
    a_.heads = heads_.data();
    a_.count = count_;
  }

  // Losses of all heads, and whether every index was in range; `grouped`: for gradients.
  bool score(bool grouped) {
    std::atomic<bool> good{true};
    if (grouped) {
      both_.resize(2 * batch_);
      for (int64_t b = 0; b < batch_; ++b) {
        both_[2 * b] = a_.pos[b];
        both_[2 * b + 1] = a_.neg[b];
      }
      groups_.emplace_back(batch_, a_.num_users, 0, a_.num_users);
      groups_.emplace_back(2 * batch_, a_.num_items, 0, a_.num_items);
    }
    const int64_t sides = static_cast<int64_t>(groups_.size()),
                  pieces = in_.weights[0] != 0 ? (n_ + kRows - 1) / kRows : 0;
    for_chunks(
        sides + pieces,
        [&](int64_t c) {
          if (c >= sides)
            return MMKD_ON_ISA(teacher_rows(a_, (c - sides) * kRows, std::min(n_, (c - sides + 1) * kRows)));
          if (!groups_[c].build(c ? both_.data() : a_.users)) good.store(false);
        },
        small());
    if (!good.load()) return false;
    for_chunks(
        num_blocks(batch_),
        [&](int64_t c) {
          if (!score_block(c)) good.store(false);
        },
        small());
    return good.load();
  }

  void write_gradients(Tensor& ids, Tensor& users, Tensor& items, Tensor& prompt, const bool (&need)[4]) {
    a_.grad_ids = need[0] ? ids.mutable_data_ptr() : nullptr;
    a_.grad_users = need[1] ? users.mutable_data_ptr() : nullptr;
    a_.grad_items = need[2] ? items.mutable_data_ptr() : nullptr;
    a_.grad_prompt = need[3] ? prompt.mutable_data_ptr() : nullptr;
    std::atomic<bool> failed{false};
    const int64_t of_users = (a_.num_users + kRows - 1) / kRows, of_items = (a_.num_items + kRows - 1) / kRows;
    for_chunks(
        of_users + of_items,
        [&](int64_t c) {
          const bool of_item = c >= of_users;
          const RowGroups& g = groups_[of_item];
          const RowPositions positions{g.order.get(), g.rows.get(), g.starts.get(), g.count, of_item};
          const int64_t first = (of_item ? c - of_users : c) * kRows;
          const Scratch scratch(std::max<int64_t>(1, a_.d) * static_cast<int64_t>(sizeof(T)), failed);
          if (!scratch) return;
          MMKD_ON_ISA(teacher_grads(a_, positions, first,
                                    std::min(of_item ? a_.num_items : a_.num_users, first + kRows), scratch.get()));
        },
        small());
    check_memory(failed, "teacher");
  }

  // The loss and its three summands.
  std::tuple<Tensor, Tensor> totals() const {
    double terms[3] = {mean(0), 0, in_.prompt ? mean(count_ - 1) : 0};
    for (int64_t m = 1; m <= modalities_; ++m) terms[1] += mean(m);
    Tensor summands = empty({3}, in_.ids);
    double total = 0;
    for (int i = 0; i < 3; ++i) {
      terms[i] = in_.weights[i] != 0 ? in_.weights[i] * terms[i] : 0;
      mutable_data<T>(summands)[i] = static_cast<T>(terms[i]);
      total += terms[i];
    }
    return {scalar(total, in_.ids, sizeof(T) == 8), summands};
  }

 private:
  bool small() const { return batch_ <= kSamples && n_ <= kRows; }

  void add_head(const T* users, const T* items, int64_t stride, double weight) {
    T* at = numbers_.get() + 2 * static_cast<int64_t>(heads_.size()) * batch_;
    heads_.push_back({users, items, stride, stride, at, at + batch_, weight != 0});
    PairArgs pair{};
    pair.f64 = sizeof(T) == 8;
    pair.margin = at;
    pair.tau = 1;
    pair.bernoulli = true;
    pair.scale_bpr = weight / static_cast<double>(std::max<int64_t>(1, batch_));
    pair.grad_margin = at + batch_;
    pairs_.push_back(pair);
  }

  void add_head(const T* table, double weight) { add_head(table, table + a_.num_users * a_.d, a_.d, weight); }

  bool score_block(int64_t c) {
    const int64_t begin = c * kSamples, end = std::min(batch_, begin + kSamples);
    if (!MMKD_ON_ISA(teacher_margins(a_, begin, end))) return false;
    for (int64_t h = 0; h < count_; ++h) {
      if (!heads_[h].ranked) continue;
      sums_[h * num_blocks(batch_) + c] = MMKD_ON_ISA(bpr_kd_losses(pairs_[h], begin, end)).bpr;
      MMKD_ON_ISA(bpr_kd_grads(pairs_[h], begin, end));
      T* coefficient = static_cast<T*>(heads_[h].coefficient);
      for (int64_t b = begin; b < end;
           ++b) {  // an item against itself: what the two sides give would cancel but for rounding
        if (a_.pos[b] == a_.neg[b] && coefficient[b] == coefficient[b]) coefficient[b] = 0;
      }
    }
    return true;
  }

  double mean(int64_t head) const {
    double sum = 0;
    for (int64_t c = 0, blocks = num_blocks(batch_); c < blocks; ++c) sum += sums_[head * blocks + c];
    return batch_ ? sum / static_cast<double>(batch_) : 0;
  }

  const Given& in_;
  const int64_t batch_, n_, modalities_, count_;
  Tensor joint_, inverse_;
  const std::unique_ptr<T[]> numbers_;  // margins and coefficients of every head
  std::vector<double> sums_;            // [heads][blocks]
  std::vector<Head> heads_;
  std::vector<PairArgs> pairs_;
  std::vector<int64_t> both_;  // observed item and negative of every sample
  std::vector<RowGroups> groups_;
  TeacherArgs a_{};
};

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs teacher(Tensor ids, Tensor user_features, Tensor item_features, OptTensor prompt, Tensor users, Tensor pos,
                Tensor neg, Tensor omega, double joint, double modality, double by_prompt, bool need_ids,
                bool need_users, bool need_items, bool need_prompt) {
  const Given in{ids, user_features, item_features, prompt, users, pos, neg, omega, {joint, modality, by_prompt}};
  check_given(in);
  const bool need[] = {need_ids, need_users, need_items, need_prompt && prompt};
  const auto like = [](const Tensor& t, bool wanted) {
    return wanted ? empty({t.size(0), t.size(1)}, t) : empty({0}, t);
  };
  Tensor grads[] = {like(ids, need[0]), like(user_features, need[1]), like(item_features, need[2]), like(ids, need[3])};
  const bool any = need[0] || need[1] || need[2] || need[3];
  const auto run = [&]<class T>(T) -> Outputs {
    Ranked<T> ranked(in);
    if (!ranked.score(any)) {
      check_entries(users, "users", user_features.size(0));
      check_entries(pos, "pos", item_features.size(0));
      check_entries(neg, "neg", item_features.size(0));
      fail("users, pos, neg: changed while they were being read");
    }
    if (any) ranked.write_gradients(grads[0], grads[1], grads[2], grads[3], need);
    const auto [loss, terms] = ranked.totals();
    return {loss, terms, grads[0], grads[1], grads[2], grads[3]};
  };
  return ids.scalar_type() == ScalarType::Double ? run(double()) : run(float());
}

}  // namespace
}  // namespace mmkd

STABLE_TORCH_LIBRARY_IMPL(mmkd, CPU, m) { m.impl("teacher", TORCH_BOX(&mmkd::teacher)); }
