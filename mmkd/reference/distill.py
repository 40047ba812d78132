"""All losses of the student and their weighted sum (spec section 4; paper Eq. 12), in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkd.reference.bpr_kd import bpr, pair_kd
from mmkd.reference.emb_kd import emb_kd
from mmkd.reference.list_kd import list_kd, list_scores


def distill(
    table: Tensor, num_users: int, users: Tensor, candidates: Tensor, teacher_margin: Tensor | None,
    teacher_logits: Tensor | None, nodes: Tensor, targets: Tensor | None, weights: tuple[float, float, float, float],
    pair_tau: float, pair_kind: str, alpha: float, beta: float, list_tau: float, list_weight: str, gamma: float,
    list_modalities: Tensor | None, emb_modalities: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`(weights . terms, terms)`, terms `[4]`: BPR, PairKD, ListKD, EmbKD; 0 where the weight is 0 or there is nothing."""
    nothing = table[:0].sum(dtype=torch.float64 if table.dtype == torch.float64 else torch.float32)  # part of the graph
    terms = [nothing] * 4
    if len(users) and any(weights[:3]):
        scores = list_scores(table[:num_users], table[num_users:], users, candidates)
        margin = scores[:, 0] - scores[:, 1]
        if weights[0]:
            terms[0] = bpr(margin)
        if weights[1]:
            terms[1] = pair_kd(margin, teacher_margin, pair_tau, pair_kind)
        if weights[2]:
            terms[2] = list_kd(scores, teacher_logits, alpha, beta, list_tau, list_weight, list_modalities)
    if weights[3] and len(nodes):
        terms[3] = emb_kd(table[nodes], targets, gamma, emb_modalities)
    loss = sum((w * t for w, t in zip(weights, terms, strict=True) if w), nothing)
    return loss, torch.stack(terms).detach()
