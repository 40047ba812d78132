"""Projected features of all modalities, with what is added to them and dropout, in one pass over the items."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmkd import backends, reference
from mmkd.ops._checks import (
    accumulate_type,
    check_floating,
    check_no_grad,
    check_rank,
    check_same_device,
    check_shape,
    dense,
)
from mmkd.ops._registry import on_register


def project(
    tables: Sequence[Tensor], weights: Sequence[Tensor], *, scales: Sequence[Tensor | None] | None = None,
    design: Tensor | None = None, added: Tensor | None = None, mask: Tensor | None = None, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """What a layer makes of frozen features (paper, Eq. 4): products with tall tables that are read as they are stored.

        f = mask * ([r_1 (X_1 W_1 + 1 t_1^T), ..., r_M (X_M W_M + 1 t_M^T)] + D A)

    Every row of features is read once forward and once back, in the type it is stored in; no product or sum is a table of its
    own, and the masked gradient is made once for all that use it. Differentiable in `weights` and `added`.

    Args:
        tables: `X_m`, `[I, d_m]`, constants. float32, bfloat16 or float16 with float32 weights, float64 with float64 ones.
        weights: `W_m`, `[d_m, d]`, or `[W_m; t_m^T]`, `[d_m + 1, d]`, of one dtype, float32 or float64.
        scales: `r_m`, `[I]`, each or None. Constants.
        design, added: `D`, `[I, e]`, a constant, and `A`, `[e, M d]`.
        mask: `[I, M d]`, a constant; of dropout, for instance.
        impl: `auto`, `reference` or `cpp`. Off the CPU `auto` is the reference, whose products are the library's.

    Returns:
        `[I, M d]` in the weights' dtype.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device (named). RuntimeError: a second derivative (of
        `impl="cpp"`).
    """
    scales = [None] * len(tables) if scales is None else list(scales)
    _check(tables, weights, scales, design, added, mask)
    if impl == "auto" and tables[0].device.type != "cpu":
        impl = "reference"
    if backends.resolve("project", tables[0], impl) == "reference":
        return reference.project(tables, weights, scales, design, added, mask)
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError("project: transforms of torch.func are not supported; use impl='reference' for them")
    scales = [_scale(r, weights[0]) for r in scales]
    constants = [*map(dense, tables), *scales, _dense(design), _dense(mask)]
    return _Project.apply(_dense(added), *map(dense, weights), *constants)


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else dense(t)


def _scale(r: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if r is None else dense(r)


class _Project(torch.autograd.Function):
    """The schema ops take lists, which a Function does not look into: tensors come one by one, M weights, tables, scales."""

    @staticmethod
    def forward(ctx, added: Tensor | None, *tensors) -> Tensor:
        *many, design, mask = tensors
        count = len(many) // 3
        weights, tables, scales = many[:count], many[count : 2 * count], many[2 * count :]
        ctx.save_for_backward(*tables, *scales, design, mask)
        ctx.rows = [len(w) for w in weights]
        return _below_autograd(torch.ops.mmkd.project, list(tables), list(weights), list(scales), design, added, mask)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        *many, design, mask = ctx.saved_tensors
        count = len(ctx.rows)
        need_added, *needed = ctx.needs_input_grad[: 1 + count]
        arguments = dense(grad), many[:count], ctx.rows, many[count:], design, mask, any(needed)
        *by_weight, by_added = _below_autograd(torch.ops.mmkd.project_backward, *arguments)
        by_weight = (g if need else None for g, need in zip(by_weight, needed, strict=True))
        return by_added if need_added else None, *by_weight, *(None,) * (len(many) + 2)


def _below_autograd(op, *arguments):
    """Straight to the kernel; torch.compile traces the op."""
    if torch.compiler.is_compiling():
        return op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op.default(*arguments)


def _check(tables, weights, scales, design, added, mask) -> None:
    if not len(tables) or len(weights) != len(tables) or len(scales) != len(tables):
        raise ValueError(
            f"tables, weights, scales: expected equally many, at least one, got {len(tables)}, {len(weights)} and {len(scales)}"
        )
    kind = weights[0].dtype
    if kind not in (torch.float32, torch.float64):
        raise TypeError(f"weights[0]: expected a tensor of float32 or float64, got {kind}")
    check_rank(weights[0], "weights[0]", 2)
    d, count = weights[0].shape[1], len(tables)
    for m, (x, w, r) in enumerate(zip(tables, weights, scales, strict=True)):
        check_floating(x, f"tables[{m}]")
        check_rank(x, f"tables[{m}]", 2)
        if accumulate_type(x.dtype) != kind:
            raise TypeError(f"tables[{m}]: {x.dtype} goes with weights of {accumulate_type(x.dtype)}, got {kind}")
        check_shape(x, f"tables[{m}]", (len(tables[0]), x.shape[1]))
        check_floating(w, f"weights[{m}]", kind)
        if w.dim() != 2 or w.shape[1] != d or w.shape[0] - x.shape[1] not in (0, 1):
            raise ValueError(
                f"weights[{m}]: expected [{x.shape[1]}, {d}], or a row more, which is added, got {tuple(w.shape)}"
            )
        _check_constant(r, f"scales[{m}]", (len(x),), kind)
        check_no_grad(x, f"tables[{m}]")
        check_same_device(("tables[0]", tables[0]), (f"tables[{m}]", x), (f"weights[{m}]", w), (f"scales[{m}]", r))
    if (design is None) != (added is None):
        raise ValueError("design, added: expected both or neither")
    if design is not None:
        check_rank(design, "design", 2)
        _check_constant(design, "design", (len(tables[0]), design.shape[1]), kind)
        check_floating(added, "added", kind)
        check_shape(added, "added", (design.shape[1], count * d))
    _check_constant(mask, "mask", (len(tables[0]), count * d), kind)
    check_same_device(("tables[0]", tables[0]), ("design", design), ("added", added), ("mask", mask))


def _check_constant(t: Tensor | None, name: str, shape: tuple, dtype: torch.dtype) -> None:
    if t is not None:
        check_floating(t, name, dtype)
        check_shape(t, name, shape)
        check_no_grad(t, name)


@on_register
def _register(ns: str, ops) -> None:
    if not hasattr(ops, "project"):
        return

    def fake(tables, weights, scales, design, added, mask):
        return weights[0].new_empty(tables[0].shape[0], len(tables) * weights[0].shape[1])

    def fake_backward(grad, tables, weight_rows, scales, design, mask, need_weights):
        rows, d = 0 if design is None else design.shape[1], grad.shape[1] // len(tables)
        shapes = ((n, d) if need_weights else (0,) for n in weight_rows)
        return [*(grad.new_empty(shape) for shape in shapes), grad.new_empty(rows, grad.shape[1])]

    def refuse(ctx, *grads):
        raise RuntimeError(f"{ns}::project: call mmkd.ops.project, which carries its gradient")

    torch.library.register_fake(f"{ns}::project", fake)
    torch.library.register_fake(f"{ns}::project_backward", fake_backward)
    for name in ("project", "project_backward"):
        torch.library.register_autograd(f"{ns}::{name}", refuse, setup_context=lambda ctx, inputs, output: None)
