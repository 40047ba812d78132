"""spec section 3: the projected features of the teacher, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def project(
    tables: Sequence[Tensor], weights: Sequence[Tensor], scales: Sequence[Tensor | None], design: Tensor | None,
    added: Tensor | None, mask: Tensor | None,
) -> Tensor:  # fmt: skip
    """`mask * ([r_1 (X_1 W_1 + 1 t_1^T), ...] + D A)`; a weight with one row more than its table has columns is `[W; t^T]`."""
    parts = []
    for x, w, r in zip(tables, weights, scales, strict=True):
        part = x.to(w.dtype) @ w[: x.shape[1]]
        if len(w) > x.shape[1]:
            part = part + w[-1]
        parts.append(part if r is None else r[:, None] * part)
    out = torch.cat(parts, 1)
    if design is not None:
        out = out + design @ added
    return out if mask is None else mask * out
