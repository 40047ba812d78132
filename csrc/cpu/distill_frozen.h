// The student's losses straight from a collapsed teacher's constants, as other ops call them.
#pragma once
#include <tuple>

#include "check.h"

namespace mmkd {

// The op `distill_frozen`: loss, terms, gradients of the table and of the state.
std::tuple<Tensor, Tensor, Tensor, Tensor> distill_frozen(
    Tensor table, int64_t num_users, Tensor users, Tensor candidates, Tensor nodes, Tensor content, Tensor design,
    Tensor ids, Tensor omega, Tensor state, Tensor asked, Tensor listed, int64_t first_item, Tensor list_weights,
    Tensor emb_weights, double bpr, double pair, double list, double emb, double pair_tau, bool bernoulli, double alpha,
    double beta, double list_tau, bool coupled, double gamma, bool need_table, bool need_state);

}  // namespace mmkd
