"""The most popular items for everybody: what every other model has to beat."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mmkd.data.dataset import Dataset


class Popularity:
    """Scores an item by the number of its train interactions, the same for every user.

    Attributes:
        counts: float32 `[I]`, after :meth:`fit`.
    """

    counts: np.ndarray | None = None

    def fit(self, dataset: Dataset) -> Popularity:
        """Counts the train interactions of each item; validation and test are not read. Returns itself."""
        self.counts = np.bincount(dataset.train.indices, minlength=dataset.num_items).astype(np.float32)
        return self

    @property
    def num_parameters(self) -> int:
        """Numbers stored: one per item."""
        return 0 if self.counts is None else self.counts.size

    def scores(self, users: np.ndarray) -> np.ndarray:
        """Scores of all items for internal user ids `[n]`: float32 `[n, I]`, read-only. RuntimeError before fit."""
        if self.counts is None:
            raise RuntimeError("Popularity.scores: call fit(dataset) first")
        return np.broadcast_to(self.counts, (len(users), self.counts.size))
