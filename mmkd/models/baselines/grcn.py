"""GRCN: Graph-Refined Convolutional Network (Wei et al., ACM MM 2020)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from mmkd import ops
from mmkd.models.baselines.base import Baseline, BaselineConfig, take, unit_rows
from mmkd.models.lightgcn import initial_table


class GRCNConfig(BaselineConfig):
    """Settings of GRCN."""

    layers: int = Field(2, ge=1, le=8, description="graph convolutions on the refined graph")
    routings: int = Field(1, ge=1, le=8, description="iterations of the neighbour routing")


class GRCN(Baseline):
    """Edges whose items look unlike the user's prototype are faded before the id embeddings are propagated.

    Prototypes by neighbour routing, per modality: `v_i = LeakyReLU(W X_i)`, and for a few rounds
    `α_ui = softmax_{i in N(u)}(p_u . v_i)`, `p_u <- norm(p_u + sum_i α_ui v_i)`.
    Soft pruning: `s^m_ui = softmax_{N(.)}(p_u . v_i)` in both directions, confidence of the modality
    `c_v^m` (free), `s_e = max_m ReLU(c_v^m s^m_e)`.
    Propagation: `e^(l) = sum_j s_vj e_j^(l-1)`, layers summed, then ids and content side by side, BPR.
    """

    Settings = GRCNConfig
    needs_features = True

    def __init__(self, graph, features, dim, settings, generator=None) -> None:
        super().__init__(graph, features, dim, settings, generator)
        self.project = nn.ParameterList(self.dense(table.width, dim) for table in self.features)
        self.prototype = nn.ParameterList(
            nn.Parameter(initial_table(graph.num_users, dim, "xavier", generator)) for _ in self.features
        )
        self.confidence = nn.Parameter(torch.ones(graph.num_nodes, len(self.features)))
        self.register_buffer("ones", torch.ones(graph.num_nodes, 1, device=graph.device), persistent=False)

    def _affinity(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """`exp(x_v . x_j)` of every stored edge, `[2E]`, and their sum over the neighbours of v, `[N, 1]`.

        Their ratio is the softmax over the neighbours; rows of `nodes` have length 1, so nothing overflows.
        """
        g = self.graph
        weight = ops.sddmm(g.rowptr, g.col, nodes, nodes).exp()
        return weight, ops.spmm(g.rowptr, g.col, self.ones, weight).clamp(min=1e-30)  # a node without neighbours: 0

    def _refine(self) -> tuple[Tensor, list[Tensor]]:
        """Edge weights `[2E]` of the refined graph, and every modality's `[p_u; v_i]`, `[N, d]`."""
        weights, contents, g = [], [], self.graph
        for index, (table, project) in enumerate(zip(self.features, self.project, strict=True)):
            items = unit_rows(nn.functional.leaky_relu(table.project(project)))
            users = unit_rows(self.prototype[index])
            for _ in range(self.settings.routings):
                nodes = torch.cat([users, items])
                weight, total = self._affinity(nodes)
                gathered = ops.spmm(g.rowptr, g.col, nodes, weight) / total
                users = unit_rows(users + gathered[: g.num_users])
            nodes = torch.cat([users, items])
            contents.append(nodes)
            weight, total = self._affinity(nodes)
            confidence = self.confidence[:, index : index + 1] / total  # [N, 1], at the row of every edge:
            weights.append(weight * ops.sddmm(g.rowptr, g.col, confidence, self.ones))
        return torch.stack(weights).max(0).values.relu(), contents

    def user_rows(self, users):
        return [table.index_select(0, users) for table in self.prototype]

    def vectors(self, generator=None, nodes=None) -> Tensor:
        weight, contents = self._refine()
        x = total = self.table
        for _ in range(self.settings.layers):
            x = ops.spmm(self.graph.rowptr, self.graph.col, x, weight)
            total = total + x
        return torch.cat([take(part, nodes) for part in (total, *contents)], dim=1)
