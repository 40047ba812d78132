"""LATTICE: Latent Structure Mining for Multimedia Recommendation (Zhang et al., ACM MM 2021)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from mmkd import ops
from mmkd.models.baselines.base import Baseline, BaselineConfig, rows_of, unit_rows


class LATTICEConfig(BaselineConfig):
    """Settings of LATTICE."""

    layers: int = Field(3, ge=0, le=8, description="LightGCN layers on the user-item graph")
    item_layers: int = Field(1, ge=1, le=4, description="graph convolutions on the item-item graph")
    neighbors: int = Field(10, ge=1, le=1000, description="k of the kNN item-item graphs")
    initial_share: float = Field(0.9, ge=0, le=1, description="λ, share of the raw-feature graph in the mixture")


class LATTICE(Baseline):
    """Item-item graphs mined from every modality, mixed, and added to a collaborative filter.

    `S_ij^m = cos(x_i, x_j)`, k largest per row kept, `Ŝ = D^-1/2 S D^-1/2` (initial graphs); the same on projected
    features `x W + b` gives the learned graph; `A^m = λ Ŝ^m + (1 - λ) Â^m` (skip connection), `A = sum_m softmax(α)_m A^m`
    (aggregation); `h^l = A h^(l-1)` from the item ids; `x̂_i = x_i + h_i / ||h_i||` with `x_i` from LightGCN,
    `y = x̂_u . x̂_i`, BPR. Which neighbours the learned graphs keep is chosen anew every epoch; their weights
    are learned in every step.
    """

    Settings = LATTICEConfig
    needs_features = True

    def __init__(self, graph, features, dim, settings, generator=None) -> None:
        super().__init__(graph, features, dim, settings, generator)
        self.project = nn.ParameterList(self.dense(table.width, dim) for table in self.features)
        self.offset = nn.ParameterList(nn.Parameter(torch.zeros(dim)) for _ in self.features)
        self.importance = nn.Parameter(torch.full((len(self.features),), 1.0 / len(self.features)))
        self.initial = [self._similar(unit_rows(table.prepared())) for table in self.features]
        self.learned: list[Tensor] = []

    def _similar(self, unit: Tensor) -> tuple[Tensor, Tensor]:
        """Ids `[I, k]` of the items most similar by cosine (an item is its own neighbour) and normalised weights."""
        with torch.no_grad():
            ids = ops.topk(unit, unit, min(self.settings.neighbors, unit.shape[0]))[1]
            return ids, self._weights(unit, ids)

    def _weights(self, unit: Tensor, ids: Tensor) -> Tensor:
        """`D^-1/2 S D^-1/2` on the kept entries, `[I, k]`; negative similarities count as 0."""
        every = torch.arange(unit.shape[0], device=unit.device)
        scores = ops.list_scores(unit, unit, every, ids).clamp(min=0)
        scale = scores.sum(1).clamp(min=1e-7).rsqrt()
        return scale[:, None] * scores * scale[ids]

    def begin_epoch(self, epoch: int) -> None:
        with torch.no_grad():
            self.learned = [self._similar(unit)[0] for unit in self._projected()]

    def epoch_tensors(self) -> dict[str, Tensor]:
        return {f"learned.{m}": ids for m, ids in enumerate(self.learned)}

    def resume_epoch(self, tensors) -> None:
        learned = [tensors.get(f"learned.{m}") for m in range(len(self.features))]
        for ids, (like, _) in zip(learned, self.initial, strict=True):
            fits = ids is not None and (ids.shape, ids.dtype) == (like.shape, like.dtype)
            if not fits or not 0 <= int(ids.min()) <= int(ids.max()) < self.graph.num_items:
                raise ValueError(f"expected the neighbours of {self.graph.num_items} items in every modality")
        self.learned = learned

    def tables(self) -> tuple[Tensor, Tensor]:
        """Ranked with the neighbours of the weights as they are, not of the epoch's beginning, so that weights alone tell."""
        before = self.learned
        self.begin_epoch(0)
        tables = super().tables()
        self.learned = before
        return tables

    def _projected(self) -> list[Tensor]:
        parts = zip(self.features, self.project, self.offset, strict=True)
        return [unit_rows(table.project(w) + b) for table, w, b in parts]

    def _convolve(self, x: Tensor, items: Tensor | None) -> Tensor:
        """`A x` at `items` (all where None) for `[I, d]`, modality by modality; the mixture itself is never built."""
        if not self.learned:
            self.begin_epoch(0)
        total, share = 0.0, self.settings.initial_share
        units = self._projected()
        for m, weight in enumerate(self.importance.softmax(0).unbind()):
            learned = self._weights(units[m], self.learned[m])
            graphs = (*self.initial[m], self.learned[m], learned)
            ids, fixed, own_ids, moving = (t if items is None else t.index_select(0, items) for t in graphs)
            mixed = share * _gather(ids, fixed, x) + (1 - share) * _gather(own_ids, moving, x)
            total = total + weight * mixed
        return total

    def vectors(self, generator=None, nodes=None) -> Tensor:
        own = ops.propagate(self.graph, self.table, self.settings.layers, rows=rows_of(nodes))
        users, items = self.sides(nodes)
        hidden = self.split(self.table)[1]
        for layer in range(1, self.settings.item_layers + 1):
            last = nodes is not None and layer == self.settings.item_layers
            hidden = self._convolve(hidden, items if last else None)
        return torch.cat([own[: len(users)], own[len(users) :] + unit_rows(hidden)])


def _gather(ids: Tensor, values: Tensor, x: Tensor) -> Tensor:
    """`out_i = sum_k values_ik x_{ids_ik}`: a sparse product with the same number of entries in every row."""
    rowptr = torch.arange(0, ids.numel() + 1, ids.shape[1], device=x.device)
    return ops.spmm(rowptr, ids.flatten(), x, values.flatten())
