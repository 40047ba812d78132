"""Embedding KD by scaled cosine error, all modalities in one pass over the student's rows."""

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
    vector,
)
from mmkd.ops._registry import call, differentiable, on_register, refuse_second_derivative


def emb_kd_loss(
    student: Tensor, teachers: Tensor | Sequence[Tensor], *, gamma: float = 2.0,
    modality_weights: Tensor | None = None, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Scaled cosine error between the student's rows and each modality's (paper, Eq. 11).

        sum_m v_m mean_i (1 - cos(e_i, f_i^m))^gamma

    A zero row has cosine 0 and gradient 0.

    Args:
        student: `[n, d]`, float32, float64, bfloat16 or float16.
        teachers: `[M, n, d]`, or M tensors `[n, d]` (these are stacked, one copy), the same dtype; get gradients if they
            ask for them.
        gamma: `>= 1`.
        modality_weights: `[M]`, `v_m`; 1 each if not given, as in the paper (a sum over modalities; `list_kd_loss` takes the
            mean).
        impl: `auto`, `reference`, `cpp`, `cuda` or `triton`.

    Returns:
        Scalar (float32; float64 for float64 rows); 0 where there are no rows.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, range or device (named).
    """
    check_floating(student, "student")
    check_rank(student, "student", 2)
    if not gamma >= 1:
        raise ValueError(f"gamma: expected >= 1, got {gamma}")
    if not isinstance(teachers, Tensor):
        for m, t in enumerate(teachers):
            check_shape(t, f"teachers[{m}]", student.shape)
        teachers = torch.stack(list(teachers)) if len(teachers) else student.new_empty(0, *student.shape)
    if teachers.dim() == 2:
        teachers = teachers.unsqueeze(0)
    check_floating(teachers, "teachers", student.dtype)
    check_shape(teachers, "teachers", (teachers.shape[0], *student.shape))
    check_same_device(("student", student), ("teachers", teachers))
    acc = accumulate_type(student.dtype)
    check_no_grad(modality_weights, "modality_weights")
    v = vector(modality_weights, "modality_weights", teachers.shape[0], acc)
    v = student.new_ones(teachers.shape[0], dtype=acc) if v is None else v
    check_same_device(("student", student), ("modality_weights", v))
    which = backends.resolve("emb_kd", student, impl)
    if which == "reference":
        if student.shape[0] == 0:
            return student.to(acc).sum()
        return reference.emb_kd(student, teachers, gamma, v)
    return call(which, "emb_kd", dense(student), dense(teachers), v, float(gamma), _along(student))[0]


def _along(student: Tensor) -> bool:
    """Whether the student's gradient is to be made with the loss, while its rows and the teachers' are at hand: it is the
    incoming gradient times a constant. Not in 16 bits, where that constant may underflow what a scaled loss would not, and
    not in a compiled graph, which keeps what it saves until its end."""
    eager = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return eager and student.requires_grad and student.dtype in (torch.float32, torch.float64)


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.gamma, _with_grad = inputs
    _, stats, unit = output
    ctx.save_for_backward(*tensors, stats)
    made = unit.dim() == 2 and type(unit) is Tensor  # traced ones take the way of a graph that is kept
    ctx.unit = unit.detach() if made else None  # outside of the graph: nobody else holds it


def _backward(ops):
    def backward(ctx, grad, _grad_stats, _grad_unit):
        need_student, need_teachers = ctx.needs_input_grad[:2]
        # A second pass through a kept graph computes again, and so does one that is itself to be differentiated.
        unit, ctx.unit = (ctx.unit if need_student and not torch.is_grad_enabled() else None), None
        grad_student, grad_teachers = None, None
        if need_teachers or (need_student and unit is None):
            grad_student, grad_teachers = ops.emb_kd_backward(
                grad, *ctx.saved_tensors, ctx.gamma, need_student and unit is None, need_teachers
            )
        if unit is not None:
            grad_student = unit if grad.item() == 1 else unit.mul_(grad)
        return grad_student if need_student else None, grad_teachers if need_teachers else None, None, None, None

    return backward


@on_register
def _register(ns: str, ops) -> None:
    def fake(student, teachers, modality_weights, gamma, with_grad):
        along = with_grad and ns == "mmkd" and student.device.type == "cpu"
        acc = accumulate_type(student.dtype)
        stats = student.new_empty(student.shape[0], 1 + 2 * teachers.shape[0], dtype=acc)
        return student.new_empty((), dtype=acc), stats, student.new_empty(student.shape if along else (0,))

    def fake_backward(grad, student, teachers, modality_weights, stats, gamma, need_student, need_teachers):
        return (
            student.new_empty(student.shape if need_student else (0,)),
            teachers.new_empty(teachers.shape if need_teachers else (0,)),
        )

    torch.library.register_fake(f"{ns}::emb_kd", fake)
    torch.library.register_fake(f"{ns}::emb_kd_backward", fake_backward)
    differentiable(ns, "emb_kd", _backward, _setup, losses=1)
    refuse_second_derivative(f"{ns}::emb_kd_backward")
