"""Interaction rows to distinct pairs, and their k-core."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = ["Pairs", "k_core", "merge_pairs"]


class Pairs(NamedTuple):
    """Distinct (user, item) pairs, sorted by user, then item. int64; `times` may be None."""

    users: np.ndarray
    items: np.ndarray
    times: np.ndarray | None

    def select(self, keep: np.ndarray) -> Pairs:
        """The pairs where `keep` (a mask or positions) says so."""
        return Pairs(self.users[keep], self.items[keep], None if self.times is None else self.times[keep])


def merge_pairs(users: np.ndarray, items: np.ndarray, times: np.ndarray | None = None, min_count: int = 1) -> Pairs:
    """Merge repeated pairs and keep those that occur at least `min_count` times.

    A pair's time is that of its `min_count`-th occurrence: the moment from which it is known to qualify.
    Nothing later enters, so a split by time does not leak.
    """
    if min_count < 1:
        raise ValueError(f"min_count must be at least 1, got {min_count}")
    users, items = np.asarray(users, np.int64), np.asarray(items, np.int64)
    keys = (users, items) if times is None else (users, items, times)
    order = np.lexsort(keys[::-1])
    sorted_users, sorted_items = users[order], items[order]
    new = np.ones(len(order), bool)
    new[1:] = (sorted_users[1:] != sorted_users[:-1]) | (sorted_items[1:] != sorted_items[:-1])
    start = np.flatnonzero(new)
    count = np.diff(np.append(start, len(order)))
    start = start[count >= min_count]
    known = None if times is None else np.asarray(times)[order[start + min_count - 1]]
    return Pairs(sorted_users[start], sorted_items[start], known)


def k_core(users: np.ndarray, items: np.ndarray, k: int) -> np.ndarray:
    """Mask of the pairs in the k-core: the largest set in which every user and every item has at least `k`
    pairs."""
    keep = np.ones(len(users), bool)
    if k <= 1 or not len(users):
        return keep
    num_users, num_items = int(users.max()) + 1, int(items.max()) + 1
    while True:
        user_degree = np.bincount(users[keep], minlength=num_users)
        item_degree = np.bincount(items[keep], minlength=num_items)
        smaller = keep & (user_degree[users] >= k) & (item_degree[items] >= k)
        if smaller.sum() == keep.sum():
            return keep
        keep = smaller
