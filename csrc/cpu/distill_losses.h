// All losses of the student and their gradients in two passes over a batch (spec section 4): what the losses take from
// the rows first, then every row of the gradient, once. For the ops that differ in where the teacher's side comes from.
#pragma once
#include <cstring>
#include <numeric>

#include "cpu/emb_kd_kernel.h"
#include "cpu/loss_args.h"
#include "cpu/pair_grads.h"

namespace mmkd {

struct Lambdas {
  double bpr, pair, list, emb;
};

struct Sums {
  std::vector<double> bpr, pair, list, emb;  // of each block
};

// A table's users, then its items.
inline PairTables halves_of(const Tensor& table, int64_t num_users) {
  const char* rows = static_cast<const char*>(table.const_data_ptr());
  const int64_t row = table.size(1) * static_cast<int64_t>(table.element_size());
  return {dtype_of(table), rows, rows + num_users * row, num_users, table.size(0) - num_users, table.size(1)};
}

inline bool one_after_another(const int64_t* nodes, int64_t n, int64_t num_rows) {
  if (n == 0 || nodes[0] < 0 || nodes[0] > num_rows - n) return false;
  for (int64_t i = 1; i < n; ++i) {
    if (nodes[i] != nodes[0] + i) return false;
  }
  return true;
}

inline double mean(const std::vector<double>& sums, int64_t n) {
  return n ? std::accumulate(sums.begin(), sums.end(), 0.0) / static_cast<double>(n) : 0.0;
}

// What came in, checked.
struct Inputs {
  const Tensor &table, &users, &candidates, &nodes;
  const OptTensor &teacher_margin, &teacher_logits;
  const Tensor &list_weights, &emb_weights;
  int64_t num_users, num_targets;  // M of EmbKD
  Lambdas by;
  double pair_tau;
  bool bernoulli;
  double alpha, beta, list_tau;
  bool coupled;
  double gamma;
  bool need_table, need_margin, need_logits;

  bool of_pairs() const { return by.bpr != 0 || by.pair != 0 || by.list != 0; }
};

inline void check_inputs(const Inputs& in) {
  const ScalarType type = in.table.scalar_type();
  MMKD_CHECK(type == ScalarType::Float || type == ScalarType::Double, "table: expected float32 or float64, got ",
             torch::headeronly::toString(type));
  check_dim(in.table, "table", 2);
  MMKD_CHECK(in.table.is_contiguous(), "table: expected a contiguous tensor");
  MMKD_CHECK(in.table.size(0) <= UINT32_MAX, "table: expected up to 2^32 - 1 rows, got ", in.table.size(0));
  MMKD_CHECK(in.num_users >= 0 && in.num_users <= in.table.size(0), "num_users: expected 0 to ", in.table.size(0),
             ", the table's rows, got ", in.num_users);
  check_dim(in.users, "users", 1);
  check_index(in.users, "users", 1, in.users.size(0));
  check_index(in.candidates, "candidates", 2, in.users.size(0));
  MMKD_CHECK(in.candidates.size(1) >= 2, "candidates: expected K >= 2, got K = ", in.candidates.size(1));
  check_dim(in.nodes, "nodes", 1);
  check_index(in.nodes, "nodes", 1, in.nodes.size(0));
  MMKD_CHECK(in.by.pair == 0 || in.teacher_margin,
             "teacher_margin: expected a tensor where PairKD has a weight, got none");
  MMKD_CHECK(in.by.list == 0 || in.teacher_logits,
             "teacher_logits: expected a tensor where ListKD has a weight, got none");
  if (in.by.pair != 0) check_dim(*in.teacher_margin, "teacher_margin", 1);
  if (in.by.list != 0) check_dim(*in.teacher_logits, "teacher_logits", 3);
  MMKD_CHECK(in.pair_tau > 0 && in.list_tau > 0, "pair_tau, list_tau: expected > 0, got ", in.pair_tau, " and ",
             in.list_tau);
  if (in.by.emb == 0) return;
  MMKD_CHECK(in.num_targets <= kMostTeachers, "targets: expected at most ", kMostTeachers, ", got ", in.num_targets);
  check_dim(in.emb_weights, "emb_weights", 1);
  check_size(in.emb_weights, "emb_weights", 0, in.num_targets);
  check_type(in.emb_weights, "emb_weights", type);
  MMKD_CHECK(in.emb_weights.is_contiguous(), "emb_weights: expected a contiguous tensor");
  MMKD_CHECK(in.gamma >= 1, "gamma: expected >= 1, got ", in.gamma);
}

// The gradients asked for; empty where not.
struct Gradients {
  Tensor table, margin, logits;
};

template <class T>
T* where(Tensor& t, bool wanted) {
  return wanted ? mutable_data<T>(t) : nullptr;
}

// BPR, PairKD and ListKD of a batch. All of their gradients go through the weights of the pairs (b, k). What a sample
// gives its user is made here, while the rows of its candidates are in a cache.
template <class T>
class PairLossesOf {
 public:
  // user_rows: [B, d], or null.
  PairLossesOf(const Inputs& in, const PairTables& tables, Gradients& grads, T* user_rows)
      : with_list_(in.by.list != 0),
        batch_(in.users.size(0)),
        k_(in.candidates.size(1)),
        logits_(new T[batch_ * k_]),
        margin_(new T[batch_]),
        coefficient_(new T[batch_]),
        weight_(in.need_table ? new T[batch_ * k_] : nullptr),
        scores_{tables.dtype,
                tables.user_emb,
                tables.item_emb,
                data<int64_t>(in.users),
                data<int64_t>(in.candidates),
                tables.num_users,
                tables.num_items,
                tables.d,
                k_,
                logits_.get()},
        pair_(pair_args_of(in, grads)),
        list_(list_args_of(in, grads)),
        scratch_(list_),
        user_rows_{sizeof(T) == 8, tables.d, k_, tables.item_emb, data<int64_t>(in.candidates),
                   weight_.get(),  user_rows} {}

