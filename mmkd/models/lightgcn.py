"""LightGCN: the student, and the undistilled baseline (spec section 2, He et al. 2020 Eq. 3, 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmkd import ops
from mmkd.graph import BipartiteGraph


def initial_table(
    rows: int, dim: int, kind: str, generator: torch.Generator | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """A random ``[rows, dim]`` layer-0 table: ``"xavier"`` (uniform) or ``"normal"`` (standard deviation 0.1)."""
    table = torch.empty(rows, dim, dtype=dtype)
    if kind == "xavier":
        return nn.init.xavier_uniform_(table, generator=generator)
    if kind == "normal":
        return nn.init.normal_(table, std=0.1, generator=generator)
    raise ValueError(f"init: expected xavier or normal, got {kind!r}")


def rounded(x: Tensor, compute: torch.dtype | None) -> Tensor:
    """``x`` in the type training computes in; ``x`` itself where there is none, or without gradients."""
    return x if compute is None or not torch.is_grad_enabled() else x.to(compute)


class LightGCN(nn.Module):
    """``E = 1/(L+1) sum_l A_hat^l E0`` over a table ``E0`` of users, then items.

    Args:
        graph: train interactions, ``N = U + I`` nodes.
        table: ``E0``, ``[N, d]``; copied.
        layers: ``L``.
        compute: type of the table in training's propagation and of what it returns, for instance ``torch.bfloat16``; sums
            and the weights keep theirs. Without gradients (evaluation, export) it is not used.

    Shape:
        ``forward()`` gives ``[N, d]``; ``forward(rows)`` only those rows, ``[len(rows), d]``.
    """

    def __init__(self, graph: BipartiteGraph, table: Tensor, layers: int, compute: torch.dtype | None = None) -> None:
        super().__init__()
        if table.ndim != 2 or table.shape[0] != graph.num_nodes:
            raise ValueError(f"table: expected [{graph.num_nodes}, d] (users, then items), got {tuple(table.shape)}")
        self.graph = graph
        self.layers, self.compute = layers, compute
        self.table = nn.Parameter(table.detach().clone())

    def forward(self, rows: Tensor | None = None) -> Tensor:
        return ops.propagate(self.graph, rounded(self.table, self.compute), self.layers, rows=rows)

    def tables(self) -> tuple[Tensor, Tensor]:
        """Final embeddings of users ``[U, d]`` and items ``[I, d]``, without gradient."""
        with torch.no_grad():
            users, items = self().split([self.graph.num_users, self.graph.num_items])
        return users, items


def matching_table(
    graph: BipartiteGraph, target: Tensor, layers: int, *, ridge: float = 1e-3, steps: int = 60
) -> Tensor:
    """The layer-0 table whose propagation comes nearest to ``target``: ``argmin_x ||P x - target||^2 + ridge ||x||^2``.

    ``P = 1/(L+1) sum_l A_hat^l`` is symmetric; conjugate gradients on ``(P^2 + ridge) x = P target``, all columns at once.
    A table that starts a student at ``target`` itself is smoothed ``L`` more times before it is ever used.

    Args:
        target: ``[N, d]``. layers: ``L``; 0 returns ``target``.
        ridge: keeps directions that ``P`` nearly removes small. steps: of the solver.

    Returns:
        ``[N, d]``, without gradient.
    """
    if layers == 0:
        return target.detach().clone()
    with torch.no_grad():
        residual = ops.propagate(graph, target, layers)
        x, direction = torch.zeros_like(residual), residual.clone()
        square = residual.square().sum(0)
        for _ in range(steps):
            image = ops.propagate(graph, ops.propagate(graph, direction, layers), layers) + ridge * direction
            step = square / (direction * image).sum(0).clamp_min(1e-30)
            x += step * direction
            residual -= step * image
            before, square = square, residual.square().sum(0)
            direction = residual + square / before.clamp_min(1e-30) * direction
    return x
