// student on the CPU: propagation, the prompt's state, teacher and losses, L2, and the gradients of all of it down to
// the propagated rows, in one op. Between its parts nothing but a few loops over rows: what a step of a small model
// does between kernels takes as long as the kernels when it is done op by op.
#include <algorithm>

#include "cpu/distill_frozen.h"
#include "cpu/losses.h"
#include "cpu/propagate.h"
#include "cpu/range.h"
#include "cpu/student_kernel.h"

namespace mmkd {
namespace {

constexpr int64_t kStateRows = 8;  // to a piece of the prompt's products
constexpr int64_t kSquares = 256;  // rows to a piece of the L2 term

// out[c][r] = in[r][c] for a block [rows, columns] whose rows are `ld` apart, zeros behind `rows` up to `padded`.
template <class T>
void transpose(const T* in, int64_t rows, int64_t columns, int64_t ld, T* out, int64_t padded) {
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = 0; r < rows; ++r) out[c * padded + r] = in[r * ld + c];
    std::fill(out + c * padded + rows, out + (c + 1) * padded, T(0));
  }
}

// Z^m = V V^T S^m and the way back to W_P and b_P.
template <class T>
class PromptState {
 public:
  PromptState(const Tensor& weight, const Tensor& bias, const Tensor& mixed, int64_t modalities, int64_t d)
      : rows_(weight.size(0)), mixed_(mixed) {
    a_.f64 = sizeof(T) == 8;
    a_.e = rows_ + 1;
    a_.ep = (a_.e + 15) / 16 * 16;
    a_.k = weight.size(1);
    a_.d = d;
    a_.modalities = modalities;
    stacked_.emplace(empty({a_.e, a_.k}, weight));
    stacked_t_.emplace(empty({a_.k, a_.ep}, weight));
    square_.emplace(empty({a_.e, a_.ep}, weight));
    T* stacked = mutable_data<T>(*stacked_);
    std::copy_n(data<T>(weight), rows_ * a_.k, stacked);
    std::copy_n(data<T>(bias), a_.k, stacked + rows_ * a_.k);
    transpose(stacked, a_.e, a_.k, a_.k, mutable_data<T>(*stacked_t_), a_.ep);
    a_.stacked = stacked;
    a_.stacked_t = stacked_t_->const_data_ptr();
    a_.mixed = mixed.const_data_ptr();
    a_.square = square_->mutable_data_ptr();
  }

  // [M, e, d]
  Tensor forward() {
    Tensor state = empty({a_.modalities, a_.e, a_.d}, mixed_);
    a_.state = state.mutable_data_ptr();
    by_rows([&](int64_t begin, int64_t end) { MMKD_ON_ISA(prompt_state(a_, begin, end)); });
    return state;
  }

  // The gradients of W_P and b_P, from that of Z.
  std::tuple<Tensor, Tensor> backward(Tensor grad_state) {
    const int64_t wide = a_.modalities * a_.d;
    Tensor mixed_t = empty({a_.modalities, a_.d, a_.ep}, mixed_), weight = empty({rows_, a_.k}, mixed_);
    Tensor bias = empty({a_.k}, mixed_), both = empty({a_.e, a_.k}, mixed_);
    transpose(data<T>(mixed_), a_.e, wide, wide, mutable_data<T>(mixed_t), a_.ep);
    a_.mixed_t = mixed_t.const_data_ptr();
    a_.state = grad_state.mutable_data_ptr();
    a_.grad = both.mutable_data_ptr();
    by_rows([&](int64_t begin, int64_t end) { MMKD_ON_ISA(prompt_square_grads(a_, begin, end)); });
    by_rows([&](int64_t begin, int64_t end) { MMKD_ON_ISA(prompt_grads(a_, begin, end)); });
    const T* grad = data<T>(both);
    std::copy_n(grad, rows_ * a_.k, mutable_data<T>(weight));
    std::copy_n(grad + rows_ * a_.k, a_.k, mutable_data<T>(bias));
    return {weight, bias};
  }

 private:
  template <class F>
  void by_rows(const F& f) const {
    for_chunks((a_.e + kStateRows - 1) / kStateRows,
               [&](int64_t c) { f(c * kStateRows, std::min(a_.e, (c + 1) * kStateRows)); });
  }

  const int64_t rows_;
  const Tensor mixed_;
  std::optional<Tensor> stacked_, stacked_t_, square_;
  PromptStateArgs a_{};
};

