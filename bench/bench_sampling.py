"""Users, positives and ten negatives per positive, against NumPy's vectorised rejection in two forms.

`bitmap` looks a pair up in a table of one bit per (user, item): the fastest NumPy can do, at U * I / 8 bytes (94 MB at Netflix
size, 603 MB at Amazon-Book size). `search` is a binary search among the sorted pairs, in the memory of the interactions.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import BATCH, graph

from mmkd.data import Sampler

COUNT = 10


class NumPySampler:
    """Draws everything at once, then draws again what was refused."""

    def __init__(self, train, lookup: str) -> None:
        self.num_users, self.num_items = train.shape
        self.rowptr, self.col = train.indptr.astype(np.int64), train.indices.astype(np.int64)
        self.degree = np.diff(self.rowptr)
        self.active = np.flatnonzero(self.degree)
        self.rng = np.random.Generator(np.random.SFC64(0))
        self.interacted = getattr(self, lookup)
        self.keys = np.repeat(np.arange(self.num_users), self.degree) * self.num_items + self.col
        if lookup == "bitmap":
            self.bits = np.zeros(-(-self.num_users * self.num_items // 8), np.uint8)
            np.bitwise_or.at(self.bits, self.keys >> 3, np.uint8(1) << (self.keys & 7).astype(np.uint8))

    def bitmap(self, keys: np.ndarray) -> np.ndarray:
        return ((self.bits[keys >> 3] >> (keys & 7).astype(np.uint8)) & 1).view(bool)

    def search(self, keys: np.ndarray) -> np.ndarray:
        where = np.searchsorted(self.keys, keys)
        where[where == len(self.keys)] = 0
        return self.keys[where] == keys

    def batch(self, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        users = self.active[self.rng.integers(0, len(self.active), size)]
        pos = self.col[self.rowptr[users] + self.rng.integers(0, self.degree[users])]
        neg = self.rng.integers(0, self.num_items, size * COUNT, dtype=np.int32).astype(np.int64)
        base = np.repeat(users * self.num_items, COUNT)
        refused = np.flatnonzero(self.interacted(base + neg))
        while len(refused):
            neg[refused] = self.rng.integers(0, self.num_items, len(refused))
            refused = refused[self.interacted(base[refused] + neg[refused])]
        return users, pos, neg.reshape(size, COUNT)


def _check(train, users, pos, neg) -> None:
    assert np.asarray(train[users, pos]).all()
    owner = np.repeat(users, neg.shape[1])
    assert not np.asarray(train[owner, neg.ravel()]).any()
    assert abs(neg.mean() / train.shape[1] - 0.5) < 0.05


@pytest.mark.parametrize(
    ("name", "size"), [("netflix", BATCH), ("netflix", 65_536), ("amazon-book", BATCH)], ids=lambda v: str(v)
)
def bench_sampling(compare, name, size):
    train = graph(name).to_scipy()
    sampler = Sampler(train, COUNT, size, num_threads=torch.get_num_threads() if size > BATCH else 1)
    rivals = {f"numpy {lookup}": NumPySampler(train, lookup) for lookup in ("bitmap", "search")}
    batch = sampler.batch(0, 0)
    _check(train, batch.users, batch.pos, batch.neg)
    for rival in rivals.values():
        _check(train, *rival.batch(BATCH))
    steps = iter(range(1_000_000))
    compare(
        "sampling", f"{name} B={size} K={COUNT}", lambda: sampler.batch(0, next(steps)),
        {key: lambda rival=rival: rival.batch(size) for key, rival in rivals.items()},
        targets=dict.fromkeys(rivals, 5), rounds=25 if size == BATCH else 10,
    )  # fmt: skip
