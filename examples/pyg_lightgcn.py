"""PyTorch Geometric's `LGConv` and `LightGCN` with mmkd's kernels inside. Needs: pip install torch_geometric

python examples/pyg_lightgcn.py        both at Netflix size: outputs and gradients compared, times of both
"""

from __future__ import annotations

import torch
from common import NETFLIX, edge_index, in_turn, random_graph, report
from torch import Tensor
from torch_geometric.nn import LGConv
from torch_geometric.nn.models import LightGCN

from mmkd import BipartiteGraph, ops


class FusedLGConv(torch.nn.Module):
    """`LGConv()(x, edge_index)`, `D^-1/2 A D^-1/2 x`, for one graph."""

    def __init__(self, graph: BipartiteGraph) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, x: Tensor, edge_index: Tensor | None = None) -> Tensor:
        g = self.graph  # the pattern is symmetric: it is its own transpose
        return ops.spmm(g.rowptr, g.col, x, row_scale=g.scale, col_scale=g.scale, transpose=(g.rowptr, g.col))


class FusedLightGCN(LightGCN):
    """PyG's `LightGCN` (`recommend`, `recommendation_loss`, ... are its own) with all layers in one call."""

    def __init__(self, graph: BipartiteGraph, embedding_dim: int, num_layers: int) -> None:
        super().__init__(graph.num_nodes, embedding_dim, num_layers)
        self.graph = graph

    def get_embedding(self, edge_index: Tensor | None = None, edge_weight: Tensor | None = None) -> Tensor:
        if edge_weight is not None:
            raise ValueError("edge_weight: FusedLightGCN is for the unweighted graph; use LightGCN")
        return ops.propagate(self.graph, self.embedding.weight, self.num_layers)


def main(
    users: int, items: int, interactions: int, dim: int = 64, layers: int = 3, rounds: int = 5
) -> dict[str, float]:
    """Largest differences of output and gradient, and seconds of forward + backward of both."""
    torch.manual_seed(0)
    graph = random_graph(users, items, interactions)
    edges = edge_index(graph)
    theirs, ours = LightGCN(graph.num_nodes, dim, layers), FusedLightGCN(graph, dim, layers)
    ours.load_state_dict(theirs.state_dict())
    weight = torch.randn(graph.num_nodes, dim)

    def step(model: LightGCN) -> Tensor:
        model.zero_grad()
        out = model.get_embedding(edges)
        (out * weight).sum().backward()
        return out.detach()

    result = {
        "output": float((step(theirs) - step(ours)).abs().max()),
        "gradient": float((theirs.embedding.weight.grad - ours.embedding.weight.grad).abs().max()),
        "conv": float((LGConv()(weight, edges) - FusedLGConv(graph)(weight)).abs().max()),
    }
    result["theirs"], result["ours"] = in_turn(lambda: step(theirs), lambda: step(ours), rounds)
    report(f"LightGCN, {layers} layers, forward + backward", "PyG", result["theirs"], result["ours"], result["output"])
    return result


if __name__ == "__main__":
    main(*NETFLIX)
