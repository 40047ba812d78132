"""The teacher's joint embedding and its own losses (spec section 3; paper Eq. 2 to 4), in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmkd.reference.bpr_kd import bpr, margins

NORM_EPS = 1e-12


def row_normalize(x: Tensor) -> Tensor:
    """``x / max(||x||, eps)`` per last-dimension row; a zero row stays zero."""
    return nn.functional.normalize(x, dim=-1, eps=NORM_EPS)


def combine(ids: Tensor, features: Tensor, omega: Tensor) -> Tensor:
    """``E^T = ids + sum_m omega_m rownorm(F^m)``, ``[n, d]``, from ``[n, d]``, ``[M, n, d]`` and ``[M]``."""
    return ids + (omega[:, None, None] * row_normalize(features)).sum(0)


def heads(features: Tensor, modalities: int) -> Tensor:
    """``[n, M d]`` as ``[M, n, d]``."""
    n, wide = features.shape
    return features.reshape(n, modalities, wide // max(1, modalities)).transpose(0, 1)


def teacher(
    ids: Tensor, user_features: Tensor, item_features: Tensor, users: Tensor, pos: Tensor, neg: Tensor, omega: Tensor,
    prompt: Tensor | None, weights: tuple[float, float, float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss and its three summands `[3]`: BPR of `E^T`, of every `F^m`, of the prompt, with their weights."""
    num_users, count = len(user_features), len(omega)
    both = torch.cat([heads(user_features, count), heads(item_features, count)], 1)  # [M, n, d]

    def ranked(table: Tensor) -> Tensor:
        return bpr(margins(table[:num_users], table[num_users:], users, pos, neg))

    nothing = ids[:0].sum(dtype=torch.float64 if ids.dtype == torch.float64 else torch.float32)  # part of the graph
    terms = [nothing] * 3
    if len(users):
        if weights[0]:
            terms[0] = weights[0] * ranked(combine(ids, both, omega))
        if weights[1]:
            terms[1] = weights[1] * sum((ranked(table) for table in both), nothing)
        if weights[2]:
            terms[2] = weights[2] * ranked(prompt)
    return sum(terms, nothing), torch.stack(terms).detach()
