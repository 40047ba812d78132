"""The sampler (spec section 5) in plain NumPy: training batches as a pure function of (seed, epoch, step).

The stream, to be reproduced bit for bit by any other implementation:

``philox(c0, c1, c2, c3)`` is Philox4x32-10 (Salmon et al., SC 2011) with key ``(seed & 0xffffffff, seed >>
32)``; it gives four 32-bit words ``w0..w3``. A whole number below ``n`` (``n < 2^32``) comes from a word by
multiply-high: ``(w * n) >> 32``. For sample ``b`` of a batch, always ``c0 = b, c2 = step, c3 = epoch``, and
with the lists 0-based and sorted:

1. ``w = philox(b, 0, step, epoch)``. User: ``active[below(w0, len(active))]``, ``active`` = users with at
   least one train item (`by_pair`: each as often as he has items, so that every pair is equally likely). Positive: ``row[below(w1, len(row))]``, ``row`` = his train items.
2. Negative ``j`` in round ``r``: word ``j & 3`` of ``philox(b, NEGATIVE | r << 16 | j >> 2, step, epoch)``,
   ``NEGATIVE = 2^31``. Rounds ``r = 0 .. ROUNDS-1``: the candidate is ``below(w, num_items)``; the first
   that is not in ``row`` is taken.
3. Fallback, round ``r = ROUNDS``: ``k = below(w, num_items - len(row))``; the ``k``-th item (from 0) that is
   not in ``row``.

Negatives of one sample are drawn independently and may repeat.
"""

from __future__ import annotations

import numpy as np

__all__ = ["NEGATIVE", "ROUNDS", "Sampler", "below", "philox4x32"]

NEGATIVE = 1 << 31
ROUNDS = 16
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


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
    """Batches of `size` samples with `num_negatives` negatives each over the CSR (`rowptr`, `col`) of the train part.

    Users are drawn uniformly, with `by_pair` (user, item) pairs are. The columns of every row are strictly ascending and no row is full; `rounds` draws come before the fallback.
    """

    def __init__(
        self, rowptr: np.ndarray, col: np.ndarray, num_items: int, rounds: int = ROUNDS, by_pair: bool = False
    ) -> None:
        self.num_items, self._rounds = num_items, rounds
        self._rowptr, self._col = rowptr.astype(np.int64), col.astype(np.int64)
        self._degree = np.diff(self._rowptr)
        self._active = np.repeat(np.arange(len(self._degree)), self._degree if by_pair else self._degree > 0)
        # one sorted key per edge: membership and rank within a row are one binary search
        self._keys = np.repeat(np.arange(len(self._degree)), self._degree) * num_items + self._col
        # item minus its position in the row = non-interacted items before it; non-decreasing in a row
        gaps = self._col - (np.arange(len(self._col)) - np.repeat(self._rowptr[:-1], self._degree))
        self._gap_keys = self._keys - self._col + gaps

    def batch(self, seed: int, epoch: int, step: int, size: int, num_negatives: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 `users [size]` and `candidates [size, num_negatives + 1]`, the positive first."""
        place = (seed, epoch, step)
        words = self._words(np.arange(size), 0, *place)
        users = self._active[below(words[0], len(self._active))]
        pos = self._col[self._rowptr[users] + below(words[1], self._degree[users])]
        return users, np.concatenate([pos[:, None], self._negatives(users, num_negatives, *place)], axis=1)

    def _words(self, sample, tag, seed: int, epoch: int, step: int) -> tuple[np.ndarray, ...]:
        return philox4x32((sample, tag, step, epoch), (seed & 0xFFFFFFFF, seed >> 32))

    def _negatives(self, users: np.ndarray, count: int, *place: int) -> np.ndarray:
        blocks = np.arange(-(-count // 4))
        words = self._words(np.arange(len(users))[:, None], NEGATIVE | blocks, *place)  # 4 x [B, blocks]
        words = np.stack(words, axis=-1).reshape(len(users), 4 * len(blocks))[:, :count]
        neg = below(words, self.num_items).reshape(-1)  # [B * count]
        owner = np.repeat(users, count)
        open_slots = np.flatnonzero(self._interacted(owner, neg))
        for attempt in range(1, self._rounds + 1):
            if not len(open_slots):
                break
            sample, j = np.divmod(open_slots, count)
            draws = np.choose(j & 3, self._words(sample, NEGATIVE | attempt << 16 | j >> 2, *place))
            who = owner[open_slots]
            if attempt == self._rounds:
                neg[open_slots] = self._nth_other(who, below(draws, self.num_items - self._degree[who]))
                break
            neg[open_slots] = below(draws, self.num_items)
            open_slots = open_slots[self._interacted(who, neg[open_slots])]
        return neg.reshape(len(users), count)

    def _interacted(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        key = users * self.num_items + items
        where = np.searchsorted(self._keys, key)
        return self._keys[np.minimum(where, len(self._keys) - 1)] == key

    def _nth_other(self, users: np.ndarray, n: np.ndarray) -> np.ndarray:
        """The `n`-th item (from 0) not in the user's row: `n` plus the number of his items that come before
        it."""
        before = np.searchsorted(self._gap_keys, users * self.num_items + n, side="right") - self._rowptr[users]
        return n + before