  const T* weights() const { return weight_.get(); }

  // Samples [begin, end) of block c; false if one of their indices is out of range.
  bool run(int64_t c, int64_t begin, int64_t end, Sums& sums) const {
    if (!MMKD_ON_ISA(list_scores(scores_, begin, end))) return false;
    if (with_list_) {
      sums.list[c] += list_.grad_student || list_.grad_teacher
                          ? MMKD_ON_ISA(list_kd_both(list_, begin, end, scratch_.of(c)))
                          : MMKD_ON_ISA(list_kd_loss(list_, begin, end, scratch_.of(c)));
    } else if (weight_) {
      std::fill(weight_.get() + begin * k_, weight_.get() + end * k_, T(0));
    }
    if (pair_.scale_bpr != 0 || pair_.scale_pair != 0) run_pairs(c, begin, end, sums);
    if (user_rows_.out) MMKD_ON_ISA(weighted_rows(user_rows_, begin, end));
    return true;
  }

 private:
  // BPR and PairKD of samples [begin, end), from the scores of their first two candidates.
  void run_pairs(int64_t c, int64_t begin, int64_t end, Sums& sums) const {
    for (int64_t b = begin; b < end; ++b) margin_[b] = logits_[b * k_] - logits_[b * k_ + 1];
    const PairLosses losses = MMKD_ON_ISA(bpr_kd_losses(pair_, begin, end));
    sums.bpr[c] += losses.bpr;
    sums.pair[c] += losses.pair;
    MMKD_ON_ISA(bpr_kd_grads(pair_, begin, end));
    for (int64_t b = begin; weight_ && b < end; ++b) {
      weight_[b * k_] += coefficient_[b];
      weight_[b * k_ + 1] -= coefficient_[b];
    }
  }

  double share(double by) const { return by / static_cast<double>(std::max<int64_t>(1, batch_)); }

  PairArgs pair_args_of(const Inputs& in, Gradients& grads) const {
    PairArgs a =
        pair_args(in.by.pair != 0 ? in.teacher_margin : OptTensor(), batch_, sizeof(T) == 8, in.pair_tau, in.bernoulli);
    a.margin = margin_.get();
    a.grad_margin = coefficient_.get();
    a.grad_teacher = where<T>(grads.margin, in.need_margin && in.by.pair != 0);
    a.scale_bpr = share(in.by.bpr);
    a.scale_pair = share(in.by.pair);
    return a;
  }

  ListKdArgs list_args_of(const Inputs& in, Gradients& grads) const {
    ListKdArgs a{};
    a.batch = 0;
    a.k = k_;
    a.f64 = sizeof(T) == 8;
    if (!with_list_) return a;
    a = list_kd_args(*in.teacher_logits, in.list_weights, in.table.scalar_type(), batch_, k_, in.alpha, in.beta,
                     in.list_tau, in.coupled);
    a.logits = logits_.get();
    a.grad_student = weight_.get();
    a.grad_teacher = where<T>(grads.logits, in.need_logits);
    a.scale = share(in.by.list);
    return a;
  }

