"""VBPR: Visual Bayesian Personalized Ranking (He and McAuley, AAAI 2016), for any number of modalities."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from mmkd.models.baselines.base import Baseline, BaselineConfig, take
from mmkd.models.features import FeatureTable


class VBPRConfig(BaselineConfig):
    """Settings of VBPR."""

    l2: float = Field(0.1, ge=0, description="λ, of the ids, the tastes and the items' content factors")


class VBPR(Baseline):
    """`x_ui = β_i + γ_u . γ_i + sum_m (θ_u^m . E^m f_i^m + β'^m . f_i^m)` (Eq. 4, one content term a modality).

    What depends on the user alone cancels in BPR and in a ranking, so it is left out. The score is written as
    one inner product: users `[γ_u, θ_u, 1]`, items `[γ_i, E f_i, β_i + β' . f_i]`.
    """

    Settings = VBPRConfig
    needs_features = True

    def __init__(self, graph, features, dim, settings, generator=None) -> None:
        super().__init__(graph, features, dim, settings, generator)
        self.embedding = nn.ParameterList(self.dense(table.width, dim) for table in self.features)  # E
        self.taste = nn.ParameterList(self.dense(graph.num_users, dim) for _ in self.features)  # θ
        self.visual_bias = nn.ParameterList(nn.Parameter(torch.zeros(table.width, 1)) for table in self.features)  # β'
        self.bias = nn.Parameter(torch.zeros(graph.num_items, 1))  # β

    def user_rows(self, users):
        return [table.index_select(0, users) for table in self.taste]

    def item_rows(self, items):
        """The content factors are held like the ids: `E` itself is too small a part of the model for its norm to matter."""
        return [self._content(items)]

    def vectors(self, generator=None, nodes=None) -> Tensor:
        users, items = self.sides(nodes)
        ids = take(self.table, nodes)
        tastes = torch.cat([*self.user_rows(users), ids.new_ones(len(users), 1)], 1)
        return torch.cat([ids, torch.cat([tastes, self._content(items)])], 1)

    def _content(self, items: Tensor) -> Tensor:
        """`E f_i` of every modality and the bias `β_i + β' . f_i` of these items, `[n, M d + 1]`."""
        parts = zip(self.features, self.embedding, self.visual_bias, strict=True)
        # E and β' side by side: one product a modality
        both = [self._unit(table, torch.cat([e, beta], 1), items) for table, e, beta in parts]
        bias = self.bias.index_select(0, items) + sum(part[:, -1:] for part in both)
        return torch.cat([*(part[:, :-1] for part in both), bias], 1)

    @staticmethod
    def _unit(table: FeatureTable, weight: Tensor, items: Tensor) -> Tensor:
        """`F W` of these items with rows of mean square length 1: at that of their width they drown the ids."""
        return table.project(weight, items) / table.width**0.5
