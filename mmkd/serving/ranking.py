"""Exact top-k for many users: the items of large norm first, and the others only for users they could still reach."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from mmkd import ops
from mmkd.evaluation.evaluator import as_exclude

HEAD = 1024  # items in the head; a pool below four times that is ranked whole
ENOUGH = 0.25  # share of a block's users the head has to settle for it to go on being asked


class Ranking:
    """`ops.topk` over a pool of items, with the same result and, where item norms differ, less work.

    `|e_u . e_i| <= |e_u| |e_i|` (Cauchy-Schwarz). A user whose k-th best score among the `HEAD` items of largest norm is
    above `|e_u|` times the largest norm outside the head is settled: no other item can enter. The rest of the users are
    ranked over the whole pool. Trained tables settle most users, because norms grow with popularity; where a block shows
    that they do not, the head is not asked again.

    Args:
        user_emb: `[U, d]`. item_emb: `[I, d]`. seen: sparse `U x I`. pool: ascending item rows to rank; None: all.
    """

    def __init__(self, user_emb: Tensor, item_emb: Tensor, seen: sp.csr_matrix, pool: np.ndarray | None = None) -> None:
        self._users = user_emb
        self._whole = _Part(item_emb, seen, pool)
        self._head: _Part | None = None
        if len(self._whole.items) >= 4 * HEAD:
            norms = self._whole.items.double().norm(dim=1)
            order = torch.argsort(norms, descending=True, stable=True)
            rows = np.sort(order[:HEAD].numpy())  # ascending again: equal scores rank by item row
            self._head = _Part(item_emb, seen, rows if pool is None else pool[rows])
            # rounding of a float32 inner product of width d is below d * 2^-23 of the bound
            self._reach = float(norms[order[HEAD]]) * (1 + user_emb.shape[1] * 2.0**-23)

    def topk(self, rows: np.ndarray, k: int, exclude_seen: bool) -> tuple[np.ndarray, np.ndarray]:
        """Scores `[n, k]` and item rows `[n, k]` (-1: none left) for user rows `[n]`, as `ops.topk` gives them."""
        users = torch.from_numpy(rows)
        if self._head is None or len(rows) < 2 or k > HEAD:
            return self._whole.topk(self._users, users, k, exclude_seen)
        scores, items = self._head.topk(self._users, users, k, exclude_seen)
        norms = self._users[users].double().norm(dim=1).numpy()
        open_ = np.flatnonzero(~(scores[:, -1] > norms * self._reach))
        if len(open_):
            scores[open_], items[open_] = self._whole.topk(self._users, users[open_], k, exclude_seen)
        if len(rows) >= 256 and len(open_) > (1 - ENOUGH) * len(rows):
            self._head = None
        return scores, items


class _Part:
    """Some items, ascending, and who has seen which of them."""

    def __init__(self, item_emb: Tensor, seen: sp.csr_matrix, rows: np.ndarray | None) -> None:
        self._rows = rows
        self.items = item_emb if rows is None else item_emb[torch.from_numpy(rows)]
        self._exclude = as_exclude(seen if rows is None else seen[:, rows].sorted_indices())

    def topk(self, user_emb: Tensor, users: Tensor, k: int, exclude_seen: bool) -> tuple[np.ndarray, np.ndarray]:
        exclude = self._exclude if exclude_seen else None
        scores, items = (t.numpy() for t in ops.topk(user_emb, self.items, k, users=users, exclude=exclude))
        return scores, items if self._rows is None else np.where(items >= 0, self._rows[items], -1)
