"""spec section 2, in plain PyTorch: truth for the tests, baseline for the bench."""

from __future__ import annotations

from collections.abc import Callable

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


def propagate_backward(
    rowptr: Tensor, col: Tensor, scale: Tensor, grad: Tensor, num_layers: int, rows: Tensor
) -> Tensor:
    """Gradient of `propagate(...)[rows]` with respect to `x`; `Â` is symmetric."""
    full = grad.new_zeros(rowptr.numel() - 1, grad.shape[1]).index_add(0, rows, grad)
    return propagate(rowptr, col, scale, full, num_layers)


class _Mixed(torch.autograd.Function):
    """The adjacency is symmetric, so the way back is the same operator, roundings included."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rowptr: Tensor, col: Tensor, scale: Tensor, x: Tensor, num_layers: int) -> Tensor:
        h = x
        for _ in range(num_layers):
            h = x + spmm(rowptr, col, h.to(torch.bfloat16).to(h.dtype), row_scale=scale, col_scale=scale)
        return h / (num_layers + 1)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *saved, _, ctx.num_layers = inputs
        ctx.save_for_backward(*saved)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return None, None, None, _Mixed.apply(*ctx.saved_tensors, grad, ctx.num_layers), None


def propagate_mixed(
    rowptr: Tensor, col: Tensor, scale: Tensor, x: Tensor, num_layers: int, rows: Tensor | None = None
) -> Tensor:
    """`h <- x + Â bf16(h)`, `num_layers` times from `h = x`, over `num_layers + 1`; backwards the same of the gradient."""
    out = _Mixed.apply(rowptr, col, scale, x, num_layers)
    return out if rows is None else out[rows]


def propagate_mixed_backward(
    rowptr: Tensor, col: Tensor, scale: Tensor, grad: Tensor, num_layers: int, rows: Tensor
) -> Tensor:
    """What goes back through `propagate_mixed(...)[rows]`: the same operator on the gradient."""
    full = grad.new_zeros(rowptr.numel() - 1, grad.shape[1]).index_add(0, rows, grad)
    return propagate_mixed(rowptr, col, scale, full, num_layers)


def propagate_adamw_(
    rowptr: Tensor, col: Tensor, scale: Tensor, grad: Tensor, num_layers: int, rows: Tensor, l2: Tensor | None,
    weight: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, lr: float, beta1: float, beta2: float, eps: float,
    weight_decay: float, step: int, back: Callable[..., Tensor] = propagate_backward,
) -> None:  # fmt: skip
    """A step of AdamW on `weight` with the gradient of `propagate(...)[rows]` and of `1/2 sum l2 * weight[rows]^2`."""
    if rows.numel() and bool((rows.diff() <= 0).any()):
        raise RuntimeError("rows: expected node ids in ascending order, each once")
    full = back(rowptr, col, scale, grad, num_layers, rows)
    if l2 is not None:
        full = full.index_add(0, rows, l2[:, None] * weight[rows])
    weight *= 1 - lr * weight_decay
    exp_avg.lerp_(full, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(full, full, value=1 - beta2)
    denominator = (exp_avg_sq / (1 - beta2**step)).sqrt_().add_(eps)
    weight.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))
