"""List scores and disentangled list-wise KD: the gathered `[B, K, d]` tensor never exists."""

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
    check_tables,
    dense,
    vector,
)
from mmkd.ops._registry import call, differentiable, on_register, refuse_second_derivative

WEIGHTS = ("coupled", "decoupled")


def list_scores(user_emb: Tensor, item_emb: Tensor, users: Tensor, candidates: Tensor, *, impl: str = "auto") -> Tensor:
    """`s_bk = e_{u_b} . e_{c_bk}`: the logits of paper Eq. 6-7, differentiable in both tables.

    Args:
        user_emb: `[U, d]`. item_emb: `[I, d]`, the same dtype: float32, float64, bfloat16 or float16.
        users: int64 `[B]`. candidates: int64 `[B, K]`, rows of `item_emb`; repeats allowed.
        impl: `auto`, `reference`, `cpp`, `cuda` or `triton`.

    Returns:
        `[B, K]`, float32 (float64 for float64 tables).

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device (named). RuntimeError: an index out of range.
    """
    _check_lists(user_emb, item_emb, users, candidates)
    which = backends.resolve("list_kd", user_emb, impl)
    if which == "reference":
        return reference.list_scores(user_emb, item_emb, users, candidates)
    return call(which, "list_scores", dense(user_emb), dense(item_emb), dense(users), dense(candidates))


