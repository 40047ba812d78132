"""BPR and pairwise ranking KD in one pass: gather, score, loss; gradients straight into the tables."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkd import backends, reference
from mmkd.ops._checks import (
    accumulate_type,
    check_floating,
    check_index,
    check_rank,
    check_same_device,
    check_shape,
    check_tables,
    dense,
)
from mmkd.ops._registry import call, differentiable, on_register, refuse_second_derivative

KINDS = ("bernoulli", "positive")


def bpr_loss(
    user_emb: Tensor, item_emb: Tensor, users: Tensor, pos: Tensor, neg: Tensor, *, impl: str = "auto"
) -> Tensor:
    """Bayesian personalised ranking, `-mean_b log sigmoid(x_b)`, `x_b = e_u.e_pos - e_u.e_neg` (paper, Eq. 13).

    Args:
        user_emb: `[U, d]`. item_emb: `[I, d]`, the same dtype: float32, float64, bfloat16 or float16.
        users, pos, neg: int64 `[B]`, rows of the tables; repeats allowed.
        impl: `auto`, `reference`, `cpp`, `cuda` or `triton`.

    Returns:
        Scalar (float32; float64 for float64 tables); 0 for an empty batch. Gradients go to both tables.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device (named). RuntimeError: an index out of range.
    """
    return _bpr_kd(user_emb, item_emb, users, pos, neg, None, 1.0, "bernoulli", impl)[0]


def pair_kd_loss(
    user_emb: Tensor,
    item_emb: Tensor,
    users: Tensor,
    pos: Tensor,
    neg: Tensor,
    teacher_margin: Tensor,
    *,
    tau: float = 1.0,
    kind: str = "bernoulli",
    impl: str = "auto",
) -> Tensor:
    """Pairwise ranking KD (paper, Eq. 5, read as in spec section 4), with `p^T = sigmoid(x^T/tau)`, `ls = log sigmoid`:

        tau^2 mean[ p^T (ls(x^T/tau) - ls(x^S/tau)) + (1 - p^T) (ls(-x^T/tau) - ls(-x^S/tau)) ]

    `kind="positive"` keeps the first term only. Arguments as `bpr_loss`, and:
        teacher_margin: `[B]`, the teacher's `x^T`; gets a gradient if it asks for one.
        tau: temperature > 0.
    """
    return _bpr_kd(user_emb, item_emb, users, pos, neg, teacher_margin, tau, kind, impl)[1]


def bpr_pair_kd_loss(
    user_emb: Tensor,
    item_emb: Tensor,
    users: Tensor,
    pos: Tensor,
    neg: Tensor,
    teacher_margin: Tensor,
    *,
    tau: float = 1.0,
    kind: str = "bernoulli",
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`(bpr_loss, pair_kd_loss)` of the same batch in one pass over the gathered rows; arguments as `pair_kd_loss`."""
    return _bpr_kd(user_emb, item_emb, users, pos, neg, teacher_margin, tau, kind, impl)