  const bool with_list_;
  const int64_t batch_, k_;
  const std::unique_ptr<T[]> logits_, margin_, coefficient_, weight_;
  const ListScoresArgs scores_;
  const PairArgs pair_;
  const ListKdArgs list_;
  const ListScratch scratch_;
  const WeightedRowsArgs user_rows_;
};

// EmbKD of the rows that `nodes` name.
template <class T>
class EmbLossOf {
 public:
  // grad_rows: [n, d], or null. keeps_stats: false where whoever takes the losses has room for the stats himself.
  EmbLossOf(const Inputs& in, T* grad_rows, bool keeps_stats)
      : table_(data<T>(in.table)),
        nodes_(data<int64_t>(in.nodes)),
        num_rows_(in.table.size(0)),
        n_(in.nodes.size(0)),
        d_(in.table.size(1)),
        in_place_(one_after_another(nodes_, n_, num_rows_)),
        gathered_(in_place_ ? empty({0}, in.table) : empty({n_, d_}, in.table)),
        stats_(empty({keeps_stats ? n_ : 0, 1 + 2 * in.num_targets}, in.table)) {
    args_.dtype = dtype_of(in.table);
    args_.student = in_place_ ? table_ + nodes_[0] * d_ : mutable_data<T>(gathered_);
    args_.weights = in.emb_weights.const_data_ptr();
    args_.stats = stats_.mutable_data_ptr();
    args_.grad_student = grad_rows;
    args_.n = n_;
    args_.d = d_;
    args_.num_teachers = in.num_targets;
    args_.gamma = in.gamma;
    args_.scale = in.by.emb / static_cast<double>(std::max<int64_t>(1, n_));
  }

  // Rows [begin, end), block c; false if one of their nodes is out of range. losses(args, begin, end) knows the
  // targets.
  template <class Losses>
  bool run(int64_t c, int64_t begin, int64_t end, Sums& sums, const Losses& losses) const {
    T* to = const_cast<T*>(static_cast<const T*>(args_.student));
    for (int64_t i = begin; !in_place_ && i < end; ++i) {
      if (static_cast<uint64_t>(nodes_[i]) >= static_cast<uint64_t>(num_rows_)) return false;
      if (i + kRowsAhead < end) prefetch(nodes_[i + kRowsAhead]);
      std::memcpy(to + i * d_, table_ + nodes_[i] * d_, static_cast<size_t>(d_) * sizeof(T));
    }
    sums.emb[c] = losses(args_, begin, end);
    return true;
  }

 private:
  static constexpr int64_t kRowsAhead = 8;

  // The address is only looked at, so the node need not be checked.
  void prefetch(int64_t node) const {
    const uintptr_t at =
        reinterpret_cast<uintptr_t>(table_) + static_cast<uint64_t>(node) * static_cast<uint64_t>(d_) * sizeof(T);
    for (uint64_t b = 0; b < static_cast<uint64_t>(d_) * sizeof(T) && b < 512; b += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(at + b));
  }

  const T* table_;
  const int64_t* nodes_;
  const int64_t num_rows_, n_, d_;
  const bool in_place_;
  Tensor gathered_, stats_;
  EmbKDArgs args_{};
};

// The rows of the table that `batch` samples' users and `n` nodes are.
inline std::vector<int64_t> joined(const Inputs& in, int64_t batch, int64_t n) {
  const int64_t *users = data<int64_t>(in.users), *nodes = data<int64_t>(in.nodes);
  std::vector<int64_t> all(users, users + batch);
  all.insert(all.end(), nodes, nodes + n);
  return all;
}

[[noreturn]] inline void fail_indices(const Inputs& in) {
  if (in.of_pairs()) {  // else they were not looked at
    check_entries(in.users, "users", in.num_users);
    check_entries(in.candidates, "candidates", in.table.size(0) - in.num_users);
  }
  if (in.by.emb != 0) check_entries(in.nodes, "nodes", in.table.size(0));
  fail("users, candidates, nodes: changed while they were being read");
}

// The losses of a batch and what is asked for of their gradients. Teacher, the side the student learns from:
//
//   samples_at_once, keeps_stats       of a block's kSamples; as EmbLossOf has it
//   tasks(blocks)                      pieces that the blocks of samples, or of rows, go to threads in
//   begin(task of samples, or of rows) what a thread needs for one; false without memory for it
//   before(work, begin, end)           samples' margins and logits are wanted; after(...): their gradients are there
//   emb(work, args, begin, end)        EmbKD of rows
template <class T, class Teacher>
class Distilled {
 public:
  Distilled(const Inputs& in, Gradients& grads, Teacher& teacher)
      : in_(in),
        grads_(grads),
        teacher_(teacher),
        batch_(in.of_pairs() ? in.users.size(0) : 0),
        n_(in.by.emb != 0 ? in.nodes.size(0) : 0),
        d_(in.table.size(1)),
        // what the samples give their users, then what EmbKD gives its nodes: a row for each of `named`
        parts_(empty({in.need_table ? batch_ + n_ : 0, d_}, in.table)),
        user_rows_(where<T>(parts_, in.need_table)),
        emb_rows_(in.need_table ? user_rows_ + batch_ * d_ : nullptr),
        pairs_(in, halves_of(in.table, in.num_users), grads, user_rows_),
        sums_{std::vector<double>(num_blocks(batch_)), std::vector<double>(num_blocks(batch_)),
              std::vector<double>(num_blocks(batch_)), std::vector<double>(num_blocks(n_))} {
    if (in.by.emb != 0) emb_.emplace(in, emb_rows_, Teacher::keeps_stats);
  }

