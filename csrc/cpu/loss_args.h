// The loss kernels' arguments, checked: for the ops of one loss and for the op of all of them.
#pragma once
#include "cpu/bpr_kd_kernel.h"
#include "cpu/list_kd_kernel.h"
#include "cpu/losses.h"

namespace mmkd {

// teacher: [batch], of the accumulator type. Margins, scales and gradients are the caller's to fill in; of the next,
// too.
PairArgs pair_args(const OptTensor& teacher, int64_t batch, bool f64, double tau, bool bernoulli);

// teacher: [M, batch, k], weights: [M], of type `acc`.
ListKdArgs list_kd_args(const Tensor& teacher, const Tensor& weights, ScalarType acc, int64_t batch, int64_t k,
                        double alpha, double beta, double tau, bool coupled);

// What every block of samples of list_kd computes with; it must not depend on the thread that takes the block.
class ListScratch {
 public:
  explicit ListScratch(const ListKdArgs& a)
      : each_(kListScratch * a.k * MMKD_ON_ISA(list_kd_lanes(a.f64)) * (a.f64 ? 8 : 4)),
        memory_(new char[each_ * num_blocks(a.batch)]) {}
  void* of(int64_t block) const { return memory_.get() + block * each_; }

 private:
  int64_t each_;
  std::unique_ptr<char[]> memory_;
};

}  // namespace mmkd
