"""SLMRec: Self-supervised Learning for Multimedia Recommendation (Tao et al., IEEE TMM 2022)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mmkd import ops
from mmkd.models.baselines.base import Baseline, BaselineConfig, Nodes, in_batch_nce, rows_of, unit_rows


class SLMRecConfig(BaselineConfig):
    """Settings of SLMRec."""

    draw: Literal["users", "pairs"] = Field("pairs", description="what a batch draws uniformly")
    layers: int = Field(3, ge=0, le=8, description="LightGCN layers of ids and of every modality")
    temperature: float = Field(0.2, gt=0, description="τ of the main softmax loss")
    ssl_weight: float = Field(0.01, ge=0, description="alpha, weight of the self-supervised task")
    ssl_temperature: float = Field(0.5, gt=0, description="τ of the self-supervised task")


class SLMRec(Baseline):
    """One LightGCN for ids and one per modality, fused; items are contrasted across their modalities (the FAC task).

    Modality encoder: `E^m = propagate([users; X^m W^m])`, one user table for all; fusion `z = [E^id || E^1 || ...] W + b`.
    Fine and coarse feature spaces (FAC): the id vector goes from space to space, `y_m = y_(m-1) P_m`, and in each of them
    meets one modality, `InfoNCE(y_m, E^m Q_m)` over the batch's items.
    Main loss: softmax over the batch's items, `-log exp(cos(z_u, z_i) / τ) / sum_j exp(cos(z_u, z_j) / τ)`;
    `L = L_main + α L_ssl`, ranked by `z_u . z_i`.
    """

    Settings = SLMRecConfig
    needs_features = True

    def __init__(self, graph, features, dim, settings, generator=None) -> None:
        super().__init__(graph, features, dim, settings, generator)
        count = len(self.features)
        self.project = nn.ParameterList(self.dense(table.width, dim) for table in self.features)
        self.fuse = nn.ParameterList(self.dense((count + 1) * dim, dim) for _ in range(2))  # W: users, items
        self.shift = nn.ParameterList(nn.Parameter(torch.zeros(dim)) for _ in range(2))  # b
        self.onward = nn.ParameterList(self.dense(dim, dim) for _ in range(count))  # P
        self.meet = nn.ParameterList(self.dense(dim, dim) for _ in range(count))  # Q

    def _views(self, nodes: Nodes | None) -> list[Tensor]:
        """The ids' and every modality's vectors of `nodes` (of all where None), `[n, d]` each."""
        users = self.split(self.table)[0]
        content = [unit_rows(table.project(w)) for table, w in zip(self.features, self.project, strict=True)]
        starts = [self.table, *(torch.cat([users, x]) for x in content)]
        stacked = ops.propagate(self.graph, torch.cat(starts, dim=1), self.settings.layers, rows=rows_of(nodes))
        return list(stacked.chunk(len(starts), dim=1))

    def _fused(self, views: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        sides = zip(*views, strict=True)
        parts = zip(sides, self.fuse, self.shift, strict=True)
        users, items = (torch.addmm(b, torch.cat(side, dim=1), w) for side, w, b in parts)
        return users, items

    def vectors(self, generator=None, nodes=None) -> Tensor:
        first = len(self.sides(nodes)[0])
        return torch.cat(self._fused([(view[:first], view[first:]) for view in self._views(nodes)]))

    def loss(self, batch, generator) -> dict[str, Tensor]:
        views = [batch.split(view) for view in self._views(batch)]
        picked = [(own.index_select(0, batch.users), items.index_select(0, batch.pos)) for own, items in views]
        main = in_batch_nce(*self._fused(picked), self.settings.temperature)
        (_, own), *modalities = picked
        ssl = []
        for (_, content), onward, meet in zip(modalities, self.onward, self.meet, strict=True):
            own = own @ onward
            ssl.append(in_batch_nce(own, content @ meet, self.settings.ssl_temperature))
        return {"main": main, "ssl": self.settings.ssl_weight * torch.stack(ssl).sum()}