  // The weighted sum, and its terms.
  std::tuple<Tensor, Tensor> run() {
    const int64_t num_rows = in_.table.size(0);
    PairGrads table(halves_of(in_.table, in_.num_users), data<int64_t>(in_.users), data<int64_t>(in_.candidates),
                    batch_, in_.candidates.size(1), false, in_.need_table);
    const std::vector<int64_t> named = joined(in_, in_.need_table ? batch_ : 0, in_.need_table ? n_ : 0);
    RowGroups of_users(static_cast<int64_t>(named.size()), num_rows, 0, in_.num_users),
        of_items(in_.need_table ? n_ : 0, num_rows, in_.num_users, num_rows);
    const int64_t grouping = in_.need_table ? table.tasks() : 0, nodes = in_.need_table ? 2 : 0;
    const int64_t samples = teacher_.tasks(num_blocks(batch_)), rows = teacher_.tasks(num_blocks(n_));
    for_chunks(
        grouping + nodes + samples + rows,
        [&](int64_t c) {
          if (c < grouping) return table.group(c);
          if ((c -= grouping) < nodes) {
            if (!(c ? of_items.build(data<int64_t>(in_.nodes)) : of_users.build(named.data()))) good_.store(false);
          } else if ((c -= nodes) < samples) {
            run_samples(c, samples);
          } else {
            run_rows(c - samples, rows, samples);
          }
        },
        batch_ * in_.candidates.size(1) + n_ <= kSamples);
    if (!good_.load() || !table.good()) fail_indices(in_);
    if (in_.need_table) {
      T* out = mutable_data<T>(grads_.table);
      table.write(pairs_.weights(), {out, of_users.base(0, user_rows_)},
                  {out + in_.num_users * d_, of_items.base(in_.num_users, emb_rows_)});
    }
    return totals();
  }

 private:
  void run_samples(int64_t task, int64_t tasks) {
    auto work = teacher_.begin(task);
    const int64_t blocks = num_blocks(batch_);
    for (int64_t c = blocks * task / tasks; work && c < blocks * (task + 1) / tasks; ++c) {
      const int64_t end = std::min(batch_, (c + 1) * kSamples);
      for (int64_t b = c * kSamples; b < end; b += Teacher::samples_at_once) {
        const int64_t stop = std::min(end, b + Teacher::samples_at_once);
        teacher_.before(work, b, stop);
        if (!pairs_.run(c, b, stop, sums_)) return good_.store(false);
        teacher_.after(work, b, stop);
      }
    }
  }

  void run_rows(int64_t task, int64_t tasks, int64_t samples) {
    auto work = teacher_.begin(samples + task);
    const int64_t blocks = num_blocks(n_);
    const auto losses = [&](const EmbKDArgs& a, int64_t begin, int64_t end) {
      return teacher_.emb(work, a, begin, end);
    };
    for (int64_t c = blocks * task / tasks; work && c < blocks * (task + 1) / tasks; ++c) {
      if (!emb_->run(c, c * kSamples, std::min(n_, (c + 1) * kSamples), sums_, losses)) return good_.store(false);
    }
  }

  std::tuple<Tensor, Tensor> totals() const {
    const Lambdas& by = in_.by;
    const double means[] = {by.bpr != 0 ? mean(sums_.bpr, batch_) : 0.0, mean(sums_.pair, batch_),
                            mean(sums_.list, batch_), mean(sums_.emb, n_)};
    Tensor terms = empty({4}, in_.table);
    std::copy(means, means + 4, mutable_data<T>(terms));
    const double total = by.bpr * means[0] + by.pair * means[1] + by.list * means[2] + by.emb * means[3];
    return {scalar(total, in_.table, sizeof(T) == 8), terms};
  }

  const Inputs& in_;
  Gradients& grads_;
  Teacher& teacher_;
  const int64_t batch_, n_, d_;
  Tensor parts_;
  T *const user_rows_, *const emb_rows_;
  const PairLossesOf<T> pairs_;
  std::optional<EmbLossOf<T>> emb_;
  Sums sums_;
  std::atomic<bool> good_{true};
};

}  // namespace mmkd
