// topk for CUDA tensors: scores are reduced as they are made, never stored.
#include "cuda/loss_tables.h"
#include "cuda/topk_kernel.h"

namespace mmkd::cuda {
namespace {

std::tuple<Tensor, Tensor> topk_op(Tensor user_emb, Tensor item_emb, int64_t k, OptTensor users, OptTensor rowptr,
                                   OptTensor col) {
  check_tables(user_emb, item_emb);
  MMKD_CHECK(k >= 1, "k: expected >= 1, got ", k);
  MMKD_CHECK(item_emb.size(0) <= INT32_MAX, "item_emb: expected at most 2^31 - 1 rows, got ", item_emb.size(0));
  MMKD_CHECK(rowptr.has_value() == col.has_value(), "rowptr, col: expected both or neither");
  TopkArgs a{};
  if (users) check_index(*users, "users");
  if (rowptr) {
    check_index(*rowptr, "rowptr");
    check_size(*rowptr, "rowptr", 0, user_emb.size(0) + 1);
    check_dim(*col, "col", 1);
    check_dense(*col, "col");
    a.col64 = col->scalar_type() == ScalarType::Long;
    MMKD_CHECK(a.col64 || col->scalar_type() == ScalarType::Int, "col: expected dtype int32 or int64, got ",
               torch::headeronly::toString(col->scalar_type()));
    a.rowptr = data<int64_t>(*rowptr);
    a.col = col->const_data_ptr();
  }
  const Device device(user_emb);
  const ScalarType acc = accumulate_type(user_emb.scalar_type());
  a.dtype = dtype_of(user_emb);
  a.user_emb = user_emb.const_data_ptr();
  a.item_emb = item_emb.const_data_ptr();
  a.users = users ? data<int64_t>(*users) : nullptr;
  a.num_users = user_emb.size(0);
  a.num_items = item_emb.size(0);
  a.n = users ? users->numel() : a.num_users;
  a.d = user_emb.size(1);
  a.k = k;
  a.splits = topk_splits(a.n, a.num_items, k);
  a.wide = wide_rows(a.d, user_emb, item_emb);
  Tensor list_scores = empty({a.n, a.splits, k}, user_emb, acc);
  Tensor list_ids = empty({a.n, a.splits, k}, user_emb, ScalarType::Int);
  Tensor scores = empty({a.n, k}, user_emb, acc), ids = empty({a.n, k}, user_emb, ScalarType::Long);
  a.list_scores = list_scores.mutable_data_ptr();
  a.list_ids = mutable_data<int32_t>(list_ids);
  a.scores = scores.mutable_data_ptr();
  a.ids = mutable_data<int64_t>(ids);
  topk(a, device.stream());
  return {scores, ids};
}

}  // namespace
}  // namespace mmkd::cuda

MMKD_CUDA_IMPL(m) { m.impl("topk", TORCH_BOX(&mmkd::cuda::topk_op)); }
