"""What each modality counts for in `E^T`: `omega_m`, read off validation while the teacher trains, and its neighbour graph."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from mmkd.data import Dataset
from mmkd.evaluation import evaluate, evaluate_scores
from mmkd.models.baselines.popularity import Popularity
from mmkd.models.neighbors import NeighborGraph
from mmkd.models.teacher import Teacher


class Gate:
    """Sets `omega_m = omega min(1, r_m / max(r_id, r_pop))^power` in a teacher, and 0 where `r_m <= r_pop`.

    `r_m`, `r_id` and `r_pop` are what the modality's head `F_u^m . F_i^m`, the id part `propagate(id)` and popularity reach
    alone on validation. A head that ranks as well as the ids counts in full; one that does not beat popularity, not at
    all: of one length with the others, its `rownorm(F^m)` would bury what the ids know. The paper has one weight for all.

    Args:
        teacher: whose `omega` is set. dataset: with a validation part.
        metric: e.g. `"recall@20"`. weight: `omega`, of a modality that counts in full. power: at 0 all do.
    """

    def __init__(self, teacher: Teacher, dataset: Dataset, metric: str, weight: float, power: float) -> None:
        self.teacher, self.dataset, self.weight, self.power = teacher, dataset, weight, power
        self.metric, self.ks = metric, (int(metric.partition("@")[2]),)
        self.floor = _popularity(dataset, metric)

    def __call__(self) -> None:
        """Reads the parts' metrics and sets `omega`; to be called before the teacher is looked at."""
        with torch.no_grad():
            out = self.teacher()
            reference = max(self._metric(*self.teacher.split(out.ids)), self.floor)
            heads = [self._metric(users, items) for users, items in zip(out.users, out.items, strict=True)]
            shares = [min(1.0, head / reference) if head > self.floor else 0.0 for head in heads]
            self.teacher.omega.copy_(torch.tensor(shares) ** self.power * self.weight)

    def _metric(self, users: Tensor, items: Tensor) -> float:
        return evaluate(users, items, self.dataset, "val", self.ks)[self.metric]


def knows_taste(graph: NeighborGraph, dataset: Dataset, metric: str) -> bool:
    """Whether ranking by `R Ŝ^m`, the neighbours of what a user has, beats popularity on validation.

    Args:
        graph: on any device. dataset: with a validation part. metric: e.g. `"recall@20"`.
    """
    rowptr, col, scale = (t.cpu().numpy() for t in (graph.rowptr, graph.col, graph.scale))
    pattern = sp.csr_matrix((np.ones(len(col), np.float32), col, rowptr), shape=(len(scale), len(scale)))
    similarity = sp.csr_matrix(sp.diags(scale) @ pattern @ sp.diags(scale), dtype=np.float32)

    def scores(users: np.ndarray) -> np.ndarray:
        return (dataset.train[users].astype(np.float32) @ similarity).toarray()

    cutoff = (int(metric.partition("@")[2]),)
    return evaluate_scores(scores, dataset, "val", cutoff)[metric] > _popularity(dataset, metric)


def _popularity(dataset: Dataset, metric: str) -> float:
    cutoff = (int(metric.partition("@")[2]),)
    return evaluate_scores(Popularity().fit(dataset).scores, dataset, "val", cutoff)[metric]
