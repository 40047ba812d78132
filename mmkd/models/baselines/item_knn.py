"""Item-based nearest neighbours on the interactions: cosine with shrinkage (Sarwar et al. 2001), users weighted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import scipy.sparse as sp

from mmkd.evaluation.evaluator import evaluate_scores

if TYPE_CHECKING:
    from mmkd.data.dataset import Dataset

# What is tried on validation, stage by stage, all combinations within one: 18 trials.
GRID: tuple[dict[str, tuple], ...] = (
    {"user_weight": (0.0, 0.5, 1.0)},
    {"item_power": (0.0, 0.25, 0.5), "shrink": (0.0, 2.0, 10.0, 50.0)},
    {"neighbors": (20, 50, 100, 200, 400)},
)
ENTRIES_PER_BLOCK = 1 << 22  # similarities worked on at a time, if all pairs of items had one
ENTRIES_KEPT = 1 << 23  # shared users of pairs of items that are kept from one setting to the next


@dataclass(frozen=True)
class KNNSettings:
    """Settings of :class:`ItemKNN`; the defaults are the start of the search, and used where there is no validation."""

    neighbors: int = 200
    shrink: float = 10.0
    user_weight: float = 0.5
    item_power: float = 0.25


class ItemKNN:
    """Scores an item by its similarity to the items of the user's train set.

    With `U_i` the users of item i in train and `d_u` the number of train items of user u::

        s_ij = Σ_{u in U_i ∩ U_j} d_u^-user_weight / (|U_i|^(1/2) |U_j|^item_power + shrink)
        score(u, j) = Σ_{i in train(u) ∩ N(j)} s_ij

    and `N(j)` the `neighbors` items most similar to j (ties: lower id), j itself left out. `user_weight=0, item_power=1/2`
    is the plain cosine with shrinkage. The weight keeps users with very many items from deciding everything, a smaller
    power leaves popular items ahead: without both, the model falls behind popularity on sparse data.

    Settings left at None are chosen on the validation part by `metric`, stage by stage through `GRID`, the first best kept;
    without a validation part they are the defaults of :class:`KNNSettings`. The test part is never read.

    Args:
        neighbors: at least 1. shrink: at least 0. user_weight, item_power: 0 to 2. Each may be None.
        metric: what the choice looks at, e.g. `recall@20`.

    Attributes:
        settings: in use after :meth:`fit`.
        trials: `{settings: metric on validation}`; empty when nothing had to be chosen.
        similarity: sparse `I x I`, float32; column j holds `s_ij` of the neighbours of j.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self, neighbors: int | None = None, shrink: float | None = None, user_weight: float | None = None,
        item_power: float | None = None, *, metric: str = "recall@20",
    ) -> None:  # fmt: skip
        given = {"neighbors": neighbors, "shrink": shrink, "user_weight": user_weight, "item_power": item_power}
        bounds = {"neighbors": (1, 2**31), "shrink": (0, 1e9), "user_weight": (0, 2), "item_power": (0, 2)}
        for name, value in given.items():
            low, high = bounds[name]
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name}: expected {low} to {high}, or None to choose it on validation, got {value}")
        self._given = {name: value for name, value in given.items() if value is not None}
        self.metric = metric
        self.settings: KNNSettings | None = None
        self.trials: dict[KNNSettings, float] = {}
        self.similarity: sp.csr_matrix | None = None
        self._train: sp.csr_matrix | None = None
        self._shared: _SharedUsers | None = None

    def fit(self, dataset: Dataset) -> ItemKNN:
        """Builds the neighbourhoods from train, choosing open settings on validation. Returns itself."""
        self._train = sp.csr_matrix(dataset.train, dtype=np.float32)
        self.trials, self.similarity, self._shared = {}, None, None
        self.settings = KNNSettings(**self._given)
        for stage in GRID if dataset.val is not None and dataset.val.nnz else ():
            self._choose(dataset, {name: values for name, values in stage.items() if name not in self._given})
        self.similarity = self._neighbors(self.settings).matrix(self.settings.neighbors)
        self._shared = None
        return self

    def _choose(self, dataset: Dataset, stage: dict[str, tuple]) -> None:
        if stage:
            chosen = (dict(zip(stage, values, strict=True)) for values in product(*stage.values()))
            options = [replace(self.settings, **values) for values in chosen]
            self._try(dataset, options)
            self.settings = max(options, key=self.trials.__getitem__)

    def _try(self, dataset: Dataset, options: list[KNNSettings]) -> None:
        cutoff = int(self.metric.partition("@")[2])
        most: KNNSettings | None = None
        for option in sorted((o for o in options if o not in self.trials), key=lambda o: -o.neighbors):
            # fewer neighbours of the same similarity are the first ones of a longer list
            if most is None or replace(option, neighbors=most.neighbors) != most:
                most, lists = option, self._neighbors(option)
            self.similarity = lists.matrix(option.neighbors)
            self.trials[option] = evaluate_scores(self.scores, dataset, "val", (cutoff,))[self.metric]

    def _neighbors(self, settings: KNNSettings) -> _Neighbors:
        if self._shared is None or self._shared.user_weight != settings.user_weight:
            self._shared = _SharedUsers(self._train, settings.user_weight)
        return _neighbors(self._shared, settings)

    @property
    def num_parameters(self) -> int:
        """Numbers stored: the similarities kept."""
        return 0 if self.similarity is None else self.similarity.nnz

    def scores(self, users: np.ndarray) -> np.ndarray:
        """Scores of all items for internal user ids `[n]`: float32 `[n, I]`. RuntimeError before fit."""
        if self.similarity is None:
            raise RuntimeError("ItemKNN.scores: call fit(dataset) first")
        return (self._train[users] @ self.similarity).toarray()


