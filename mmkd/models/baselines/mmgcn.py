"""MMGCN: Multi-modal Graph Convolution Network (Wei et al., ACM MM 2019)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mmkd import ops
from mmkd.models.baselines.base import Baseline, BaselineConfig, Nodes, take, unit_rows
from mmkd.models.lightgcn import initial_table


class MMGCNConfig(BaselineConfig):
    """Settings of MMGCN."""

    lr: float = Field(3e-3, gt=0, le=1, description="AdamW learning rate")
    l2: float = Field(0.1, ge=0, description="weight of the L2 term over the batch's own rows of the free tables")
    eval_every: int = Field(3, ge=1, description="epochs between two looks at validation; it overfits early")
    draw: Literal["users", "pairs"] = Field("pairs", description="what a batch draws uniformly")
    layers: int = Field(2, ge=1, le=8, description="graph convolutions of every modality")
    aggregate: Literal["mean", "symmetric", "sum"] = Field(
        "symmetric", description="neighbours' average; D^-1/2 A D^-1/2, which keeps some of the degree; or their sum"
    )


class MMGCN(Baseline):
    """One graph convolution per modality on the user-item graph, tied together by the id embeddings.

    For modality m, with `x_i` the projected feature of an item and `x_u` a free vector of a user:
    `h = LeakyReLU(W1 mean_{j in N(v)} x_j)` (aggregation; by default `Â x` instead of the mean, for without the degrees it ranks below popularity),
    `x̂ = LeakyReLU(W2 x) + id`, `x' = LeakyReLU(W3 h + x̂)` (combination, element-wise form),
    `v* = sum_m x^(L)` (fusion), `y = u* . i*`, BPR.
    """

    Settings = MMGCNConfig
    needs_features = True

    def __init__(self, graph, features, dim, settings, generator=None) -> None:
        super().__init__(graph, features, dim, settings, generator)
        self.project = nn.ParameterList(self.dense(table.width, dim) for table in self.features)
        self.preference = nn.ParameterList(
            nn.Parameter(initial_table(graph.num_users, dim, "xavier", generator)) for _ in self.features
        )
        count = settings.layers * len(self.features)
        self.aggregate, self.transform, self.combine = (
            nn.ParameterList(self.dense(dim, dim) for _ in range(count)) for _ in range(3)
        )  # W1, W2, W3
        self.register_buffer("inverse_degree", graph.degree.clamp(min=1).float().reciprocal(), persistent=False)

    def user_rows(self, users):
        return [table.index_select(0, users) for table in self.preference]

    def _gathered(self, x: Tensor) -> Tensor:
        """The neighbours of every node as one vector, `[N, d]`."""
        if self.settings.aggregate == "symmetric":
            return self.adjacency(x)
        scale = self.inverse_degree if self.settings.aggregate == "mean" else None
        return ops.spmm(self.graph.rowptr, self.graph.col, x, row_scale=scale)

    def vectors(self, generator=None, nodes=None) -> Tensor:
        total = 0.0
        for m, (table, weight, preference) in enumerate(zip(self.features, self.project, self.preference, strict=True)):
            content = unit_rows(table.project(weight))
            x = torch.cat([unit_rows(preference), content])  # [N, d]
            for layer in range(1, self.settings.layers + 1):
                x = self._layer(
                    x, m * self.settings.layers + layer - 1, nodes if layer == self.settings.layers else None
                )
            total = total + x
        return total

    def _layer(self, x: Tensor, index: int, nodes: Nodes | None) -> Tensor:
        """The next layer's vectors of `nodes` (of all where None) from this one's `[N, d]`."""
        gathered, x, ids = take(self._gathered(x), nodes), take(x, nodes), take(self.table, nodes)
        hidden = nn.functional.leaky_relu(gathered @ self.aggregate[index])
        own = nn.functional.leaky_relu(x @ self.transform[index]) + ids
        return nn.functional.leaky_relu(hidden @ self.combine[index] + own)
