// All losses of the student and their gradients in two passes over a batch (spec section 4): what the losses take from
// the rows first, then every row of the gradient, once.
#include <cstring>
#include <numeric>

#include "cpu/emb_kd_kernel.h"
#include "cpu/loss_args.h"
#include "cpu/pair_grads.h"

namespace mmkd {
namespace {

struct Lambdas {
  double bpr, pair, list, emb;
};

struct Sums {
  std::vector<double> bpr, pair, list, emb;  // of each block
};

// A table's users, then its items.
PairTables halves_of(const Tensor& table, int64_t num_users) {
  const char* rows = static_cast<const char*>(table.const_data_ptr());
  const int64_t row = table.size(1) * static_cast<int64_t>(table.element_size());
  return {dtype_of(table), rows, rows + num_users * row, num_users, table.size(0) - num_users, table.size(1)};
}

bool one_after_another(const int64_t* nodes, int64_t n, int64_t num_rows) {
  if (n == 0 || nodes[0] < 0 || nodes[0] > num_rows - n) return false;
  for (int64_t i = 1; i < n; ++i) {
    if (nodes[i] != nodes[0] + i) return false;
  }
  return true;
}

double mean(const std::vector<double>& sums, int64_t n) {
  return n ? std::accumulate(sums.begin(), sums.end(), 0.0) / static_cast<double>(n) : 0.0;
}

// What came in, checked.
struct Inputs {
  const Tensor &table, &users, &candidates, &nodes;
  const OptTensor &teacher_margin, &teacher_logits, &targets;
  const Tensor &list_weights, &emb_weights;
  int64_t num_users;
  Lambdas by;
  double pair_tau;
  bool bernoulli;
  double alpha, beta, list_tau;
  bool coupled;
  double gamma;
  bool need_table, need_margin, need_logits, need_targets;
};

void check_inputs(const Inputs& in) {
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
  MMKD_CHECK(in.by.emb == 0 || in.targets, "targets: expected a tensor where EmbKD has a weight, got none");
  if (in.by.pair != 0) check_dim(*in.teacher_margin, "teacher_margin", 1);
  if (in.by.list != 0) check_dim(*in.teacher_logits, "teacher_logits", 3);
  MMKD_CHECK(in.pair_tau > 0 && in.list_tau > 0, "pair_tau, list_tau: expected > 0, got ", in.pair_tau, " and ",
             in.list_tau);
  if (in.by.emb == 0) return;
  const Tensor& targets = *in.targets;
  check_dim(targets, "targets", 3);
  check_type(targets, "targets", type);
  check_size(targets, "targets", 1, in.nodes.size(0));
  check_size(targets, "targets", 2, in.table.size(1));
  MMKD_CHECK(targets.is_contiguous(), "targets: expected a contiguous tensor");
  MMKD_CHECK(targets.size(0) <= kMostTeachers, "targets: expected at most ", kMostTeachers, ", got ", targets.size(0));
  check_dim(in.emb_weights, "emb_weights", 1);
  check_size(in.emb_weights, "emb_weights", 0, targets.size(0));
  check_type(in.emb_weights, "emb_weights", type);
  MMKD_CHECK(in.emb_weights.is_contiguous(), "emb_weights: expected a contiguous tensor");
  MMKD_CHECK(in.gamma >= 1, "gamma: expected >= 1, got ", in.gamma);
}

// The gradients asked for; empty where not.
struct Gradients {
  Tensor table, margin, logits, targets;
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

