"""NGCF: Neural Graph Collaborative Filtering (Wang et al., SIGIR 2019)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from mmkd.models.baselines.base import Baseline, BaselineConfig, dropout, take, unit_rows


class NGCFConfig(BaselineConfig):
    """Settings of NGCF."""

    layers: int = Field(3, ge=1, le=8, description="embedding propagation layers")
    dropout: float = Field(0.1, ge=0, le=0.99, description="message dropout")


class NGCF(Baseline):
    """Embedding propagation with feature transformation and affinity, layers side by side.

    `E^l = LeakyReLU((L + I) E^(l-1) W1^l + (L E^(l-1)) ⊙ E^(l-1) W2^l)` (Eq. 7, 8 with `L = Â`),
    `e* = e^0 || ... || e^L` (Eq. 9), `y = e_u* . e_i*` (Eq. 10), BPR (Eq. 11).
    """

    Settings = NGCFConfig

    def __init__(self, graph, features, dim, settings, generator=None) -> None:
        super().__init__(graph, features, dim, settings, generator)
        self.own = nn.ParameterList(self.dense(dim, dim) for _ in range(settings.layers))  # W1
        self.affinity = nn.ParameterList(self.dense(dim, dim) for _ in range(settings.layers))  # W2

    def vectors(self, generator=None, nodes=None) -> Tensor:
        x, layers = self.table, [take(self.table, nodes)]
        for layer, (own, affinity) in enumerate(zip(self.own, self.affinity, strict=True), start=1):
            neighbours = self.adjacency(x)  # [N, d]
            last = layer == self.settings.layers
            if last:
                neighbours, x = take(neighbours, nodes), take(x, nodes)
            message = (neighbours + x) @ own + (neighbours * x) @ affinity
            x = dropout(nn.functional.leaky_relu(message, 0.2), self.settings.dropout, generator)
            kept = x if last else take(x, nodes)
            layers.append(unit_rows(kept))  # the authors' code does; Eq. 9 is silent
        return torch.cat(layers, dim=1)
