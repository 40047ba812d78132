"""Students other than LightGCN (paper, Table 8): a GCN with layer weights, and an MLP that never sees the graph."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmkd.graph import BipartiteGraph
from mmkd.models.lightgcn import LightGCN


class GCNStudent(LightGCN):
    """`E^(l+1) = LeakyReLU(Â E^l W^l)` (one `W` for users, one for items), the mean over layers as in LightGCN.

    Shape: as :class:`LightGCN`.
    """

    def __init__(self, graph: BipartiteGraph, table: Tensor, layers: int, compute: torch.dtype | None = None) -> None:
        super().__init__(graph, table, layers, compute)
        start = torch.eye(table.shape[1], dtype=table.dtype)  # the start is a LightGCN, but for the nonlinearity
        self.user_weight = nn.ParameterList(nn.Parameter(start.clone()) for _ in range(layers))
        self.item_weight = nn.ParameterList(nn.Parameter(start.clone()) for _ in range(layers))

    def hold_gradient(self) -> None:
        """None: the table is not only propagated."""
        return None

    def forward(self, rows: Tensor | None = None) -> Tensor:
        users, items = self.table.split([self.graph.num_users, self.graph.num_items])
        total_users, total_items = users, items
        for of_users, of_items in zip(self.user_weight, self.item_weight, strict=True):
            messages = self.graph.users_from_items(items @ of_items), self.graph.items_from_users(users @ of_users)
            users, items = (nn.functional.leaky_relu(x) for x in messages)
            total_users, total_items = total_users + users, total_items + items
        nodes = torch.cat([total_users, total_items]) / (self.layers + 1)
        return nodes if rows is None else nodes.index_select(0, rows)


class MLPStudent(LightGCN):
    """`e + W2 LeakyReLU(... W1 e)` of a node's own vector: inference needs no graph.

    Shape: as :class:`LightGCN`.
    """

    def __init__(self, graph: BipartiteGraph, table: Tensor, layers: int, compute: torch.dtype | None = None) -> None:
        super().__init__(graph, table, layers, compute)
        dim, generator = table.shape[1], torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList(
            nn.init.xavier_uniform_(torch.empty(dim, dim, dtype=table.dtype), gain=0.5, generator=generator)
            for _ in range(layers)
        )

    def hold_gradient(self) -> None:
        """None: the table is not only propagated."""
        return None

    def forward(self, rows: Tensor | None = None) -> Tensor:
        start = self.table if rows is None else self.table.index_select(0, rows)
        x = start
        for index, weight in enumerate(self.weights):
            x = x @ weight if index == len(self.weights) - 1 else nn.functional.leaky_relu(x @ weight)
        return start + x if self.weights else start


ENCODERS = {"lightgcn": LightGCN, "gcn": GCNStudent, "mlp": MLPStudent}
