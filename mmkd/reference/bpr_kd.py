"""BPR and pairwise ranking KD (spec section 4; paper Eq. 5 and 13), in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _accumulate(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def margins(user_emb: Tensor, item_emb: Tensor, users: Tensor, pos: Tensor, neg: Tensor) -> Tensor:
    """`x_b = e_u . e_{i+} - e_u . e_{i-}`, `[B]`."""
    u, p, n = _accumulate(user_emb[users]), _accumulate(item_emb[pos]), _accumulate(item_emb[neg])
    return (u * p).sum(-1) - (u * n).sum(-1)


def bpr(margin: Tensor) -> Tensor:
    """`-mean log sigmoid(x)` (Eq. 13)."""
    return F.softplus(-_accumulate(margin)).mean()


def pair_kd(student_margin: Tensor, teacher_margin: Tensor, tau: float = 1.0, kind: str = "bernoulli") -> Tensor:
    """`tau^2 mean[ p^T (ls(x^T/tau) - ls(x^S/tau)) + (1 - p^T)(ls(-x^T/tau) - ls(-x^S/tau)) ]`; `positive` keeps the
    first term only."""
    s, t = _accumulate(student_margin) / tau, _accumulate(teacher_margin) / tau
    p = torch.sigmoid(t)
    loss = p * (F.logsigmoid(t) - F.logsigmoid(s))
    if kind == "bernoulli":
        loss = loss + torch.sigmoid(-t) * (F.logsigmoid(-t) - F.logsigmoid(-s))
    return tau**2 * loss.mean()
