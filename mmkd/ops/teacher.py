"""The teacher's own losses in one call: BPR of its joint embedding, of every modality and of the prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkd import backends, reference
from mmkd.ops._checks import (
    accumulate_type,
    check_floating,
    check_index,
    check_no_grad,
    check_rank,
    check_same_device,
    check_shape,
    dense,
    loss_weights,
)
from mmkd.ops._registry import call, differentiable_loss, on_register
from mmkd.ops.bpr_kd import bpr_loss
from mmkd.reference.teacher import combine, heads


def teacher_loss(
    ids: Tensor, user_features: Tensor, item_features: Tensor, users: Tensor, pos: Tensor, neg: Tensor, omega: Tensor,
    prompt: Tensor | None = None, *, weights: tuple[float, float, float] = (1.0, 0.1, 0.1), impl: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the teacher's stage minimises over a batch, without its L2 term (paper, Eq. 2 to 4 and 13):

        w_0 BPR(E^T) + w_1 sum_m BPR(F^m) + w_2 BPR(p),   E^T = ids + sum_m omega_m F^m / max(||F^m||, 1e-12)

    at a step's rows: `n` of them, users, then items. On a CPU one pass makes the loss and all gradients, which a backward pass
    hands over; every row of a gradient is written once, in the batch's order, so the bits do not depend on the threads.

    Args:
        ids: `[n, d]`, float32, float64, bfloat16 or float16: what `propagate(rows=...)` makes of the id table.
        user_features, item_features: `F_u^m`, `[n_u, M d]`, and `F_i^m`, `[n_i, M d]`, modalities side by side; `n_u + n_i = n`,
            `M >= 1`.
        users, pos, neg: int64 `[B]`, places among the users and, counted from the first item, among the items.
        omega: `[M]`, weights of the modalities in `E^T`, a constant.
        prompt: `[n, d]`, `R_hat p` of the users and `p` of the items; not looked at where `w_2 = 0`. All of one dtype.
        weights: `w_0, w_1, w_2 >= 0`; the defaults are those of `mmkd train`. A loss of weight 0 is left out, and a table that
            no loss looks at gets zeros or no gradient.
        impl: `auto`, `reference` or `cpp` (float32 and float64). `auto` is :func:`composed` in 16 bits and off the CPU.

    Returns:
        The loss, a scalar (float32; float64 for float64 tables), and `[3]`, its summands, without gradient.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, range or device (named). RuntimeError: an index out
        of range; a second derivative (of `impl="cpp"`).
    """
    weights = loss_weights(weights, "three", ("E^T", "every F^m", "the prompt"))
    _check(ids, user_features, item_features, omega, prompt if weights[2] else None)
    _check_batch(ids, users, pos, neg)
    if weights[2] and prompt is None:
        raise ValueError("prompt: expected a tensor, got None; without one, weights[2] is to be 0")
    arguments = ids, user_features, item_features, users, pos, neg, omega, prompt if weights[2] else None, weights
    sixteen = ids.dtype not in (torch.float32, torch.float64)
    if impl == "cpp" and sixteen:
        raise TypeError(f"ids: expected float32 or float64 for impl='cpp', got {ids.dtype}")
    if impl == "auto" and (sixteen or ids.device.type != "cpu"):
        return composed(*arguments)
    which = backends.resolve("teacher", ids, impl)
    return reference.teacher(*arguments) if which == "reference" else _fused(which, *arguments)


def _fused(which, ids, user_features, item_features, users, pos, neg, omega, prompt, weights) -> tuple[Tensor, Tensor]:
    tables = [None if t is None else dense(t) for t in (ids, user_features, item_features, prompt)]
    need = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tables]
    loss, terms, *_ = call(which, "teacher", *tables, *map(dense, (users, pos, neg, omega)), *weights, *need)
    return loss, terms.detach()


def composed(
    ids, user_features, item_features, users, pos, neg, omega, prompt, weights
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same from torch's ops and `bpr_loss`: any device, any dtype."""
    sizes, count = [len(user_features), len(item_features)], len(omega)
    by_user, by_item = (heads(t, count).contiguous() for t in (user_features, item_features))  # [M, n, d]
    terms: list[Tensor | None] = [None] * 3
    if weights[0]:
        joint = combine(ids, torch.cat([by_user, by_item], 1), omega.to(ids.dtype))
        terms[0] = weights[0] * bpr_loss(*joint.split(sizes), users, pos, neg)
    if weights[1]:
        single = [bpr_loss(u, i, users, pos, neg) for u, i in zip(by_user, by_item, strict=True)]
        terms[1] = weights[1] * torch.stack(single).sum()
    if weights[2]:
        terms[2] = weights[2] * bpr_loss(*prompt.split(sizes), users, pos, neg)
    acc = accumulate_type(ids.dtype)
    zero = ids.new_zeros((), dtype=acc) if any(weights) else ids[:0].sum(dtype=acc)  # still part of the graph
    given = [zero if t is None else t for t in terms]
    return torch.stack(given).sum(), torch.stack(given).detach()


def _check(ids: Tensor, user_features: Tensor, item_features: Tensor, omega: Tensor, prompt: Tensor | None) -> None:
    check_floating(ids, "ids")
    check_rank(ids, "ids", 2)
    check_floating(omega, "omega", ids.dtype)
    check_rank(omega, "omega", 1)
    check_no_grad(omega, "omega")
    if not len(omega):
        raise ValueError("omega: expected at least one modality, got shape (0,)")
    n, d = ids.shape
    for name, t in (("user_features", user_features), ("item_features", item_features)):
        check_floating(t, name, ids.dtype)
        check_rank(t, name, 2)
        check_shape(t, name, (len(t), len(omega) * d))
    if len(user_features) + len(item_features) != n:
        raise ValueError(
            f"ids: expected {len(user_features) + len(item_features)} rows, of user_features and item_features, got {n}"
        )
    if prompt is not None:
        check_floating(prompt, "prompt", ids.dtype)
        check_shape(prompt, "prompt", (n, d))
    others = ("user_features", user_features), ("item_features", item_features), ("omega", omega), ("prompt", prompt)
    check_same_device(("ids", ids), *others)


def _check_batch(ids: Tensor, users: Tensor, pos: Tensor, neg: Tensor) -> None:
    for name, t in (("users", users), ("pos", pos), ("neg", neg)):
        check_index(t, name)
        check_shape(t, name, tuple(users.shape))
    check_same_device(("ids", ids), ("users", users), ("pos", pos), ("neg", neg))


@on_register
def _register(ns: str, ops) -> None:
    if not hasattr(ops, "teacher"):
        return

    def fake(ids, user_features, item_features, prompt, users, pos, neg, omega, *rest):
        tables = ids, user_features, item_features, prompt
        grads = (
            ids.new_empty(t.shape if need and t is not None else (0,))
            for t, need in zip(tables, rest[-4:], strict=True)
        )
        return ids.new_empty(()), ids.new_empty(3), *grads

    torch.library.register_fake(f"{ns}::teacher", fake)
    differentiable_loss(ns, "teacher", (0, 1, 2, 3))