def bpr_kd_from_scores(
    margin: Tensor,
    teacher_margin: Tensor | None = None,
    *,
    tau: float = 1.0,
    kind: str = "bernoulli",
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`(bpr, pair_kd)` of margins `x = score_pos - score_neg` `[B]` that are already there; `pair_kd` is 0 without a teacher."""
    check_floating(margin, "margin")
    check_rank(margin, "margin", 1)
    teacher_margin = _check_teacher(margin, teacher_margin, margin.shape[0], tau, kind)
    which = backends.resolve("bpr_kd", margin, impl)
    if which == "reference":
        return _reference(margin, teacher_margin, tau, kind)
    margin = dense(margin.to(accumulate_type(margin.dtype)))
    return call(which, "bpr_kd_scores", margin, teacher_margin, float(tau), kind == "bernoulli")


def _check_teacher(like: Tensor, teacher_margin: Tensor | None, size: int, tau: float, kind: str) -> Tensor | None:
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if not tau > 0:
        raise ValueError(f"tau: expected > 0, got {tau}")
    if teacher_margin is None:
        return None
    check_floating(teacher_margin, "teacher_margin")
    check_shape(teacher_margin, "teacher_margin", (size,))
    check_same_device(("the student", like), ("teacher_margin", teacher_margin))
    return dense(teacher_margin.to(accumulate_type(like.dtype)))


def _reference(margin: Tensor, teacher_margin: Tensor | None, tau: float, kind: str) -> tuple[Tensor, Tensor]:
    if margin.numel() == 0:  # the mean over nothing is 0 here, and still part of the graph
        zero = margin.to(accumulate_type(margin.dtype)).sum()
        return zero, zero
    bpr = reference.bpr(margin)
    return bpr, bpr.new_zeros(()) if teacher_margin is None else reference.pair_kd(margin, teacher_margin, tau, kind)


def _bpr_kd(user_emb, item_emb, users, pos, neg, teacher_margin, tau, kind, impl) -> tuple[Tensor, Tensor]:
    check_tables(user_emb, item_emb)
    for name, index in (("users", users), ("pos", pos), ("neg", neg)):
        check_index(index, name)
        check_shape(index, name, users.shape)
        check_same_device(("user_emb", user_emb), (name, index))
    check_same_device(("user_emb", user_emb), ("item_emb", item_emb))
    teacher_margin = _check_teacher(user_emb, teacher_margin, users.shape[0], tau, kind)
    which = backends.resolve("bpr_kd", user_emb, impl)
    if which == "reference":
        return _reference(reference.margins(user_emb, item_emb, users, pos, neg), teacher_margin, tau, kind)
    bpr, pair, _ = call(
        which,
        "bpr_kd",
        dense(user_emb),
        dense(item_emb),
        dense(users),
        dense(pos),
        dense(neg),
        teacher_margin,
        float(tau),
        kind == "bernoulli",
    )
    return bpr, pair


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.tau, ctx.bernoulli = inputs
    ctx.save_for_backward(*tensors, output[2])


def _backward(ops):
    def backward(ctx, grad_bpr, grad_pair, _grad_margin):
        user_emb, item_emb, users, pos, neg, teacher, margin = ctx.saved_tensors
        need_user, need_item, *_, need_teacher, _, _ = ctx.needs_input_grad
        grad_user, grad_item, grad_teacher = ops.bpr_kd_backward(
            grad_bpr, grad_pair, user_emb, item_emb, users, pos, neg, margin, teacher, ctx.tau, ctx.bernoulli,
            need_user, need_item, need_teacher,
        )  # fmt: skip
        return (
            grad_user if need_user else None, grad_item if need_item else None, None, None, None,
            grad_teacher if need_teacher else None, None, None,
        )  # fmt: skip

    return backward


def _scores_setup(ctx, inputs, output) -> None:
    margin, teacher, ctx.tau, ctx.bernoulli = inputs
    ctx.save_for_backward(margin, teacher)


def _scores_backward(ops):
    def backward(ctx, grad_bpr, grad_pair):
        margin, teacher = ctx.saved_tensors
        need_student, need_teacher = ctx.needs_input_grad[:2]
        grad, grad_teacher = ops.bpr_kd_scores_backward(
            grad_bpr, grad_pair, margin, teacher, ctx.tau, ctx.bernoulli, need_student, need_teacher
        )
        return grad if need_student else None, grad_teacher if need_teacher else None, None, None

    return backward


@on_register
def _register(ns: str, ops) -> None:
    def wanted(t: Tensor, need: bool, dtype: torch.dtype | None = None) -> Tensor:
        return t.new_empty(t.shape if need else (0,), dtype=dtype)

    def fake(user_emb, item_emb, users, pos, neg, teacher, tau, bernoulli):
        acc = accumulate_type(user_emb.dtype)
        return (
            user_emb.new_empty((), dtype=acc),
            user_emb.new_empty((), dtype=acc),
            user_emb.new_empty(users.shape, dtype=acc),
        )

    def fake_backward(gb, gp, user_emb, item_emb, users, pos, neg, margin, teacher, tau, bernoulli, nu, ni, nt):
        return wanted(user_emb, nu), wanted(item_emb, ni), wanted(margin, nt)

    library = torch.library
    library.register_fake(f"{ns}::bpr_kd", fake)
    library.register_fake(f"{ns}::bpr_kd_backward", fake_backward)
    library.register_fake(f"{ns}::bpr_kd_scores", lambda m, t, tau, b: (m.new_empty(()), m.new_empty(())))
    library.register_fake(
        f"{ns}::bpr_kd_scores_backward", lambda gb, gp, m, t, tau, b, ns_, nt: (wanted(m, ns_), wanted(m, nt))
    )
    differentiable(ns, "bpr_kd", _backward, _setup, losses=2)
    differentiable(ns, "bpr_kd_scores", _scores_backward, _scores_setup)
    for name in ("bpr_kd_backward", "bpr_kd_scores_backward"):
        refuse_second_derivative(f"{ns}::{name}")
