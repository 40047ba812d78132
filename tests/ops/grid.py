"""The grid every op is held to, and the error budget it is held by."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DIMS = (1, 7, 32, 64, 65, 128)
# one rounding of the result, which eager may happen to do luckily
EPS = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def within_budget(ours: Tensor, eager: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """|ours - truth| <= |eager - truth| + eps, in the largest entry, relative to the largest true entry."""
    truth = truth.double()
    scale = truth.abs().max().item() if truth.numel() else 0.0
    scale = max(scale, 1e-30)

    def worst(t: Tensor) -> float:
        return (t.double() - truth).abs().max().item() / scale if truth.numel() else 0.0

    assert ours.shape == truth.shape
    assert torch.isfinite(ours).all() or not torch.isfinite(truth).all()
    assert worst(ours) <= worst(eager) + EPS[dtype], (worst(ours), worst(eager), dtype)
