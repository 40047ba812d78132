"""The ranking loss of a stage: BPR, or a softmax against items that all pairs of a step share."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from mmkd import ops

if TYPE_CHECKING:
    from mmkd.training.stage import NodeBatch


class SharedItems(NamedTuple):
    """Items a step's pairs are ranked against: int64 `items` `[S]`, distinct, and `owned` `[2, n]`, the (b, s) where the
    user of pair b has item s in train."""

    items: np.ndarray
    owned: np.ndarray


NO_SHARED_ITEMS = SharedItems(np.empty(0, np.int64), np.empty((2, 0), np.int64))


class SharedNegatives:
    """Draws `count` distinct items a step, uniformly; a pure function of (seed, epoch, step). Cost: `O(I + B degree)`.

    Args:
        train: `U x I` CSR. count: at most `I` are drawn; 0 draws none.
    """

    def __init__(self, train: sp.csr_matrix, count: int, seed: int) -> None:
        self.train, self.seed, self.count = train, seed, min(count, train.shape[1])

    def __call__(self, epoch: int, step: int, users: Tensor) -> SharedItems:
        """The items of a step and which of them its users `[B]` have."""
        if not self.count:
            return NO_SHARED_ITEMS
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, epoch, step])))
        items = np.sort(generator.choice(self.train.shape[1], self.count, replace=False))
        place = np.full(self.train.shape[1], -1, np.int64)
        place[items] = np.arange(self.count)
        rows = self.train[users.numpy()]
        pair = np.repeat(np.arange(len(users)), np.diff(rows.indptr))
        where = place[rows.indices]
        return SharedItems(items, np.stack([pair[where >= 0], where[where >= 0]]))


def ranking_loss(users: Tensor, items: Tensor, batch: NodeBatch) -> Tensor:
    """BPR of the batch's negatives; or, where it has shared items `S`, with `s_bj = e_u . e_j` and `N_u` the user's items:

        -1/B sum_b log( exp(s_b,pos) / (exp(s_b,pos) + sum_{j in S \\ N_u} exp(s_bj)) )

    so that an item counts the more the higher it is ranked: hard negatives without a search. `[B, S]` scores are held.

    Args:
        users, items: the step's compact tables `[., d]`.

    Returns:
        Scalar, float32 (float64 for float64 tables).
    """
    if not len(batch.shared):
        return ops.bpr_loss(users, items, batch.users, batch.pos, batch.neg)
    own = users.index_select(0, batch.users)  # [B, d]
    observed = (own * items.index_select(0, batch.pos)).sum(1, keepdim=True)
    scores = own @ items.index_select(0, batch.shared).T  # [B, S]
    scores = scores.index_put_(tuple(batch.owned), scores.new_tensor(-torch.inf))
    logits = torch.cat([observed, scores], 1)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return (logits.logsumexp(1) - logits[:, 0]).mean() if len(logits) else logits.sum()
