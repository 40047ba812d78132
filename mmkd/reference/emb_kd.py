"""Embedding KD by scaled cosine error (spec section 4; paper Eq. 11), in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def emb_kd(
    student: Tensor, teachers: Tensor | list[Tensor], gamma: float = 2.0, modality_weights: Tensor | None = None
) -> Tensor:
    """`sum_m v_m mean_i (1 - cos(e_i, f_i^m))^gamma`, `v_m = 1` unless given; a zero vector has cosine 0 and gradient 0."""
    acc = torch.float64 if student.dtype == torch.float64 else torch.float32
    e = student.to(acc)
    total = e.new_zeros(())
    for m, teacher in enumerate(teachers):
        f = teacher.to(acc)
        ee, ff = (e * e).sum(-1), (f * f).sum(-1)
        live = (ee > 0) & (ff > 0)
        # where() on the inputs too: the untaken branch of sqrt at 0 would make the gradient NaN.
        norm = torch.where(live, ee, 1.0).sqrt() * torch.where(live, ff, 1.0).sqrt()
        cosine = torch.where(live, (e * f).sum(-1) / norm, 0.0)
        error = (1 - cosine).clamp(min=0).pow(gamma).mean()
        total = total + (error if modality_weights is None else modality_weights[m].to(acc) * error)
    return total