def list_kd_loss(
    user_emb: Tensor,
    item_emb: Tensor,
    users: Tensor,
    candidates: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    tau: float = 1.0,
    weight: str = "coupled",
    modality_weights: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Disentangled, re-weighted list-wise KD (paper, Eq. 6-10; spec section 4).

        sum_m w_m tau^2 mean_b[ alpha KL(b^T || b^S) + beta w KL(q^T || q^S) ]

    with logits / tau, `b+ = softmax_0`, `q = softmax over 1..K-1`, `w = 1 - b+^T` (`weight="coupled"`) or 1 (`"decoupled"`).
    `alpha = beta = 1`, coupled, is the ordinary `KL(softmax t || softmax s)`.

    Args:
        user_emb, item_emb, users, candidates: as `list_scores`; `candidates[:, 0]` is the observed item, `K >= 2`.
        teacher_logits: `[M, B, K]` or `[B, K]`; gets a gradient if it asks for one.
        modality_weights: `[M]`, `w_m`; `1/M` each if not given.
        impl: `auto`, `reference`, `cpp`, `cuda` or `triton`.

    Returns:
        Scalar (float32; float64 for float64 tables); 0 for an empty batch.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, range or device (named). RuntimeError: an index out
        of range.
    """
    _check_lists(user_emb, item_emb, users, candidates)
    teacher_logits, w = _check_kd(
        user_emb, candidates.shape, teacher_logits, alpha, beta, tau, weight, modality_weights
    )
    which = backends.resolve("list_kd", user_emb, impl)
    if which == "reference":
        scores = reference.list_scores(user_emb, item_emb, users, candidates)
        return _reference(scores, teacher_logits, alpha, beta, tau, weight, w)
    tables = (dense(user_emb), dense(item_emb), dense(users), dense(candidates))
    return call(
        which, "list_kd", *tables, teacher_logits, w, float(alpha), float(beta), float(tau), weight == "coupled"
    )[0]


def list_kd_from_scores(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    tau: float = 1.0,
    weight: str = "coupled",
    modality_weights: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """`list_kd_loss` of student logits `[B, K]` that are already there."""
    check_floating(student_logits, "student_logits")
    check_rank(student_logits, "student_logits", 2)
    teacher_logits, w = _check_kd(
        student_logits, student_logits.shape, teacher_logits, alpha, beta, tau, weight, modality_weights
    )
    which = backends.resolve("list_kd", student_logits, impl)
    if which == "reference":
        return _reference(student_logits, teacher_logits, alpha, beta, tau, weight, w)
    student = dense(student_logits.to(accumulate_type(student_logits.dtype)))
    return call(
        which, "list_kd_scores", student, teacher_logits, w, float(alpha), float(beta), float(tau), weight == "coupled"
    )


def _reference(scores, teacher_logits, alpha, beta, tau, weight, w) -> Tensor:
    if scores.shape[0] == 0:  # the mean over nothing is 0 here, and still part of the graph
        return scores.to(accumulate_type(scores.dtype)).sum()
    return reference.list_kd(scores, teacher_logits, alpha, beta, tau, weight, w)


def _check_lists(user_emb, item_emb, users, candidates) -> None:
    check_tables(user_emb, item_emb)
    check_index(users, "users")
    check_index(candidates, "candidates", rank=2)
    if candidates.shape[0] != users.shape[0]:
        raise ValueError(f"candidates: expected {users.shape[0]} rows like users, got shape {tuple(candidates.shape)}")
    check_same_device(("user_emb", user_emb), ("item_emb", item_emb), ("users", users), ("candidates", candidates))


def _check_kd(like, shape, teacher_logits, alpha, beta, tau, weight, modality_weights) -> tuple[Tensor, Tensor]:
    if weight not in WEIGHTS:
        raise ValueError(f"weight: expected one of {', '.join(WEIGHTS)}, got {weight!r}")
    if not tau > 0:
        raise ValueError(f"tau: expected > 0, got {tau}")
    for name, number in (("alpha", alpha), ("beta", beta)):
        if number < 0:
            raise ValueError(f"{name}: expected >= 0, got {number}")
    if shape[1] < 2:
        raise ValueError(
            f"candidates: expected K >= 2 (the observed item and at least one negative), got K = {shape[1]}"
        )
    check_floating(teacher_logits, "teacher_logits")
    if teacher_logits.dim() == 2:
        teacher_logits = teacher_logits.unsqueeze(0)
    check_rank(teacher_logits, "teacher_logits", 3)
    check_shape(teacher_logits, "teacher_logits", (teacher_logits.shape[0], *shape))
    check_same_device(("the student", like), ("teacher_logits", teacher_logits))
    acc, num_modalities = accumulate_type(like.dtype), teacher_logits.shape[0]
    check_no_grad(modality_weights, "modality_weights")
    w = vector(modality_weights, "modality_weights", num_modalities, acc)
    if w is None:
        w = like.new_full((num_modalities,), 1.0 / max(1, num_modalities), dtype=acc)
    check_same_device(("the student", like), ("modality_weights", w))
    return dense(teacher_logits.to(acc)), w


def _scores_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _scores_backward(ops):
    def backward(ctx, grad):
        need_user, need_item = ctx.needs_input_grad[:2]
        grad_user, grad_item = ops.list_scores_backward(grad.contiguous(), *ctx.saved_tensors, need_user, need_item)
        return grad_user if need_user else None, grad_item if need_item else None, None, None

    return backward


def _kd_setup(ctx, inputs, output) -> None:
    *tensors, ctx.alpha, ctx.beta, ctx.tau, ctx.coupled = inputs
    ctx.save_for_backward(*tensors, output[1])


def _kd_backward(ops):
    def backward(ctx, grad, _grad_logits):
        *tensors, logits = ctx.saved_tensors
        need_user, need_item, _, _, need_teacher = ctx.needs_input_grad[:5]
        grad_user, grad_item, grad_teacher = ops.list_kd_backward(
            grad, *tensors, logits, ctx.alpha, ctx.beta, ctx.tau, ctx.coupled, need_user, need_item, need_teacher
        )
        return (
            grad_user if need_user else None, grad_item if need_item else None, None, None,
            grad_teacher if need_teacher else None, None, None, None, None, None,
        )  # fmt: skip

    return backward


def _kd_scores_setup(ctx, inputs, output) -> None:
    *tensors, ctx.alpha, ctx.beta, ctx.tau, ctx.coupled = inputs
    ctx.save_for_backward(*tensors)


def _kd_scores_backward(ops):
    def backward(ctx, grad):
        need_student, need_teacher = ctx.needs_input_grad[:2]
        grad_student, grad_teacher = ops.list_kd_scores_backward(
            grad, *ctx.saved_tensors, ctx.alpha, ctx.beta, ctx.tau, ctx.coupled, need_student, need_teacher
        )
        return (
            grad_student if need_student else None, grad_teacher if need_teacher else None, None, None, None, None, None,
        )  # fmt: skip

    return backward


@on_register
def _register(ns: str, ops) -> None:
    def wanted(t: Tensor, need: bool) -> Tensor:
        return t.new_empty(t.shape if need else (0,))

    def fake_scores(user_emb, item_emb, users, candidates):
        return user_emb.new_empty(candidates.shape, dtype=accumulate_type(user_emb.dtype))

    def fake_kd(user_emb, item_emb, users, candidates, teacher, w, alpha, beta, tau, coupled):
        return teacher.new_empty(()), fake_scores(user_emb, item_emb, users, candidates)

    def fake_kd_backward(
        grad, user_emb, item_emb, users, candidates, teacher, w, logits, alpha, beta, tau, c, nu, ni, nt
    ):
        return wanted(user_emb, nu), wanted(item_emb, ni), wanted(teacher, nt)

    library = torch.library
    library.register_fake(f"{ns}::list_scores", fake_scores)
    library.register_fake(
        f"{ns}::list_scores_backward", lambda grad, ue, ie, u, c, nu, ni: (wanted(ue, nu), wanted(ie, ni))
    )
    library.register_fake(f"{ns}::list_kd", fake_kd)
    library.register_fake(f"{ns}::list_kd_backward", fake_kd_backward)
    library.register_fake(f"{ns}::list_kd_scores", lambda s, t, *_: s.new_empty(()))
    library.register_fake(
        f"{ns}::list_kd_scores_backward",
        lambda grad, s, t, w, alpha, beta, tau, c, need_s, need_t: (wanted(s, need_s), wanted(t, need_t)),
    )
    differentiable(ns, "list_scores", _scores_backward, _scores_setup)
    differentiable(ns, "list_kd", _kd_backward, _kd_setup, losses=1)
    differentiable(ns, "list_kd_scores", _kd_scores_backward, _kd_scores_setup)
    for name in ("list_kd_backward", "list_scores_backward", "list_kd_scores_backward"):
        refuse_second_derivative(f"{ns}::{name}")
