"""SLMRec: Self-supervised Learning for Multimedia Recommendation (Tao et al., IEEE TMM 2022)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from mmkd import ops
from mmkd.models.baselines.base import Baseline, BaselineConfig, in_batch_nce
from mmkd.models.lightgcn import initial_table


class SLMRecConfig(BaselineConfig):
    """Settings of SLMRec."""

    layers: int = Field(3, ge=0, le=8, description="LightGCN layers of ids and of every modality")
    temperature: float = Field(0.2, gt=0, description="τ of the main softmax loss")
    ssl_weight: float = Field(0.1, ge=0, description="alpha, weight of the self-supervised task")
    ssl_temperature: float = Field(0.5, gt=0, description="τ of the self-supervised task")


class SLMRec(Baseline):
    """One LightGCN for ids and one per modality, fused; items are contrasted across their modalities (the FAC task).

    Modality encoder: `E^m = propagate([users^m; X^m W^m])`; fusion `z = W [E^id || E^1 || ...]`.
    Fine and coarse feature spaces (FAC): every modality is projected to a fine space, where it is contrasted with the
    others, and all of them to a coarse one, where they are contrasted with the ids (InfoNCE in the batch).
    Main loss: softmax over the batch's items, `-log exp(z_u . z_i / τ) / sum_j exp(z_u . z_j / τ)` on unit vectors;
    `L = L_main + α L_ssl`.
    """

    Settings = SLMRecConfig
    needs_features = True

    def __init__(self, graph, features, dim, settings, generator=None) -> None:
        super().__init__(graph, features, dim, settings, generator)
        count = len(self.features)
        self.project = nn.ParameterList(self.dense(table.width, dim) for table in self.features)
        self.preference = nn.ParameterList(
            nn.Parameter(initial_table(graph.num_users, dim, "xavier", generator)) for _ in self.features
        )
        self.fuse = nn.ParameterList(self.dense((count + 1) * dim, dim) for _ in range(2))  # users, items
        self.fine = nn.ParameterList(self.dense(dim, dim) for _ in range(count))
        self.coarse = nn.ParameterList(self.dense(dim, dim) for _ in range(count + 1))

    def _views(self) -> list[tuple[Tensor, Tensor]]:
        """Users and items of the ids and of every modality."""
        starts = [self.table] + [
            torch.cat([preference, nn.functional.normalize(table.project(weight), dim=1)])
            for preference, table, weight in zip(self.preference, self.features, self.project, strict=True)
        ]
        stacked = ops.propagate(self.graph, torch.cat(starts, dim=1), self.settings.layers)
        return [self.split(view) for view in stacked.chunk(len(starts), dim=1)]

    def _fused(self, views: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        sides = zip(*views, strict=True)
        fused = [torch.cat(side, dim=1) @ weight for side, weight in zip(sides, self.fuse, strict=True)]
        return nn.functional.normalize(fused[0], dim=1), nn.functional.normalize(fused[1], dim=1)

    def user_tables(self):
        return self.preference

    def encode(self, generator=None) -> tuple[Tensor, Tensor]:
        return self._fused(self._views())

    def loss(self, users, candidates, generator) -> dict[str, Tensor]:
        views, observed = self._views(), candidates[:, 0]
        user_emb, item_emb = self._fused(views)
        main = in_batch_nce(user_emb[users], item_emb[observed], self.settings.temperature)
        items = [view[1].index_select(0, observed) for view in views]
        tau = self.settings.ssl_temperature
        fine = [x @ weight for x, weight in zip(items[1:], self.fine, strict=True)]
        coarse = [x @ weight for x, weight in zip(items, self.coarse, strict=True)]
        terms = [in_batch_nce(fine[a], fine[b], tau) for a in range(len(fine)) for b in range(a)]
        terms += [in_batch_nce(coarse[0], x, tau) for x in coarse[1:]]
        return {"main": main, "ssl": self.settings.ssl_weight * torch.stack(terms).mean()}
