"""spec section 2, in plain PyTorch: truth for the tests, baseline for the bench."""

from __future__ import annotations

import torch
from torch import Tensor


def spmm(
    rowptr: Tensor,
    col: Tensor,
    x: Tensor,
    value: Tensor | None = None,
    row_scale: Tensor | None = None,
    col_scale: Tensor | None = None,
) -> Tensor:
    """`out[r] = row_scale[r] * sum_j value[j] * col_scale[col[j]] * x[col[j]]` over the row's entries `j`."""
    num_rows = rowptr.numel() - 1
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = torch.repeat_interleave(torch.arange(num_rows, device=x.device), rowptr.diff())
    col = col.long()
    gathered = x.to(acc)[col]
    if value is not None:
        gathered = gathered * value.to(acc)[:, None]
    if col_scale is not None:
        gathered = gathered * col_scale.to(acc)[col][:, None]
    out = torch.zeros(num_rows, x.shape[1], dtype=acc, device=x.device).index_add(0, rows, gathered)
    if row_scale is not None:
        out = out * row_scale.to(acc)[:, None]
    return out.to(x.dtype)


def sddmm(
    rowptr: Tensor,
    col: Tensor,
    a: Tensor,
    b: Tensor,
    row_scale: Tensor | None = None,
    col_scale: Tensor | None = None,
) -> Tensor:
    """`out[j] = row_scale[r] * col_scale[col[j]] * <a[r], b[col[j]]>` for every entry `j` of row `r`."""
    acc = torch.float64 if a.dtype == torch.float64 else torch.float32
    rows = torch.repeat_interleave(torch.arange(rowptr.numel() - 1, device=a.device), rowptr.diff())
    col = col.long()
    out = (a.to(acc)[rows] * b.to(acc)[col]).sum(1)
    if col_scale is not None:
        out = out * col_scale.to(acc)[col]
    return out if row_scale is None else out * row_scale.to(acc)[rows]


def propagate(
    rowptr: Tensor, col: Tensor, scale: Tensor, x: Tensor, num_layers: int, rows: Tensor | None = None
) -> Tensor:
    """`1/(L+1) * sum_{l=0..L} Â^l x`, then the rows asked for."""
    layers = [x]
    for _ in range(num_layers):
        layers.append(spmm(rowptr, col, layers[-1], row_scale=scale, col_scale=scale))
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = (sum(layer.to(acc) for layer in layers) / (num_layers + 1)).to(x.dtype)
    return out if rows is None else out[rows]