// 1/2 sum of l2[i] ||table[rows[i]]||^2, summed in the rows' order.
double l2_term(const Tensor& table, const Tensor& rows, const Tensor& l2) {
  const bool f64 = table.scalar_type() == ScalarType::Double;
  const L2Args a{f64, table.const_data_ptr(), data<int64_t>(rows), l2.const_data_ptr(), table.size(1)};
  const int64_t n = rows.numel(), pieces = (n + kSquares - 1) / kSquares;
  std::vector<double> sums(pieces);
  for_chunks(pieces, [&](int64_t c) {
    sums[c] = MMKD_ON_ISA(weighted_squares(a, c * kSquares, std::min(n, (c + 1) * kSquares)));
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  return total / 2;
}

template <class T>
std::tuple<Tensor, Tensor> summed(const Tensor& loss, const Tensor& terms, const double (&by)[4], double l2) {
  Tensor weighted = empty({5}, terms);
  T* out = mutable_data<T>(weighted);
  for (int i = 0; i < 4; ++i) out[i] = static_cast<T>(by[i] * static_cast<double>(data<T>(terms)[i]));
  out[4] = static_cast<T>(l2);
  return {scalar(static_cast<double>(*data<T>(loss)) + l2, terms, sizeof(T) == 8), weighted};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> student(
    Tensor rowptr, Tensor col, Tensor scale, Tensor table, int64_t num_layers, Tensor rows, bool mixed_layers,
    OptTensor l2, int64_t num_users, Tensor users, Tensor candidates, Tensor nodes, Tensor content, Tensor design,
    Tensor ids, Tensor omega, Tensor prompt_weight, Tensor prompt_bias, Tensor mixed, Tensor asked, Tensor listed,
    int64_t first_item, Tensor list_weights, Tensor emb_weights, double bpr, double pair, double list, double emb,
    double pair_tau, bool bernoulli, double alpha, double beta, double list_tau, bool coupled, double gamma,
    bool need_table, bool need_prompt) {
  const ScalarType type = table.scalar_type();
  MMKD_CHECK(type == ScalarType::Float || type == ScalarType::Double, "table: expected float32 or float64, got ",
             torch::headeronly::toString(type));
  MMKD_CHECK(!mixed_layers || type == ScalarType::Float, "table: expected float32 where bfloat16 is gathered, got ",
             torch::headeronly::toString(type));
  check_dim(content, "content", 3);
  check_dim(prompt_weight, "prompt_weight", 2);
  const int64_t e = prompt_weight.size(0) + 1, modalities = content.size(0), d = content.size(2);
  MMKD_CHECK(modalities >= 1, "content: expected at least one modality, got shape ", shape_of(content));
  check_dim(table, "table", 2);
  check_size(content, "content", 2, table.size(1));
  check_dim(design, "design", 2);
  check_size(design, "design", 1, e);
  check_shape(prompt_weight, "prompt_weight", {e - 1, prompt_weight.size(1)}, type);
  check_shape(prompt_bias, "prompt_bias", {prompt_weight.size(1)}, type);
  check_shape(mixed, "mixed", {e, modalities * d}, type);
  if (l2) check_shape(*l2, "l2", {rows.numel()}, type);

  const Tensor own = [&] {
    const Range range("mmkd::student, propagation");
    return propagate_as(rowptr, col, scale, table, num_layers, rows, mixed_layers, "table");  // has checked `rows`
  }();
  const double squares = l2 ? l2_term(table, rows, *l2) : 0.0;
  const double by[] = {bpr, pair, list, emb};
  const auto run = [&]<class T>(T) -> std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> {
    PromptState<T> prompt(prompt_weight, prompt_bias, mixed, modalities, d);
    const Tensor state = [&] {
      const Range range("mmkd::student, state of the prompt");
      return prompt.forward();
    }();
    const auto [loss, terms, grad_rows, grad_state] = [&] {
      const Range range("mmkd::student, teacher and losses");
      return distill_frozen(own, num_users, users, candidates, nodes, content, design, ids, omega, state, asked, listed,
                            first_item, list_weights, emb_weights, bpr, pair, list, emb, pair_tau, bernoulli, alpha,
                            beta, list_tau, coupled, gamma, need_table, need_prompt);
    }();
    const auto [total, weighted] = summed<T>(loss, terms, by, squares);
    if (!need_prompt) return {total, weighted, grad_rows, empty({0}, table), empty({0}, table)};
    const Range range("mmkd::student, prompt back");
    const auto [grad_weight, grad_bias] = prompt.backward(grad_state);
    return {total, weighted, grad_rows, grad_weight, grad_bias};
  };
  return type == ScalarType::Double ? run(double()) : run(float());
}

}  // namespace
}  // namespace mmkd

STABLE_TORCH_LIBRARY_IMPL(mmkd, CPU, m) { m.impl("student", TORCH_BOX(&mmkd::student)); }
