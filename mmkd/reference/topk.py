"""All-ranking top-k (spec section 5), in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def topk(
    user_emb: Tensor,
    item_emb: Tensor,
    k: int,
    users: Tensor | None = None,
    exclude: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores `[n, k]` and item ids of the k best per user, best first, equal scores by lower id; -inf and -1 where
    fewer than k items are left."""
    if users is None:
        users = torch.arange(user_emb.shape[0], device=user_emb.device)
    acc = torch.float64 if user_emb.dtype == torch.float64 else torch.float32
    all_scores, all_ids = [], []
    for chunk in users.split(1024):
        scores = user_emb[chunk].to(acc) @ item_emb.to(acc).T
        if exclude is not None:
            rowptr, col = exclude
            count = rowptr[chunk + 1] - rowptr[chunk]
            rows = torch.repeat_interleave(torch.arange(len(chunk), device=chunk.device), count)
            within = torch.arange(len(rows), device=rows.device) - torch.repeat_interleave(
                count.cumsum(0) - count, count
            )
            scores[rows, col[rowptr[chunk][rows] + within].long()] = float("-inf")
        order = scores.sort(dim=1, descending=True, stable=True)
        best, ids = order.values[:, :k], order.indices[:, :k]
        if best.shape[1] < k:
            pad = k - best.shape[1]
            best = torch.nn.functional.pad(best, (0, pad), value=float("-inf"))
            ids = torch.nn.functional.pad(ids, (0, pad), value=-1)
        all_scores.append(best)
        all_ids.append(torch.where(best == float("-inf"), -1, ids))
    if not all_scores:
        return user_emb.new_empty(0, k, dtype=acc), users.new_empty(0, k)
    return torch.cat(all_scores), torch.cat(all_ids)
