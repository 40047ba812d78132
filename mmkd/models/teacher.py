"""The prompt-guided multi-modal teacher (spec section 3, paper Eq. 1-4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmkd.graph import BipartiteGraph, ItemRows
from mmkd.models.features import FeatureTable, project
from mmkd.models.lightgcn import HoldsGradient, RowGradient, initial_table, propagated, rounded
from mmkd.models.neighbors import NeighborGraph
from mmkd.models.prompt import Prompt
from mmkd.reference.teacher import NORM_EPS, combine


@dataclass(frozen=True)
class TeacherOutput:
    """What the teacher computes from the graph and the features.

    Attributes:
        joint: ``E^T``, ``[N, d]`` (or the asked rows).
        ids: its part without ``F^m``, ``propagate(id + sum_m S^m id)``, ``[N, d]`` (or the asked rows).
        users: ``F_u^m``, ``[M, U, d]`` (or the asked users).
        items: ``F_i^m``, ``[M, I, d]`` (or the asked items).
    """

    joint: Tensor
    ids: Tensor
    users: Tensor
    items: Tensor


def spread(graph: BipartiteGraph, features: Tensor, layers: int) -> tuple[Tensor, Tensor]:
    """``F_u = R_hat f``, ``F_i = R_hat^T F_u``, repeated ``layers`` times.

    Args:
        features: ``[I, w]``, any width.

    Returns:
        ``[U, w]`` and ``[I, w]``.
    """
    items = features
    for _ in range(layers):
        users = graph.users_from_items(items)
        items = graph.items_from_users(users)
    return users, items


def spread_to(
    graph: BipartiteGraph, features: Tensor, layers: int, users: Tensor, items: ItemRows
) -> tuple[Tensor, Tensor]:
    """:func:`spread` at some nodes, whose last layer is computed for the items asked for, forward and backward.

    Args:
        users: int64 ``[n]``, each once. items: ``graph.item_rows`` of the items.

    Returns:
        ``[n, w]`` and ``[len(items.items), w]``.
    """
    if layers > 1:
        _, features = spread(graph, features, layers - 1)
    return _LastLayer.apply(graph.users_from_items(features), graph, users, items)


class _LastLayer(torch.autograd.Function):
    """``F_u`` at some users and ``R_hat^T F_u`` at some items; their gradients are added in one table, without a zeroed one."""

    @staticmethod
    def forward(ctx, table: Tensor, graph: BipartiteGraph, users: Tensor, items: ItemRows) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(users)
        ctx.graph, ctx.items = graph, items
        return table.index_select(0, users), graph.items_from_users(table, rows=items)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_users: Tensor, grad_items: Tensor) -> tuple[Tensor, None, None, None]:
        grad = ctx.graph.users_from_items(grad_items, rows=ctx.items)
        return grad.index_add_(0, *ctx.saved_tensors, grad_users), None, None, None


def prompt_row_scale(design: Tensor, stacked: Tensor, gram: Tensor, eps: float = NORM_EPS) -> Tensor:
    """``1 / max(||p_i (p^T X)||, eps)`` for every item, from constants of width ``d+1``; nothing is ``d_m`` wide.

    With ``p = D V``, ``D = [H 1]`` and ``Q = (D^T X)(D^T X)^T``: ``||p_i p^T X||^2 = D_i (V V^T Q V V^T) D_i^T``.

    Args:
        design: ``D``, ``[I, d+1]``.
        stacked: ``V``, ``[d+1, d]``.
        gram: ``Q``, ``[d+1, d+1]``.

    Returns:
        ``[I, 1]``.
    """
    both = stacked @ stacked.T
    square = ((design @ (both @ gram @ both)) * design).sum(-1, keepdim=True)
    return square.clamp_min(eps * eps).rsqrt()


def prompt_parts(design: Tensor, stacked: Tensor, mixed: list[Tensor], grams: list[Tensor]) -> Tensor:
    """``p^m W^m`` with rows of ``p^m`` at unit length, modalities side by side: ``[I, M d]``."""
    both = stacked @ stacked.T
    scaled = (design * prompt_row_scale(design, stacked, gram) for gram in grams)
    return torch.cat([rows @ (both @ part) for rows, part in zip(scaled, mixed, strict=True)], 1)


class Teacher(HoldsGradient, nn.Module):
    """Graph encoder of ids plus prompt-guided encoders of every modality.

    ``f^m = dropout(X^m W^m + lambda_1 c p (p^T (X^m W^m)) + b^m)``, ``F_u^m = R_hat f^m``, ``F_i^m = R_hat^T F_u^m``,
    ``E^T = propagate(id + sum_m S^m id) + sum_m omega_m rownorm(F^m)``, where ``S^m`` acts on items alone. ``omega`` is
    stored with the weights but gets no gradient.

    Args:
        graph: train interactions.
        features: one table per modality, ``I`` rows each.
        prompt: module that gives ``p``.
        layers: ``L_T`` of the id part.
        feature_layers: times ``R_hat``, ``R_hat^T`` are applied.
        feature_weight: every ``omega_m``, to begin with.
        strength: ``lambda_1``.
        norm: ``"mean"`` or ``"row"``, the scale of ``p^m``.
        dropout: probability on ``f^m``, in training only.
        init: start of the id table, ``"xavier"`` or ``"normal"``.
        generator: of the random start.
        compute: type of the tables in training's propagation, as in `LightGCN`; outputs have the weights' type.
        neighbors: ``S^m``, item-item graphs of the modalities whose neighbours an item's id row is smoothed over; not in
            the paper. Empty: ``propagate(id)`` alone.
    """

    def __init__(
        self,
        graph: BipartiteGraph,
        features: Sequence[FeatureTable],
        prompt: Prompt,
        *,
        layers: int = 3,
        feature_layers: int = 1,
        feature_weight: float = 0.5,
        strength: float = 0.1,
        norm: str = "mean",
        dropout: float = 0.0,
        init: str = "xavier",
        generator: torch.Generator | None = None,
        compute: torch.dtype | None = None,
        neighbors: Sequence[NeighborGraph] = (),
    ) -> None:
        super().__init__()
        for table in features:
            if table.num_items != graph.num_items:
                raise ValueError(
                    f"modality '{table.name}': expected {graph.num_items} rows (one per item), got {table.num_items}"
                )
        if norm not in ("mean", "row"):
            raise ValueError(f"norm: expected mean or row, got {norm!r}")
        dim, dtype = prompt.weight.shape[1], prompt.weight.dtype
        self.graph, self.features, self.prompt, self.neighbors = graph, list(features), prompt, tuple(neighbors)
        self.layers, self.feature_layers = layers, feature_layers
        self.strength, self.norm, self.dropout, self.compute = strength, norm, dropout, compute
        self.table = nn.Parameter(initial_table(graph.num_nodes, dim, init, generator, dtype))
        self.weights = nn.ParameterList(
            nn.init.xavier_uniform_(torch.empty(table.width, dim, dtype=dtype), generator=generator)
            for table in features
        )
        self.biases = nn.ParameterList(torch.zeros(dim, dtype=dtype) for _ in features)
        self.omega = nn.Parameter(torch.full((len(self.features),), feature_weight, dtype=dtype), requires_grad=False)
        self.register_buffer("node_design", None, persistent=False)
        self._constants()

    def hold_gradient(self) -> RowGradient | None:
        """As :meth:`LightGCN.hold_gradient`; None with ``neighbors``, which the id table goes through first."""
        return None if self.neighbors else self._hold(self.graph, self.layers, self.compute)

    def _constants(self) -> None:
        """``B^m = [H 1]^T X^m`` of every modality, and for ``norm="row"`` ``Q^m = B^m B^m^T``."""
        design = self.prompt.design
        for m, table in enumerate(self.features):
            moments = table.moments(design)  # [d+1, d_m] float64
            self.register_buffer(f"moments{m}", moments.to(design), persistent=False)
            if self.norm == "row":
                self.register_buffer(f"gram{m}", (moments @ moments.T).to(design), persistent=False)

    def mixed(self) -> list[Tensor]:
        """``[H 1]^T X^m W^m``, ``[d+1, d]`` for every modality."""
        return [getattr(self, f"moments{m}") @ weight for m, weight in enumerate(self.weights)]

    def grams(self) -> list[Tensor]:
        """``Q^m`` of :func:`prompt_row_scale`; empty for ``norm="mean"``."""
        return [getattr(self, f"gram{m}") for m in range(len(self.features))] if self.norm == "row" else []

    def project(self, prompt: bool = True, mask: Tensor | None = None) -> Tensor:
        """``f^m``, modalities side by side: ``[I, M d]``; without the prompt's term on demand, and times a `mask` ``[I, M d]`` of dropout.

        ``p p^T X W = D (V V^T (D^T X) W)`` with constants ``D = [H 1]`` and ``D^T X``: beside ``X W`` there is one more
        product over items, ``d+1`` wide, and the bias is its last row.
        """
        design, bias = self.prompt.design, torch.cat(list(self.biases))[None]
        if not (prompt and self.strength):
            return project(self.features, self.weights, design[:, -1:], bias, mask)
        stacked = self.prompt.stacked()
        if self.norm == "row":
            parts = prompt_parts(design, stacked, self.mixed(), self.grams())
            product = project(self.features, self.weights, design[:, -1:], bias).add_(self.strength * parts)
            return product if mask is None else product.mul_(mask)
        added = stacked @ (stacked.T @ torch.cat(self.mixed(), 1)) * (self.strength / design.shape[0])
        return project(self.features, self.weights, design, torch.cat([added[:-1], added[-1:] + bias]), mask)

    def prompt_at(self, rows: Tensor) -> Tensor:
        """``R_hat p`` at the users and ``p`` at the items of node ids `rows`, ``[n, d]``."""
        if self.node_design is None:
            design = self.prompt.design
            self.node_design = torch.cat([self.graph.users_from_items(design), design])  # [N, d+1], a constant
        product = self.node_design.index_select(0, rows) @ self.prompt.stacked()
        return product.to(self.table.dtype)  # 16 bits in an autocast region

    def id_embeddings(self, rows: Tensor | None = None) -> Tensor:
        """``propagate(id + sum_m S^m id)``, the part of ``E^T`` without ``F^m``."""
        return propagated(self.graph, self._smoothed(), self.layers, rows, self.compute, self.held)

    def _smoothed(self) -> Tensor:
        """The id table, every item's row plus its neighbours': ``[N, d]``."""
        if not self.neighbors:
            return self.table
        users, items = self.split(self.table)
        return torch.cat([users, items + sum(graph(items) for graph in self.neighbors)])

    def forward(
        self, rows: Tensor | None = None, num_users: int | None = None, mask: Tensor | None = None,
        item_rows: ItemRows | None = None,
    ) -> TeacherOutput:  # fmt: skip
        """Teacher outputs at all nodes, or at some; arguments as in :meth:`parts`."""
        ids, *sides = self.parts(rows, num_users, mask, item_rows)
        users, items = (torch.stack(x.chunk(len(self.features), 1)) for x in sides)  # [M, n, d]
        return TeacherOutput(combine(ids, torch.cat([users, items], 1), self.omega), ids, users, items)

    def parts(
        self, rows: Tensor | None = None, num_users: int | None = None, mask: Tensor | None = None,
        item_rows: ItemRows | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """What ``E^T`` is made of, at all nodes or at some: ids ``[n, d]``, ``F_u`` and ``F_i``, modalities side by side.

        Args:
            rows: node ids to return, users first; all nodes if empty.
            num_users: how many of ``rows`` are users.
            mask: ``[I, M d]`` dropout mask, already divided by the keep probability.
            item_rows: ``graph.item_rows`` of the items of ``rows``: no other item's features are made or get a gradient.
        """
        features = rounded(self.project(mask=mask), self.compute)
        if item_rows is not None:
            users, items = spread_to(self.graph, features, self.feature_layers, rows[:num_users], item_rows)
        else:
            users, items = spread(self.graph, features, self.feature_layers)
            if rows is not None:
                users = users.index_select(0, rows[:num_users])
                items = items.index_select(0, rows[num_users:] - self.graph.num_users)
        own = self.table.dtype
        return self.id_embeddings(rows).to(own), users.to(own), items.to(own)

    def tables(self) -> tuple[Tensor, Tensor]:
        """``E^T`` of users ``[U, d]`` and items ``[I, d]``, without dropout or gradient."""
        with torch.no_grad():
            return self.split(self().joint)

    def split(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """A table of all nodes as that of the users and that of the items."""
        users, items = table.split([self.graph.num_users, self.graph.num_items])
        return users, items
