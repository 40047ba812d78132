"""The prompt-guided multi-modal teacher (spec section 3, paper Eq. 1-4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmkd import ops
from mmkd.graph import BipartiteGraph
from mmkd.models.features import FeatureTable
from mmkd.models.lightgcn import initial_table, rounded
from mmkd.models.prompt import Prompt

NORM_EPS = 1e-12


@dataclass(frozen=True)
class TeacherOutput:
    """What the teacher computes from the graph and the features.

    Attributes:
        joint: ``E^T``, ``[N, d]`` (or the asked rows).
        users: ``F_u^m``, ``[M, U, d]`` (or the asked users).
        items: ``F_i^m``, ``[M, I, d]`` (or the asked items).
        prompt: ``p``, ``[I, d]``; empty where it was not computed.
    """

    joint: Tensor
    users: Tensor
    items: Tensor
    prompt: Tensor | None = None


def row_normalize(x: Tensor) -> Tensor:
    """``x / max(||x||, eps)`` per last-dimension row; a zero row stays zero."""
    return nn.functional.normalize(x, dim=-1, eps=NORM_EPS)


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


def prompt_row_scale(prompt: Tensor, reduced: Tensor, eps: float = NORM_EPS) -> Tensor:
    """``1 / max(||p_i (p^T X)||, eps)`` for every item without building ``p^m``.

    ``||p_i G||^2 = p_i (G G^T) p_i^T`` with ``G = p^T X``.

    Args:
        prompt: ``p``, ``[I, d]``.
        reduced: ``p^T X``, ``[d, d_m]``.

    Returns:
        ``[I, 1]``.
    """
    square = ((prompt @ (reduced @ reduced.T)) * prompt).sum(-1, keepdim=True)
    return square.clamp_min(eps * eps).rsqrt()


def prompt_term(prompt: Tensor, projected: Tensor, norm: str, reduced: Tensor | None) -> Tensor:
    """``p^m W = c p (p^T (X W))``, ``[I, d]``, from ``projected = X W``; ``p p^T`` and ``p^m`` are never built.

    Args:
        prompt: ``p``, ``[I, d]``.
        projected: ``X W``, ``[I, d]``.
        norm: ``"mean"`` (``c = 1/I``) or ``"row"`` (unit rows of ``p^m``).
        reduced: ``p^T X``, ``[d, d_m]``, needed for ``"row"``.
    """
    mixed = prompt.T @ projected  # [d, d]
    if norm == "mean":
        return prompt @ (mixed / prompt.shape[0])
    return (prompt * prompt_row_scale(prompt, reduced)) @ mixed


class Teacher(nn.Module):
    """Graph encoder of ids plus prompt-guided encoders of every modality.

    ``f^m = dropout(X^m W^m + lambda_1 c p (p^T (X^m W^m)) + b^m)``, ``F_u^m = R_hat f^m``, ``F_i^m = R_hat^T F_u^m``,
    ``E^T = propagate(id) + omega sum_m rownorm(F^m)``.

    Args:
        graph: train interactions.
        features: one table per modality, ``I`` rows each.
        prompt: module that gives ``p``.
        layers: ``L_T`` of the id part.
        feature_layers: times ``R_hat``, ``R_hat^T`` are applied.
        feature_weight: ``omega``.
        strength: ``lambda_1``.
        norm: ``"mean"`` or ``"row"``, the scale of ``p^m``.
        dropout: probability on ``f^m``, in training only.
        init: start of the id table, ``"xavier"`` or ``"normal"``.
        generator: of the random start.
        compute: type of the tables in training's propagation, as in `LightGCN`; outputs have the weights' type.
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
        self.graph, self.features, self.prompt = graph, list(features), prompt
        self.layers, self.feature_layers, self.feature_weight = layers, feature_layers, feature_weight
        self.strength, self.norm, self.dropout, self.compute = strength, norm, dropout, compute
        self.table = nn.Parameter(initial_table(graph.num_nodes, dim, init, generator, dtype))
        self.weights = nn.ParameterList(
            nn.init.xavier_uniform_(torch.empty(table.width, dim, dtype=dtype), generator=generator)
            for table in features
        )
        self.biases = nn.ParameterList(torch.zeros(dim, dtype=dtype) for _ in features)

    def project(self, prompt: Tensor) -> Tensor:
        """``f^m`` before dropout, modalities side by side: ``[I, M d]``."""
        columns = []
        for table, weight, bias in zip(self.features, self.weights, self.biases, strict=True):
            projected = table.project(weight)
            if self.strength:
                reduced = table.values.T.matmul(prompt).T if self.norm == "row" else None
                projected = projected + self.strength * prompt_term(prompt, projected, self.norm, reduced)
            columns.append(projected + bias)
        return torch.cat(columns, dim=1)

    def id_embeddings(self, rows: Tensor | None = None) -> Tensor:
        """``propagate(id)``, the part of ``E^T`` without features."""
        return ops.propagate(self.graph, rounded(self.table, self.compute), self.layers, rows=rows)

    def forward(
        self, rows: Tensor | None = None, num_users: int | None = None, mask: Tensor | None = None
    ) -> TeacherOutput:
        """Teacher outputs at all nodes, or at some.

        Args:
            rows: node ids to return, users first; all nodes if empty.
            num_users: how many of ``rows`` are users.
            mask: ``[I, M d]`` dropout mask, already divided by the keep probability.
        """
        prompt = self.prompt()
        features = self.project(prompt)
        if mask is not None:
            features = features * mask
        users, items = spread(self.graph, rounded(features, self.compute), self.feature_layers)
        if rows is not None:
            users = users.index_select(0, rows[:num_users])
            items = items.index_select(0, rows[num_users:] - self.graph.num_users)
        own = self.table.dtype
        joint, users, items = self.id_embeddings(rows).to(own), users.to(own), items.to(own)
        return combine(joint, users, items, self.feature_weight, len(self.features), prompt)

    def tables(self) -> tuple[Tensor, Tensor]:
        """``E^T`` of users ``[U, d]`` and items ``[I, d]``, without dropout or gradient."""
        with torch.no_grad():
            users, items = self().joint.split([self.graph.num_users, self.graph.num_items])
        return users, items


def combine(
    joint: Tensor,
    users: Tensor,
    items: Tensor,
    feature_weight: float,
    modalities: int,
    prompt: Tensor | None = None,
) -> TeacherOutput:
    """``E^T = joint + omega sum_m rownorm(F^m)`` from ``[n_u, M d]`` and ``[n_i, M d]`` feature tables."""
    users = torch.stack(users.chunk(modalities, dim=1))  # [M, n_u, d]
    items = torch.stack(items.chunk(modalities, dim=1))
    shared = torch.cat((row_normalize(users).sum(0), row_normalize(items).sum(0)))
    return TeacherOutput(joint + feature_weight * shared, users, items, prompt)
