"""Training batches as a pure function of (seed, epoch, step): counter-based random numbers, no state.

The stream, to be reproduced bit for bit by any other implementation
--------------------------------------------------------------------
``philox(c0, c1, c2, c3)`` is Philox4x32-10 (Salmon et al., SC 2011) with key ``(seed & 0xffffffff, seed >>
32)``; it gives four 32-bit words ``w0..w3``. A whole number below ``n`` (``n < 2^32``) comes from a word by
multiply-high: ``(w * n) >> 32``. For sample ``b`` of a batch, always ``c0 = b, c2 = step, c3 = epoch``, and
with the lists 0-based and sorted:

1. ``w = philox(b, 0, step, epoch)``. User: ``active[below(w0, len(active))]``, ``active`` = users with at
   least one train item. Positive: ``row[below(w1, len(row))]``, ``row`` = his train items.
2. Negative ``j`` in round ``r``: word ``j & 3`` of ``philox(b, NEGATIVE | r << 16 | j >> 2, step, epoch)``,
   ``NEGATIVE = 2^31``. Rounds ``r = 0 .. ROUNDS-1``: the candidate is ``below(w, num_items)``; the first
   that is not in ``row`` is taken.
3. Fallback, round ``r = ROUNDS``: ``k = below(w, num_items - len(row))``; the ``k``-th item (from 0) that is
   not in ``row``.

Negatives of one sample are drawn independently and may repeat.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

import numpy as np
from scipy import sparse

__all__ = ["NEGATIVE", "ROUNDS", "Batch", "Sampler", "below", "philox4x32"]

NEGATIVE = 1 << 31
ROUNDS = 16
_MAX_NEGATIVES = 4 << 16  # the block number has 16 bits
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


class Batch(NamedTuple):
    """One training batch of internal ids, int64: `users` ``[B]``, `pos` ``[B]``, `neg` ``[B, K-1]``."""

    users: np.ndarray
    pos: np.ndarray
    neg: np.ndarray


def philox4x32(counter: tuple, key: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Philox4x32-10, element-wise over broadcast counters.

    Args:
        counter: four whole numbers or arrays of them, each below 2^32.
        key: two whole numbers below 2^32.

    Returns:
        Four uint64 arrays that hold 32-bit words.
    """
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(word, np.uint64) for word in counter))
    k0, k1 = int(key[0]), int(key[1])
    for _ in range(10):
        first, second = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (second >> _SHIFT) ^ c1 ^ np.uint64(k0),
            second & _LOW,
            (first >> _SHIFT) ^ c3 ^ np.uint64(k1),
            first & _LOW,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def below(words: np.ndarray, bound: int | np.ndarray) -> np.ndarray:
    """32-bit words to whole numbers in ``[0, bound)`` by multiply-high; int64."""
    return ((words * np.asarray(bound, np.uint64)) >> _SHIFT).astype(np.int64)


