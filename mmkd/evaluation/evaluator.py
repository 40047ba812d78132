"""All-ranking evaluation (spec section 5): every item the user has not interacted with before is ranked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from mmkd.evaluation import metrics
from mmkd.finite import all_finite

if TYPE_CHECKING:
    from mmkd.data.dataset import Dataset

Part = Literal["val", "test"]
ScoreFn = Callable[[np.ndarray], np.ndarray]

SCORES_PER_CHUNK = 1 << 22  # 16 MB of float32 scores at a time


@dataclass(frozen=True, eq=False)
class PerUser:
    """Metrics of each evaluated user, as paired significance tests need them.

    Attributes:
        users: int64 `[n]`, internal ids of the users with something relevant, ascending.
        values: `"recall@20"` and so on, each float64 `[n]`, in the order of `users`.
    """

    users: np.ndarray
    values: dict[str, np.ndarray]

    def mean(self) -> dict[str, float]:
        """The means over `users`: what :func:`evaluate` returns."""
        return metrics.mean(self.values)


def relevant_items(dataset: Dataset, part: Part) -> sp.csr_matrix:
    """The `U x I` interactions of `part`. Raises ValueError for another part, or one that is missing or empty."""
    if part not in ("val", "test"):
        raise ValueError(f"part: expected 'val' or 'test', got {part!r}")
    matrix = getattr(dataset, part)
    if matrix is None or matrix.nnz == 0:
        what = "is missing" if matrix is None else "has no interactions"
        raise ValueError(f"part: {part!r} of data set {dataset.name!r} {what}; load it with a split that makes one")
    return matrix


def seen_items(dataset: Dataset, part: Part) -> sp.csr_matrix:
    """What is not ranked when `part` is evaluated: train for val, train and validation for test; `U x I`, sorted."""
    seen = dataset.train
    if part == "test" and dataset.val is not None:
        seen = seen + dataset.val
    seen = sp.csr_matrix(seen)
    if not seen.has_sorted_indices:
        seen = seen.sorted_indices()
    return seen


def as_exclude(seen: sp.csr_matrix, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """A sparse `U x I` matrix as the `(rowptr int64, col int32)` that `ops.topk(exclude=...)` takes."""
    rowptr = torch.from_numpy(seen.indptr.astype(np.int64))
    col = torch.from_numpy(seen.indices.astype(np.int32))
    return rowptr.to(device), col.to(device)


def evaluate(
    user_emb: Tensor, item_emb: Tensor, dataset: Dataset, part: Part = "val", ks: Sequence[int] = metrics.KS
) -> dict[str, float]:
    """Mean Recall, NDCG, Precision, HitRate, MRR and MAP at each cut-off of a model that scores by inner products.

    Items of the user's train set (at `part="test"` also of his validation set) are not ranked; users with nothing in
    `part` are left out; equal scores are ranked by ascending item id. Formulas: :func:`mmkd.evaluation.metrics.per_user`.

    Args:
        user_emb, item_emb: final tables `[U, d]`, `[I, d]`, floating, on one device.
        dataset: with the part asked for.
        part: `"val"` or `"test"`.
        ks: cut-offs.

    Returns:
        `{"recall@10": ..., "ndcg@10": ..., "precision@10": ..., "hit@10": ..., "mrr@10": ..., "map@10": ..., ...}`.

    Raises:
        ValueError: tables that do not fit the data set or hold NaN or Inf, a part that is missing or empty, bad cut-offs.
    """
    return evaluate_per_user(user_emb, item_emb, dataset, part, ks).mean()


def evaluate_per_user(
    user_emb: Tensor, item_emb: Tensor, dataset: Dataset, part: Part = "val", ks: Sequence[int] = metrics.KS
) -> PerUser:
    """:func:`evaluate`, one value per user instead of the means."""
    from mmkd import ops

    _check_tables(user_emb, item_emb, dataset)
    exclude = as_exclude(seen_items(dataset, part), user_emb.device)

    def rank(users: np.ndarray, k: int) -> np.ndarray:
        rows = torch.from_numpy(users).to(user_emb.device)
        return ops.topk(user_emb, item_emb, k, users=rows, exclude=exclude)[1].cpu().numpy()

    with torch.no_grad():
        return _evaluate(rank, dataset, part, ks)


def evaluate_scores(
    score_fn: ScoreFn, dataset: Dataset, part: Part = "val", ks: Sequence[int] = metrics.KS
) -> dict[str, float]:
    """:func:`evaluate` for any model: `score_fn(users int64 [n]) -> scores [n, I]`, higher is better.

    An item with score -inf is never ranked. Raises ValueError as :func:`evaluate`, and for scores of a wrong shape or NaN.
    """
    return evaluate_scores_per_user(score_fn, dataset, part, ks).mean()


def evaluate_scores_per_user(
    score_fn: ScoreFn, dataset: Dataset, part: Part = "val", ks: Sequence[int] = metrics.KS
) -> PerUser:
    """:func:`evaluate_scores`, one value per user instead of the means."""
    seen = seen_items(dataset, part)

    def rank(users: np.ndarray, k: int) -> np.ndarray:
        scores = _checked_scores(score_fn(users), users, dataset.num_items)
        rows = seen[users]
        scores[np.repeat(np.arange(users.size), np.diff(rows.indptr)), rows.indices] = -np.inf
        return rank_scores(scores, k)

    return _evaluate(rank, dataset, part, ks)


def rank_scores(scores: np.ndarray, k: int) -> np.ndarray:
    """The k best columns of each row, best first; equal scores by ascending column; -inf is never ranked.

    Args:
        scores: floating `[n, num_items]` without NaN.
        k: `1 <= k <= num_items`.

    Returns:
        int64 `[n, k]`, -1 where a row has fewer than k scores above -inf.
    """
    n, num_items = scores.shape
    if not 1 <= k <= num_items:
        raise ValueError(f"k: expected 1 to {num_items} (the number of items), got {k}")
    best = torch.from_numpy(scores).topk(k, dim=1).values.numpy()  # torch's ids do not break ties; its values are exact
    last = best[:, -1:]
    kept = scores >= last
    over = np.flatnonzero(np.count_nonzero(kept, axis=1) > k)  # rows whose k-th best is tied: keep the lowest ids
    tied = scores[over] == last[over]
    room = k - (scores[over] > last[over]).sum(axis=1, keepdims=True)
    kept[over] &= ~tied | (np.cumsum(tied, axis=1) <= room)
    ids = (np.flatnonzero(kept) % num_items).reshape(n, k)  # ascending, so that a stable sort breaks ties by id
    best = np.take_along_axis(scores, ids, axis=1)
    order = np.argsort(-best, axis=1, kind="stable")
    ids = np.take_along_axis(ids, order, axis=1)
    return np.where(np.take_along_axis(best, order, axis=1) == -np.inf, -1, ids)


def _evaluate(
    rank: Callable[[np.ndarray, int], np.ndarray], dataset: Dataset, part: Part, ks: Sequence[int]
) -> PerUser:
    cutoffs = metrics.check_ks(ks)
    relevant = relevant_items(dataset, part)
    users = np.flatnonzero(np.diff(relevant.indptr)).astype(np.int64)
    width = max(cutoffs)
    chunks = []
    for chunk in _chunks(users, dataset.num_items):
        ranked = np.full((chunk.size, width), -1, dtype=np.int64)
        k = min(width, dataset.num_items)
        ranked[:, :k] = rank(chunk, k)
        chunks.append(metrics.per_user(ranked, relevant[chunk], cutoffs))
    return PerUser(users, {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]})


def _chunks(users: np.ndarray, num_items: int) -> Iterator[np.ndarray]:
    size = max(1, SCORES_PER_CHUNK // num_items)
    for start in range(0, users.size, size):
        yield users[start : start + size]


def _check_tables(user_emb: Tensor, item_emb: Tensor, dataset: Dataset) -> None:
    for name, table, rows in (("user_emb", user_emb, dataset.num_users), ("item_emb", item_emb, dataset.num_items)):
        if table.ndim != 2 or table.shape[0] != rows:
            raise ValueError(f"{name}: expected shape [{rows}, d] for {dataset.name!r}, got {tuple(table.shape)}")
        if not all_finite(table):
            row = int((~torch.isfinite(table).all(dim=1)).nonzero()[0])
            raise ValueError(f"{name}: row {row} holds NaN or Inf; the training that made it diverged")


def _checked_scores(scores: np.ndarray, users: np.ndarray, num_items: int) -> np.ndarray:
    scores = np.array(scores)  # a copy: it is masked in place
    if scores.shape != (users.size, num_items):
        raise ValueError(f"score_fn: expected scores of shape {(users.size, num_items)}, got {scores.shape}")
    if not np.issubdtype(scores.dtype, np.floating):
        scores = scores.astype(np.float64)
    bad = np.flatnonzero(np.isnan(scores).any(axis=1))
    if bad.size:
        raise ValueError(f"score_fn: NaN among the scores of user {users[bad[0]]}")
    return scores