class _Pairs(NamedTuple):
    """Pairs of different items with a user in common: those of a block of items, item by item.

    Attributes:
        block: the items. item, other: places in `block`, and the other item's id. weight: Σ d_u^-user_weight over the users of
            both. key: uint64, the item's place, 32 bits of zeros, the other's id.
    """

    block: np.ndarray
    item: np.ndarray
    other: np.ndarray
    weight: np.ndarray
    key: np.ndarray


class _SharedUsers:
    """An iterator of :class:`_Pairs`, which are kept for the next round while they are few."""

    def __init__(self, train: sp.csr_matrix, user_weight: float) -> None:
        self.user_weight, self.num_items = user_weight, train.shape[1]
        self.id_bits = np.uint64(self.num_items.bit_length())
        self.popularity = np.maximum(np.bincount(train.indices, minlength=self.num_items), 1).astype(np.float64)
        weight = np.maximum(np.diff(train.indptr), 1).astype(np.float64) ** -user_weight
        self._columns = train.T.tocsr().astype(np.float64)
        self._weighted = sp.diags_array(weight).tocsr() @ train.astype(np.float64)
        self._kept: list[_Pairs] | None = None

    def __iter__(self) -> Iterator[_Pairs]:
        if self._kept is not None:
            yield from self._kept
            return
        size, made, entries = max(1, ENTRIES_PER_BLOCK // max(1, self.num_items)), [], 0
        for start in range(0, self.num_items, size):
            pairs = self._pairs(np.arange(start, min(start + size, self.num_items)))
            entries += len(pairs.key)
            made = [*made, pairs] if entries <= ENTRIES_KEPT else []
            yield pairs
        self._kept = made if entries <= ENTRIES_KEPT else None

    def _pairs(self, block: np.ndarray) -> _Pairs:
        shared = self._columns[block] @ self._weighted
        item = np.repeat(np.arange(len(block), dtype=np.int32), np.diff(shared.indptr))
        kept = shared.indices != block[0] + item
        item, other = item[kept], shared.indices[kept]
        key = item.astype(np.uint64) << self.id_bits + np.uint64(32) | other.astype(np.uint64)
        return _Pairs(block, item, other, shared.data[kept], key)


class _Neighbors(NamedTuple):
    """The items most similar to each: flat arrays of the item, ascending, its neighbour, the most similar first, and their
    similarity (int32, int32, float32)."""

    item: np.ndarray
    neighbor: np.ndarray
    value: np.ndarray
    num_items: int

    def matrix(self, k: int) -> sp.csr_matrix:
        """The first k neighbours of each item j as column j of a sparse `I x I` matrix."""
        count = np.bincount(self.item, minlength=self.num_items)
        place = np.arange(len(self.item)) - np.repeat(np.cumsum(count) - count, count)
        kept = (place < k) & (self.value > 0)
        at = self.neighbor[kept], self.item[kept]
        return sp.csr_matrix((self.value[kept], at), shape=(self.num_items, self.num_items))


def _neighbors(shared: _SharedUsers, settings: KNNSettings) -> _Neighbors:
    """The `settings.neighbors` most similar items of each item, equal ones by ascending id."""
    bits, found = shared.id_bits, []
    root, power = np.sqrt(shared.popularity), shared.popularity**settings.item_power
    for block, item, other, weight, key in shared:
        below = root[other]
        below *= power[block][item]
        below += settings.shrink
        value = np.divide(weight, below, out=below).astype(np.float32)
        # Item, similarity from the largest down, neighbour in one number, for numbers alone are sorted fastest. The bits of
        # positive floats are in their order; places and ids together are below 2^32.
        key = np.sort(key | (~value.view(np.uint32)).astype(np.uint64) << bits)
        starts = np.searchsorted(key, np.arange(len(block) + 1, dtype=np.uint64) << bits + np.uint64(32))
        count = np.minimum(np.diff(starts), settings.neighbors)
        place = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        key = key[np.repeat(starts[:-1], count) + place]
        value = (~(key >> bits).astype(np.uint32)).view(np.float32)
        neighbor = (key & (np.uint64(1) << bits) - np.uint64(1)).astype(np.int32)
        found.append((np.repeat(block.astype(np.int32), count), neighbor, value))
    empty = [np.empty(0, kind) for kind in (np.int32, np.int32, np.float32)]
    return _Neighbors(*(np.concatenate(parts) for parts in zip(empty, *found, strict=True)), shared.num_items)
