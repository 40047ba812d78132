"""The error budget: |kernel - truth| <= |same-dtype eager - truth| + eps."""

from __future__ import annotations

import torch

EPS = {torch.float32: 3e-6, torch.float64: 1e-13, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def within(ours: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype) -> None:
    """Largest errors, relative to the largest entry of the truth."""
    assert ours.shape == truth.shape, (ours.shape, truth.shape)
    assert torch.isfinite(ours.double()).all() or not torch.isfinite(truth).all()
    if truth.numel() == 0:
        return
    scale = truth.abs().max().clamp(min=1e-3)
    error = (ours.double() - truth).abs().max() / scale
    allowed = (eager.double() - truth).abs().max() / scale + EPS[dtype]
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
