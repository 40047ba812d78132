"""Ranking metrics of spec section 5 on ranked item ids, vectorised over users."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp

NAMES = ("recall", "ndcg", "precision", "hit", "mrr", "map")
KS = (10, 20, 50)


def check_ks(ks: Sequence[int]) -> tuple[int, ...]:
    """The cut-offs as a tuple of ints.

    Raises ValueError for an empty sequence or a cut-off below 1, TypeError for one that is not an integer.
    """
    cutoffs = tuple(ks)
    if not cutoffs:
        raise ValueError("ks: expected at least one cut-off, got none")
    for k in cutoffs:
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)):
            raise TypeError(f"ks: expected integers, got {k!r}")
        if k < 1:
            raise ValueError(f"ks: expected cut-offs >= 1, got {k}")
    return tuple(int(k) for k in cutoffs)


def hit_matrix(ranked: np.ndarray, relevant: sp.csr_matrix) -> np.ndarray:
    """Which ranked items are relevant.

    Args:
        ranked: integer ids `[n, k]`, best first, distinct in each row; an id of -1 marks an empty place.
        relevant: sparse `[n, num_items]`; row r holds the relevant items of `ranked[r]`, whatever the values.

    Returns:
        bool `[n, k]`.

    Raises:
        ValueError: shapes that do not agree, an id outside `[-1, num_items)`, or a relevant item ranked twice in a row.
        TypeError: ids that are not integers.
    """
    ranked = np.asarray(ranked)
    n, num_items = relevant.shape
    if ranked.ndim != 2 or ranked.shape[0] != n:
        raise ValueError(f"ranked: expected shape [{n}, k] to go with relevant {relevant.shape}, got {ranked.shape}")
    if not np.issubdtype(ranked.dtype, np.integer):
        raise TypeError(f"ranked: expected integer item ids, got dtype {ranked.dtype}")
    bad = np.argwhere((ranked < -1) | (ranked >= num_items))
    if bad.size:
        row, place = bad[0]
        raise ValueError(f"ranked: row {row} holds id {ranked[row, place]}, expected -1 or [0, {num_items})")
    relevant = _sorted(relevant)
    if relevant.nnz == 0 or ranked.size == 0:
        return np.zeros(ranked.shape, dtype=bool)
    offsets = np.arange(n, dtype=np.int64) * num_items
    keys = np.repeat(offsets, np.diff(relevant.indptr)) + relevant.indices  # ascending: rows, then sorted columns
    wanted = ranked.astype(np.int64) + offsets[:, None]
    place = np.minimum(np.searchsorted(keys, wanted), keys.size - 1)
    hits = (keys[place] == wanted) & (ranked >= 0)
    _refuse_repeats(place[hits], keys, num_items)
    return hits


def _sorted(relevant: sp.csr_matrix) -> sp.csr_matrix:
    csr = relevant.tocsr()
    if not csr.has_canonical_format:
        csr = csr.copy()
        csr.sum_duplicates()
    return csr


def _refuse_repeats(found: np.ndarray, keys: np.ndarray, num_items: int) -> None:
    repeated = np.flatnonzero(np.bincount(found, minlength=1) > 1)
    if repeated.size:
        row, item = divmod(int(keys[repeated[0]]), num_items)
        raise ValueError(f"ranked: row {row} holds item {item} more than once, expected distinct items")


def per_user(ranked: np.ndarray, relevant: sp.csr_matrix, ks: Sequence[int] = KS) -> dict[str, np.ndarray]:
    """All metrics of every row: `{"recall@10": float64 [n], ...}`; NaN in rows with nothing relevant.

    With `h_j = 1` where the j-th ranked item is relevant, `H_j = Σ_{i<=j} h_i` and `r = |relevant|`::

        recall@K    = H_K / r                precision@K = H_K / K             hit@K = [H_K > 0]
        ndcg@K      = Σ_{j<=K} h_j / log2(j+1)  /  Σ_{j<=min(K, r)} 1 / log2(j+1)
        mrr@K       = 1 / (first j <= K with h_j = 1), 0 without one
        map@K       = Σ_{j<=K} h_j H_j / j  /  r

    Args:
        ranked: integer ids `[n, k]`, best first, distinct in each row, -1 for an empty place; `k >= max(ks)`.
        relevant: sparse `[n, num_items]`, row by row as `ranked`.
        ks: cut-offs `K`.

    Raises:
        ValueError: as :func:`hit_matrix`, or fewer than `max(ks)` columns in `ranked`.
    """
    cutoffs = check_ks(ks)
    hits = hit_matrix(ranked, relevant)
    width = hits.shape[1]
    if width < max(cutoffs):
        raise ValueError(f"ranked: expected at least max(ks) = {max(cutoffs)} columns, got {width}")
    hits = hits[:, : max(cutoffs)]
    counts = np.diff(_sorted(relevant).indptr)
    values = _metrics(hits, np.maximum(counts, 1), cutoffs)
    empty = counts == 0
    for value in values.values():
        value[empty] = np.nan
    return values


def _metrics(hits: np.ndarray, counts: np.ndarray, cutoffs: tuple[int, ...]) -> dict[str, np.ndarray]:
    rank = np.arange(1, hits.shape[1] + 1, dtype=np.float64)
    discount = 1.0 / np.log2(rank + 1.0)
    ideal = np.cumsum(discount)
    found = np.cumsum(hits, axis=1)  # [n, K]
    gain = np.cumsum(hits * discount, axis=1)
    precisions = np.cumsum(hits * (found / rank), axis=1)
    first = np.where(hits.any(axis=1), hits.argmax(axis=1) + 1.0, np.inf)
    values: dict[str, np.ndarray] = {}
    for k in cutoffs:
        values[f"recall@{k}"] = found[:, k - 1] / counts
        values[f"ndcg@{k}"] = gain[:, k - 1] / ideal[np.minimum(counts, k) - 1]
        values[f"precision@{k}"] = found[:, k - 1] / k
        values[f"hit@{k}"] = (found[:, k - 1] > 0).astype(np.float64)
        values[f"mrr@{k}"] = np.where(first <= k, 1.0 / first, 0.0)
        values[f"map@{k}"] = precisions[:, k - 1] / counts
    return values


def mean(values: dict[str, np.ndarray]) -> dict[str, float]:
    """Means of per-user metrics over the users with something relevant (NaN entries are left out).

    Raises ValueError when no user has anything relevant.
    """
    means = {}
    for name, value in values.items():
        kept = value[~np.isnan(value)]
        if kept.size == 0:
            raise ValueError(f"{name}: no user has anything relevant, so there is nothing to average")
        means[name] = float(kept.mean())
    return means
