"""Disentangled list-wise KD (spec section 4; paper Eq. 6-10), in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def list_scores(user_emb: Tensor, item_emb: Tensor, users: Tensor, candidates: Tensor) -> Tensor:
    """`s_bk = e_{u_b} . e_{c_bk}`, `[B, K]`, in the type sums are kept in."""
    acc = torch.float64 if user_emb.dtype == torch.float64 else torch.float32
    return torch.einsum("bd,bkd->bk", user_emb[users].to(acc), item_emb[candidates].to(acc))


def list_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    alpha: float = 1.0,
    beta: float = 1.0,
    tau: float = 1.0,
    weight: str = "coupled",
    modality_weights: Tensor | None = None,
) -> Tensor:
    """`sum_m w_m tau^2 mean[ alpha KL(b^T || b^S) + beta w KL(q^T || q^S) ]`; student `[B, K]`, teacher `[M, B, K]` or
    `[B, K]`, index 0 the observed item. `log b-` is a difference of two logsumexp, never `log(1 - b+)`."""
    if teacher_logits.dim() == 2:
        teacher_logits = teacher_logits[None]
    acc = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    s, t = student_logits.to(acc)[None] / tau, teacher_logits.to(acc) / tau

    def parts(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        everything, negatives = z.logsumexp(-1), z[..., 1:].logsumexp(-1)
        return z[..., 0] - everything, negatives - everything, z[..., 1:] - negatives[..., None]

    (top_s, rest_s, q_s), (top_t, rest_t, q_t) = parts(s), parts(t)
    kl_b = top_t.exp() * (top_t - top_s) + rest_t.exp() * (rest_t - rest_s)
    kl_q = (q_t.exp() * (q_t - q_s)).sum(-1)
    w = rest_t.exp() if weight == "coupled" else 1.0
    per_modality = tau**2 * (alpha * kl_b + beta * w * kl_q).mean(-1)  # [M]
    if modality_weights is None:
        return per_modality.mean()
    return (modality_weights.to(acc) * per_modality).sum()
