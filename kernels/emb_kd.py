"""Embedding KD (scaled cosine error) in Triton (spec section 4): all modalities in one pass over the student's rows."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from mmkd.kernels import launch


@triton.jit
def _power(x, gamma, KIND: tl.constexpr):
    """x^gamma for x >= 0; KIND 0, 1 or 2 is that exponent, -1 any other above 0."""
    if KIND == 0:
        y = tl.zeros_like(x) + 1
    elif KIND == 1:
        y = x
    elif KIND == 2:
        y = x * x
    else:
        y = tl.where(x == 0, 0.0, tl.exp(gamma * tl.log(tl.where(x == 0, 1.0, x))))
    return y


@triton.jit
def _above(x):
    """max(x, 0) that lets NaN through."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def _cosine(ee, ef, ff):
    """cos, 1 / (|e| |f|); both 0 where a vector is zero. NaN stays NaN."""
    dead = (ee == 0) | (ff == 0)
    inverse = tl.where(dead, 0.0, 1 / (tl.sqrt(tl.where(dead, 1.0, ee)) * tl.sqrt(tl.where(dead, 1.0, ff))))
    return ef * inverse, inverse


@triton.jit
def _emb_kd(
    student, teachers, weights, stats, loss, n, d, M, gamma: tl.float64,
    KIND: tl.constexpr, DOUBLE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = row < n
    zero = tl.zeros([BLOCK_N], tl.float64 if DOUBLE else tl.float32)
    width = 1 + 2 * M
    ee = zero
    for start in range(0, d, BLOCK_D):
        columns = (start + tl.arange(0, BLOCK_D))[None, :]
        e = tl.load(student + row[:, None] * d + columns, mask=live[:, None] & (columns < d), other=0.0).to(zero.dtype)
        ee += tl.sum(e * e, 1)
    tl.store(stats + row * width, ee, mask=live)
    total = zero
    for m in range(0, M):
        ef = zero
        ff = zero
        teacher = teachers + (tl.cast(n, tl.int64) * m + row[:, None]) * d
        for start in range(0, d, BLOCK_D):
            columns = (start + tl.arange(0, BLOCK_D))[None, :]
            mask = live[:, None] & (columns < d)
            e = tl.load(student + row[:, None] * d + columns, mask=mask, other=0.0).to(zero.dtype)
            f = tl.load(teacher + columns, mask=mask, other=0.0).to(zero.dtype)
            ef += tl.sum(e * f, 1)
            ff += tl.sum(f * f, 1)
        tl.store(stats + row * width + 1 + 2 * m, ef, mask=live)
        tl.store(stats + row * width + 2 + 2 * m, ff, mask=live)
        cosine, _inverse = _cosine(ee, ef, ff)
        total += tl.load(weights + m) * _power(_above(1 - cosine), tl.full([], gamma, zero.dtype), KIND)
    tl.store(loss + row, total, mask=live)


@triton.jit
def _emb_kd_backward(
    grad, student, teachers, weights, stats, grad_student, grad_teachers, n, d, M, gamma: tl.float64,
    KIND: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = row < n
    columns = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    mask = live[:, None] & (columns < d)
    width = 1 + 2 * M
    ee = tl.load(stats + row * width, mask=live, other=0.0)
    exponent = tl.full([], gamma, ee.dtype)
    scale = -exponent * tl.load(grad) / n
    e = tl.load(student + row[:, None] * d + columns, mask=mask, other=0.0).to(ee.dtype)
    by_e = tl.zeros_like(e)
    for m in range(0, M):
        ef = tl.load(stats + row * width + 1 + 2 * m, mask=live, other=0.0)
        ff = tl.load(stats + row * width + 2 + 2 * m, mask=live, other=0.0)
        cosine, inverse = _cosine(ee, ef, ff)
        slope = scale * tl.load(weights + m) * _power(_above(1 - cosine), exponent - 1, KIND)
        place = (tl.cast(n, tl.int64) * m + row[:, None]) * d + columns
        f = tl.load(teachers + place, mask=mask, other=0.0).to(ee.dtype)
        if grad_student is not None:
            shrink = cosine / tl.where(ee > 0, ee, 1.0)
            by_e += slope[:, None] * (inverse[:, None] * f - shrink[:, None] * e)
        if grad_teachers is not None:
            shrink_f = cosine / tl.where(ff > 0, ff, 1.0)
            by_f = slope[:, None] * (inverse[:, None] * e - shrink_f[:, None] * f)
            tl.store(grad_teachers + place, by_f.to(grad_teachers.dtype.element_ty), mask=mask)
    if grad_student is not None:
        tl.store(grad_student + row[:, None] * d + columns, by_e.to(grad_student.dtype.element_ty), mask=mask)


_SHAPES = [triton.Config({"BLOCK_N": n}, num_warps=w) for n, w in ((16, 4), (8, 2))]
launch.tuned(_emb_kd, _SHAPES, ["d"])
launch.tuned(_emb_kd_backward, _SHAPES, ["d"])


def _kind(exponent: float) -> int:
    return int(exponent) if exponent in (0.0, 1.0, 2.0) else -1


def emb_kd(
    student: Tensor, teachers: Tensor, modality_weights: Tensor, gamma: float, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`sum_m v_m mean_i (1 - cos)^gamma`, and per row `|e|^2, then (e.f, |f|^2)` of each modality for the backward.

    The gradient is left to the way back, whether asked for along or not: the third is empty.
    """
    n, d = student.shape
    stats = student.new_empty(n, 1 + 2 * teachers.shape[0], dtype=launch.accumulate_type(student.dtype))
    loss = stats.new_empty(n)
    if n:
        kernel = launch.choose(_emb_kd)
        wrap_triton(kernel)[lambda meta: (triton.cdiv(n, meta["BLOCK_N"]),)](
            student, teachers, modality_weights, stats, loss, n, d, teachers.shape[0], gamma,
            KIND=_kind(gamma), DOUBLE=stats.dtype == torch.float64, BLOCK_D=launch.column_block(student),
        )  # fmt: skip
    return loss.sum() / max(1, n), stats, student.new_empty(0)


def emb_kd_backward(
    grad: Tensor,
    student: Tensor,
    teachers: Tensor,
    modality_weights: Tensor,
    stats: Tensor,
    gamma: float,
    need_student: bool,
    need_teachers: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the student's and the teachers' rows; what is not needed comes back empty."""
    n, d = student.shape
    by_student = torch.empty_like(student) if need_student else None
    by_teachers = torch.empty_like(teachers) if need_teachers else None
    if n and d:
        block_d = launch.column_block(student)
        kernel = launch.choose(_emb_kd_backward)
        wrap_triton(kernel)[lambda meta: (triton.cdiv(n, meta["BLOCK_N"]), triton.cdiv(d, block_d))](
            grad, student, teachers, modality_weights, stats, by_student, by_teachers, n, d, teachers.shape[0], gamma,
            KIND=_kind(gamma - 1), BLOCK_D=block_d,
        )  # fmt: skip
    nothing = student.new_empty(0)
    return nothing if by_student is None else by_student, nothing.clone() if by_teachers is None else by_teachers