  // Block c; false if one of its indices is out of range.
  bool run(int64_t c, Sums& sums) const {
    const int64_t begin = c * kSamples, end = std::min(batch_, begin + kSamples);
    if (!MMKD_ON_ISA(list_scores(scores_, begin, end))) return false;
    if (with_list_) {
      sums.list[c] = list_.grad_student || list_.grad_teacher
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
    sums.bpr[c] = losses.bpr;
    sums.pair[c] = losses.pair;
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
  // grad_rows: [n, d], or null.
  EmbLossOf(const Inputs& in, Gradients& grads, T* grad_rows)
      : table_(data<T>(in.table)),
        nodes_(data<int64_t>(in.nodes)),
        num_rows_(in.table.size(0)),
        n_(in.nodes.size(0)),
        d_(in.table.size(1)),
        in_place_(one_after_another(nodes_, n_, num_rows_)),
        gathered_(in_place_ ? empty({0}, in.table) : empty({n_, d_}, in.table)),
        stats_(empty({n_, 1 + 2 * in.targets->size(0)}, in.table)) {
    args_.dtype = dtype_of(in.table);
    args_.student = in_place_ ? table_ + nodes_[0] * d_ : mutable_data<T>(gathered_);
    args_.teachers = in.targets->const_data_ptr();
    args_.weights = in.emb_weights.const_data_ptr();
    args_.stats = stats_.mutable_data_ptr();
    args_.grad_student = grad_rows;
    args_.grad_teachers = where<T>(grads.targets, in.need_targets);
    args_.n = n_;
    args_.d = d_;
    args_.num_teachers = in.targets->size(0);
    args_.gamma = in.gamma;
    args_.scale = in.by.emb / static_cast<double>(std::max<int64_t>(1, n_));
  }

  // Block c; false if one of its nodes is out of range.
  bool run(int64_t c, Sums& sums) const {
    const int64_t begin = c * kSamples, end = std::min(n_, begin + kSamples);
    T* to = const_cast<T*>(static_cast<const T*>(args_.student));
    for (int64_t i = begin; !in_place_ && i < end; ++i) {
      if (static_cast<uint64_t>(nodes_[i]) >= static_cast<uint64_t>(num_rows_)) return false;
      if (i + kRowsAhead < end) prefetch(nodes_[i + kRowsAhead]);
      std::memcpy(to + i * d_, table_ + nodes_[i] * d_, static_cast<size_t>(d_) * sizeof(T));
    }
    sums.emb[c] = MMKD_ON_ISA(emb_kd_losses(args_, begin, end));
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
std::vector<int64_t> joined(const Inputs& in, int64_t batch, int64_t n) {
  const int64_t *users = data<int64_t>(in.users), *nodes = data<int64_t>(in.nodes);
  std::vector<int64_t> all(users, users + batch);
  all.insert(all.end(), nodes, nodes + n);
  return all;
}

[[noreturn]] void fail_indices(const Inputs& in) {
  if (in.by.bpr != 0 || in.by.pair != 0 || in.by.list != 0) {  // else they were not looked at
    check_entries(in.users, "users", in.num_users);
    check_entries(in.candidates, "candidates", in.table.size(0) - in.num_users);
  }
  if (in.by.emb != 0) check_entries(in.nodes, "nodes", in.table.size(0));
  fail("users, candidates, nodes: changed while they were being read");
}

template <class T>
std::tuple<Tensor, Tensor> losses(const Inputs& in, Gradients& grads) {
  const Lambdas& by = in.by;
  const int64_t num_rows = in.table.size(0), batch = by.bpr != 0 || by.pair != 0 || by.list != 0 ? in.users.size(0) : 0;
  const int64_t n = by.emb != 0 ? in.nodes.size(0) : 0, samples = num_blocks(batch), rows = num_blocks(n);
  const PairTables tables = halves_of(in.table, in.num_users);
  const int64_t d = tables.d;
  // What the samples give their users, then what EmbKD gives its nodes: a row for each of `named`.
  Tensor parts = empty({in.need_table ? batch + n : 0, d}, in.table);
  T *user_rows = where<T>(parts, in.need_table), *emb_rows = in.need_table ? user_rows + batch * d : nullptr;
  const PairLossesOf<T> pairs(in, tables, grads, user_rows);
  std::optional<EmbLossOf<T>> emb;
  if (by.emb != 0) emb.emplace(in, grads, emb_rows);
  PairGrads table(tables, data<int64_t>(in.users), data<int64_t>(in.candidates), batch, in.candidates.size(1), false,
                  in.need_table);
  const std::vector<int64_t> named = joined(in, in.need_table ? batch : 0, in.need_table ? n : 0);
  RowGroups of_users(static_cast<int64_t>(named.size()), num_rows, 0, in.num_users),
      of_items(in.need_table ? n : 0, num_rows, in.num_users, num_rows);
  Sums sums{std::vector<double>(samples), std::vector<double>(samples), std::vector<double>(samples),
            std::vector<double>(rows)};
  std::atomic<bool> good{true};
  const int64_t grouping = in.need_table ? table.tasks() : 0, nodes = in.need_table ? 2 : 0;
  for_chunks(
      grouping + nodes + rows + samples,
      [&](int64_t c) {
        if (c < grouping) return table.group(c);
        if ((c -= grouping) < nodes) {
          if (!(c ? of_items.build(data<int64_t>(in.nodes)) : of_users.build(named.data()))) good.store(false);
        } else if ((c -= nodes) < rows) {
          if (!emb->run(c, sums)) good.store(false);
        } else if (!pairs.run(c - rows, sums)) {
          good.store(false);
        }
      },
      batch * in.candidates.size(1) + n <= kSamples);
  if (!good.load() || !table.good()) fail_indices(in);
  if (in.need_table) {
    T* out = mutable_data<T>(grads.table);
    table.write(pairs.weights(), {out, of_users.base(0, user_rows)},
                {out + in.num_users * d, of_items.base(in.num_users, emb_rows)});
  }
  const double means[] = {by.bpr != 0 ? mean(sums.bpr, batch) : 0.0, mean(sums.pair, batch), mean(sums.list, batch),
                          mean(sums.emb, n)};
  Tensor terms = empty({4}, in.table);
  std::copy(means, means + 4, mutable_data<T>(terms));
  const double total = by.bpr * means[0] + by.pair * means[1] + by.list * means[2] + by.emb * means[3];
  return {scalar(total, in.table, sizeof(T) == 8), terms};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> distill(
    Tensor table, int64_t num_users, Tensor users, Tensor candidates, OptTensor teacher_margin,
    OptTensor teacher_logits, Tensor nodes, OptTensor targets, Tensor list_weights, Tensor emb_weights, double bpr,
    double pair, double list, double emb, double pair_tau, bool bernoulli, double alpha, double beta, double list_tau,
    bool coupled, double gamma, bool need_table, bool need_margin, bool need_logits, bool need_targets) {
  const Inputs in{table,
                  users,
                  candidates,
                  nodes,
                  teacher_margin,
                  teacher_logits,
                  targets,
                  list_weights,
                  emb_weights,
                  num_users,
                  {bpr, pair, list, emb},
                  pair_tau,
                  bernoulli,
                  alpha,
                  beta,
                  list_tau,
                  coupled,
                  gamma,
                  need_table,
                  need_margin && teacher_margin && pair != 0,
                  need_logits && teacher_logits && list != 0,
                  need_targets && targets && emb != 0};
  check_inputs(in);
  const auto like = [&](bool wanted, const OptTensor& t) {
    if (!wanted) return empty({0}, table);
    return t->dim() == 1 ? empty({t->size(0)}, table) : empty({t->size(0), t->size(1), t->size(2)}, table);
  };
  Gradients grads{need_table ? empty({table.size(0), table.size(1)}, table) : empty({0}, table),
                  like(in.need_margin, teacher_margin), like(in.need_logits, teacher_logits),
                  like(in.need_targets, targets)};
  auto [total, terms] =
      table.scalar_type() == ScalarType::Double ? losses<double>(in, grads) : losses<float>(in, grads);
  return {total, terms, grads.table, grads.margin, grads.logits, grads.targets};
}

}  // namespace
}  // namespace mmkd

STABLE_TORCH_LIBRARY_IMPL(mmkd, CPU, m) { m.impl("distill", TORCH_BOX(&mmkd::distill)); }
