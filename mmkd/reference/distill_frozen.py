"""The student's losses from the constants of a collapsed teacher (spec sections 3 and 4), in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from mmkd.reference.distill import distill
from mmkd.reference.frozen_teacher import frozen_teacher


def distill_frozen(
    table: Tensor, num_users: int, users: Tensor, candidates: Tensor, nodes: Tensor, content: Tensor, design: Tensor,
    ids: Tensor, omega: Tensor, state: Tensor, asked: Tensor, listed: Tensor, first_item: int,
    weights: tuple[float, float, float, float], pair_tau: float, pair_kind: str, alpha: float, beta: float,
    list_tau: float, list_weight: str, gamma: float, list_modalities: Tensor, emb_modalities: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`distill` of what `frozen_teacher` says; listed: `[B, K]`, or `[B, 0]` without ListKD."""
    margin, logits, targets = frozen_teacher(content, design, ids, omega, state, asked, listed, first_item)
    loss, terms = distill(
        table, num_users, users, candidates, margin, logits, nodes, targets, weights, pair_tau, pair_kind, alpha, beta,
        list_tau, list_weight, gamma, list_modalities, emb_modalities,
    )  # fmt: skip
    return loss + state[:0].sum(), terms  # a function of the state, also where nothing is asked of it
