"""VBPR: Visual Bayesian Personalized Ranking (He and McAuley, AAAI 2016), for any number of modalities."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from mmkd.models.baselines.base import Baseline, BaselineConfig
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

    def user_tables(self):
        return self.taste

    def item_tables(self):
        """The content factors are held like the ids: `E` itself is too small a part of the model for its norm to matter."""
        content, bias = self._content()
        return *content, bias

    def encode(self, generator=None) -> tuple[Tensor, Tensor]:
        users, items = self.split(self.table)
        content, bias = self._content()
        ones = users.new_ones(users.shape[0], 1)
        return torch.cat([users, *self.taste, ones], 1), torch.cat([items, *content, bias], 1)

    def _content(self) -> tuple[list[Tensor], Tensor]:
        """`E f_i` of every modality, `[I, d]`, and the bias `β_i + β' . f_i`, `[I, 1]`."""
        content = [self._unit(table, weight) for table, weight in zip(self.features, self.embedding, strict=True)]
        return content, self.bias + sum(self._unit(t, w) for t, w in zip(self.features, self.visual_bias, strict=True))

    @staticmethod
    def _unit(table: FeatureTable, weight: Tensor) -> Tensor:
        """`F W` with rows of mean square length 1: at that of their width they drown the ids."""
        return table.project(weight) / table.width**0.5
