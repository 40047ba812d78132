"""Exact top-k by inner product over all items: scores are reduced as they are made, never stored."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkd import backends, reference
from mmkd.ops._checks import accumulate_type, check_index, check_same_device, check_shape, check_tables, dense
from mmkd.ops._registry import call, on_register


def topk(
    user_emb: Tensor,
    item_emb: Tensor,
    k: int,
    users: Tensor | None = None,
    exclude: tuple[Tensor, Tensor] | None = None,
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The `k` items with the largest `e_u . e_i` for each user, best first; equal scores by lower item id (spec section 5).

    Args:
        user_emb: `[U, d]`. item_emb: `[I, d]`, the same dtype: float32, float64, bfloat16 or float16.
        k: `>= 1`.
        users: int64 `[n]`, rows of `user_emb`; all if not given.
        exclude: `(rowptr int64 [U + 1], col int32 or int64)`: items never returned for each row of `user_emb`.
        impl: `auto`, `reference`, `cpp`, `cuda` or `triton`.

    Returns:
        `(scores [n, k], ids int64 [n, k])`, scores in float32 (float64 for float64 tables); where fewer than `k` items are
        left, `-inf` and `-1`. NaN scores are never returned. Not differentiable.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device (named). RuntimeError: an id out of range.
    """
    check_tables(user_emb, item_emb)
    check_same_device(("user_emb", user_emb), ("item_emb", item_emb), ("users", users))
    if k < 1:
        raise ValueError(f"k: expected >= 1, got {k}")
    if users is not None:
        check_index(users, "users")
        users = dense(users)
    rowptr = col = None
    if exclude is not None:
        rowptr, col = exclude
        check_index(rowptr, "exclude[0] (rowptr)")
        check_shape(rowptr, "exclude[0] (rowptr)", (user_emb.shape[0] + 1,))
        check_index(col, "exclude[1] (col)", (torch.int32, torch.int64))
        check_same_device(("user_emb", user_emb), ("exclude[0]", rowptr), ("exclude[1]", col))
        rowptr, col = dense(rowptr), dense(col)
    user_emb, item_emb = user_emb.detach(), item_emb.detach()
    which = backends.resolve("topk", user_emb, impl)
    if which == "reference":
        return reference.topk(user_emb, item_emb, k, users, None if rowptr is None else (rowptr, col))
    return call(which, "topk", dense(user_emb), dense(item_emb), k, users, rowptr, col)


@on_register
def _register(ns: str, ops) -> None:
    def fake(user_emb, item_emb, k, users, rowptr, col):
        n = user_emb.shape[0] if users is None else users.shape[0]
        scores = user_emb.new_empty(n, k, dtype=accumulate_type(user_emb.dtype))
        return scores, user_emb.new_empty(n, k, dtype=torch.int64)

    torch.library.register_fake(f"{ns}::topk", fake)