class Sampler:
    """Draws users, one positive each and ``num_negatives`` negatives (spec section 5).

    Args:
        train: ``U x I`` CSR of the train interactions.
        num_negatives: ``K - 1`` list negatives per sample; the first is BPR's.
        batch_size: samples per batch ``B``.
        seed: 64-bit whole number.
        num_steps: batches per epoch; default ``ceil(num_train_edges / batch_size)``.

    Raises:
        ValueError: no interactions, a user who has every item (no negative exists), or an argument out of
            range.
    """

    def __init__(
        self,
        train: sparse.csr_matrix,
        num_negatives: int,
        batch_size: int,
        seed: int = 0,
        num_steps: int | None = None,
    ) -> None:
        self.num_negatives = _in_range("num_negatives", num_negatives, 1, _MAX_NEGATIVES)
        self.batch_size = _in_range("batch_size", batch_size, 1, 2**32 - 1)
        self.seed = _in_range("seed", seed, 0, 2**64 - 1)
        if not sparse.issparse(train) or train.format != "csr":
            raise TypeError(f"train must be a scipy CSR matrix, got {type(train).__name__}; call .tocsr()")
        train = train if train.has_canonical_format else _canonical(train)
        self.num_users, self.num_items = (int(size) for size in train.shape)
        self._rowptr = train.indptr.astype(np.int64)
        self._col = train.indices.astype(np.int64)
        self._degree = np.diff(self._rowptr)
        self._active = np.flatnonzero(self._degree)
        if not len(self._active):
            raise ValueError("train holds no interactions; there is nothing to sample")
        full = np.flatnonzero(self._degree >= self.num_items)
        if len(full):
            raise ValueError(
                f"user {int(full[0])} has all {self.num_items} items in train ({len(full)} such users), so "
                "no negative exists; remove the user or add items"
            )
        self.num_steps = (
            -(-len(self._col) // self.batch_size)
            if num_steps is None
            else _in_range("num_steps", num_steps, 1, 2**32 - 1)
        )
        # one sorted key per edge: membership and rank within a row are one binary search
        self._keys = np.repeat(np.arange(self.num_users), self._degree) * self.num_items + self._col
        # item minus its position in the row = non-interacted items before it; non-decreasing in a row
        gaps = self._col - (np.arange(len(self._col)) - np.repeat(self._rowptr[:-1], self._degree))
        self._gap_keys = self._keys - self._col + gaps

    def batch(self, epoch: int, step: int) -> Batch:
        """The batch of `step` in `epoch`: the same for every call, process and thread count."""
        epoch, step = _in_range("epoch", epoch, 0, 2**32 - 1), _in_range("step", step, 0, 2**32 - 1)
        sample = np.arange(self.batch_size)
        words = self._words(sample, 0, step, epoch)
        users = self._active[below(words[0], len(self._active))]
        pos = self._col[self._rowptr[users] + below(words[1], self._degree[users])]
        return Batch(users, pos, self._negatives(users, step, epoch))

    def _words(self, sample, tag, step: int, epoch: int) -> tuple[np.ndarray, ...]:
        return philox4x32((sample, tag, step, epoch), (self.seed & 0xFFFFFFFF, self.seed >> 32))

    def _negatives(self, users: np.ndarray, step: int, epoch: int) -> np.ndarray:
        count = self.num_negatives
        blocks = np.arange(-(-count // 4))
        words = self._words(np.arange(len(users))[:, None], NEGATIVE | blocks, step, epoch)  # 4 x [B, blocks]
        words = np.stack(words, axis=-1).reshape(len(users), -1)[:, :count]
        neg = below(words, self.num_items).reshape(-1)  # [B * (K-1)]
        owner = np.repeat(users, count)
        open_slots = np.flatnonzero(self._interacted(owner, neg))
        for attempt in range(1, ROUNDS + 1):
            if not len(open_slots):
                break
            draws = self._redraw(open_slots, attempt, step, epoch)
            who = owner[open_slots]
            if attempt == ROUNDS:
                neg[open_slots] = self._nth_other(who, below(draws, self.num_items - self._degree[who]))
                break
            neg[open_slots] = below(draws, self.num_items)
            open_slots = open_slots[self._interacted(who, neg[open_slots])]
        return neg.reshape(len(users), count)

    def _redraw(self, slots: np.ndarray, attempt: int, step: int, epoch: int) -> np.ndarray:
        sample, j = np.divmod(slots, self.num_negatives)
        words = self._words(sample, NEGATIVE | attempt << 16 | j >> 2, step, epoch)
        return np.choose(j & 3, words)

    def _interacted(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        key = users * self.num_items + items
        where = np.searchsorted(self._keys, key)
        return self._keys[np.minimum(where, len(self._keys) - 1)] == key

    def _nth_other(self, users: np.ndarray, n: np.ndarray) -> np.ndarray:
        """The `n`-th item (from 0) not in the user's row: `n` plus the number of his items that come before
        it."""
        before = np.searchsorted(self._gap_keys, users * self.num_items + n, side="right") - self._rowptr[users]
        return n + before


def _canonical(matrix: sparse.csr_matrix) -> sparse.csr_matrix:
    matrix = matrix.copy()
    matrix.sum_duplicates()
    return matrix


def _in_range(name: str, value: int, low: int, high: int) -> int:
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r}") from None
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, got {value}")
    return value
