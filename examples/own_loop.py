"""A LightGCN loop as LightGCN-PyTorch writes it (COO `torch.sparse.mm`, gathered BPR), and the three lines that change.

python examples/own_loop.py        both at Netflix size: same losses, times of both
"""

from __future__ import annotations

import torch
from common import NETFLIX, in_turn, random_graph, report
from torch import Tensor

from mmkd import BipartiteGraph, ops


def normalised_coo(graph: BipartiteGraph) -> Tensor:
    """`D^-1/2 A D^-1/2` as a coalesced COO tensor."""
    rows = torch.repeat_interleave(torch.arange(graph.num_nodes), graph.degree)
    value = graph.scale[rows] * graph.scale[graph.col.long()]
    return torch.sparse_coo_tensor(torch.stack([rows, graph.col.long()]), value, (graph.num_nodes,) * 2).coalesce()


class Loop:
    """Table, optimizer and a step; `fused` says whose propagation and loss."""

    def __init__(self, graph: BipartiteGraph, dim: int, layers: int, fused: bool) -> None:
        self.graph, self.layers, self.fused = graph, layers, fused
        table = torch.randn(graph.num_nodes, dim, generator=torch.Generator().manual_seed(0)) * 0.1
        self.table = torch.nn.Parameter(table)
        self.optimizer = torch.optim.Adam([self.table], lr=1e-3, fused=True)
        self.adjacency = None if fused else normalised_coo(graph)

    def propagate(self) -> tuple[Tensor, Tensor]:
        if self.fused:
            out = ops.propagate(self.graph, self.table, self.layers)  # <- 1
        else:
            layers = [self.table]
            for _ in range(self.layers):
                layers.append(torch.sparse.mm(self.adjacency, layers[-1]))
            out = torch.stack(layers, dim=1).mean(dim=1)
        return out.split([self.graph.num_users, self.graph.num_items])

    def step(self, users: Tensor, pos: Tensor, neg: Tensor) -> float:
        user_emb, item_emb = self.propagate()
        if self.fused:
            loss = ops.bpr_loss(user_emb, item_emb, users, pos, neg)  # <- 2
        else:
            u, p, n = user_emb[users], item_emb[pos], item_emb[neg]
            loss = torch.nn.functional.softplus((u * n).sum(dim=1) - (u * p).sum(dim=1)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


def batches(graph: BipartiteGraph, size: int, count: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    users = torch.repeat_interleave(torch.arange(graph.num_users), graph.user_rowptr.diff())
    at = torch.randint(0, graph.num_edges, (count, size), generator=generator)
    negatives = torch.randint(0, graph.num_items, (count, size), generator=generator)
    return [(users[a], graph.user_col.long()[a], n) for a, n in zip(at, negatives, strict=True)]


def main(
    users: int, items: int, interactions: int, dim: int = 64, layers: int = 3, batch: int = 2048, steps: int = 5
) -> dict[str, float]:
    """Largest relative difference of the losses, and seconds a step of both."""
    graph = random_graph(users, items, interactions)
    theirs, ours = (Loop(graph, dim, layers, fused) for fused in (False, True))
    losses = torch.tensor([[theirs.step(*b), ours.step(*b)] for b in batches(graph, batch, steps)], dtype=torch.float64)
    result = {"loss": float(((losses[:, 0] - losses[:, 1]).abs() / losses[:, 0]).max())}
    one = batches(graph, batch, 1)[0]
    result["theirs"], result["ours"] = in_turn(lambda: theirs.step(*one), lambda: ours.step(*one), steps)
    report("training step", "COO loop", result["theirs"], result["ours"], result["loss"])
    return result


if __name__ == "__main__":
    main(*NETFLIX)
