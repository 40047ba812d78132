"""Item-based nearest neighbours on the interactions: cosine with shrinkage (Sarwar et al. 2001), users weighted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

from mmkd.evaluation.evaluator import evaluate_scores, rank_scores

if TYPE_CHECKING:
    from mmkd.data.dataset import Dataset

# What is tried on validation, stage by stage, all combinations within one: 18 trials.
GRID: tuple[dict[str, tuple], ...] = (
    {"user_weight": (0.0, 0.5, 1.0)},
    {"item_power": (0.0, 0.25, 0.5), "shrink": (0.0, 2.0, 10.0, 50.0)},
    {"neighbors": (20, 50, 100, 200, 400)},
)
ENTRIES_PER_BLOCK = 1 << 22  # similarities held dense at a time


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

    def fit(self, dataset: Dataset) -> ItemKNN:
        """Builds the neighbourhoods from train, choosing open settings on validation. Returns itself."""
        self._train = sp.csr_matrix(dataset.train, dtype=np.float32)
        self.trials, self.similarity = {}, None
        self.settings = KNNSettings(**self._given)
        for stage in GRID if dataset.val is not None and dataset.val.nnz else ():
            self._choose(dataset, {name: values for name, values in stage.items() if name not in self._given})
        self.similarity = _as_matrix(*_neighbors(self._train, self.settings), self.settings.neighbors)
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
                most, lists = option, _neighbors(self._train, option)
            self.similarity = _as_matrix(*lists, option.neighbors)
            self.trials[option] = evaluate_scores(self.scores, dataset, "val", (cutoff,))[self.metric]

    @property
    def num_parameters(self) -> int:
        """Numbers stored: the similarities kept."""
        return 0 if self.similarity is None else self.similarity.nnz

    def scores(self, users: np.ndarray) -> np.ndarray:
        """Scores of all items for internal user ids `[n]`: float32 `[n, I]`. RuntimeError before fit."""
        if self.similarity is None:
            raise RuntimeError("ItemKNN.scores: call fit(dataset) first")
        return (self._train[users] @ self.similarity).toarray()


def _neighbors(train: sp.csr_matrix, settings: KNNSettings) -> tuple[np.ndarray, np.ndarray]:
    """The most similar items of each item, best first: ids int64 `[I, k]`, similarities float32 `[I, k]`, 0 = no more."""
    neighbors, shrink, user_weight, item_power = astuple(settings)
    num_items = train.shape[1]
    k = min(neighbors, num_items)
    popularity = np.maximum(np.bincount(train.indices, minlength=num_items), 1).astype(np.float64)
    weight = np.maximum(np.diff(train.indptr), 1).astype(np.float64) ** -user_weight
    columns = train.T.tocsr().astype(np.float64)
    weighted = sp.diags_array(weight).tocsr() @ train.astype(np.float64)
    ids = np.empty((num_items, k), dtype=np.int64)
    values = np.empty((num_items, k), dtype=np.float32)
    for block in _blocks(num_items):
        shared = columns[block] @ weighted  # row j, column i: Σ d_u^-user_weight over the users of both
        target, other = np.repeat(block, np.diff(shared.indptr)), shared.indices
        value = shared.data / (np.sqrt(popularity[other]) * popularity[target] ** item_power + shrink)
        value[other == target] = 0.0
        dense = np.zeros(shared.shape, dtype=np.float32)
        dense[target - block[0], other] = value
        ids[block] = rank_scores(dense, k)
        values[block] = np.take_along_axis(dense, ids[block], axis=1)
    return ids, values


def _blocks(num_items: int) -> Iterator[np.ndarray]:
    size = max(1, ENTRIES_PER_BLOCK // num_items)
    for start in range(0, num_items, size):
        yield np.arange(start, min(start + size, num_items))


def _as_matrix(ids: np.ndarray, values: np.ndarray, k: int) -> sp.csr_matrix:
    """The first k neighbours of each item j as column j of a sparse `I x I` matrix."""
    ids, values = ids[:, :k], values[:, :k]
    kept = values > 0
    shape = (ids.shape[0], ids.shape[0])
    return sp.csr_matrix((values[kept], (ids[kept], np.nonzero(kept)[0])), shape=shape)
