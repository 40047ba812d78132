"""BPR and pairwise KD in Triton (spec section 4): gather, score and loss in one pass, gradients into the tables."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from mmkd.kernels import launch
from mmkd.kernels.maths import logistic, pair_kd
from mmkd.kernels.scatter import atomic_target, finished, scatter_rows


@triton.jit
def _losses(x, b, live, teacher, bpr, pair, tau, BERNOULLI: tl.constexpr):
    """Writes the two losses of samples b; x: their margins."""
    _p, _q, log_p, _log_q = logistic(x)
    tl.store(bpr + b, -log_p, mask=live)
    if teacher is not None:
        temperature = tl.full([], tau, x.dtype)
        t = tl.load(teacher + b, mask=live, other=0.0) / temperature
        kl, _by_s, _by_t = pair_kd(t, x / temperature, BERNOULLI)
        tl.store(pair + b, temperature * temperature * kl, mask=live)


@triton.jit
def _slopes(x, b, live, teacher, grad_bpr, grad_pair, tau, count, BERNOULLI: tl.constexpr):
    """Gradients of the weighted sum of both mean losses by the student's and the teacher's margin."""
    _p, q, _log_p, _log_q = logistic(x)
    by_student = -q * (tl.load(grad_bpr) / count)
    by_teacher = tl.zeros_like(x)
    if teacher is not None:
        temperature = tl.full([], tau, x.dtype)
        t = tl.load(teacher + b, mask=live, other=0.0) / temperature
        _kl, by_s, by_t = pair_kd(t, x / temperature, BERNOULLI)
        scale = tl.load(grad_pair) * temperature / count
        by_student += scale * by_s
        by_teacher = scale * by_t
    return by_student, by_teacher


@triton.jit
def _bpr_kd(
    user_emb, item_emb, users, pos, neg, teacher, bpr, pair, margin, B, d, tau: tl.float64,
    BERNOULLI: tl.constexpr, DOUBLE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    live = b < B
    u = tl.load(users + b, mask=live, other=0)[:, None] * d
    p = tl.load(pos + b, mask=live, other=0)[:, None] * d
    n = tl.load(neg + b, mask=live, other=0)[:, None] * d
    x = tl.zeros([BLOCK_B], tl.float64 if DOUBLE else tl.float32)
    for start in range(0, d, BLOCK_D):
        columns = (start + tl.arange(0, BLOCK_D))[None, :]
        mask = live[:, None] & (columns < d)
        rise = tl.load(item_emb + p + columns, mask=mask, other=0.0).to(x.dtype)
        rise -= tl.load(item_emb + n + columns, mask=mask, other=0.0).to(x.dtype)
        x += tl.sum(tl.load(user_emb + u + columns, mask=mask, other=0.0).to(x.dtype) * rise, 1)
    tl.store(margin + b, x, mask=live)
    _losses(x, b, live, teacher, bpr, pair, tau, BERNOULLI)


@triton.jit
def _bpr_kd_scatter(
    grad_bpr, grad_pair, user_emb, item_emb, users, pos, neg, margin, teacher, grad_user, grad_item, grad_teacher,
    B, d, tau: tl.float64,
    BERNOULLI: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    live = b < B
    x = tl.load(margin + b, mask=live, other=0.0)
    g, by_teacher = _slopes(x, b, live, teacher, grad_bpr, grad_pair, tau, B, BERNOULLI)
    if grad_teacher is not None:
        tl.store(grad_teacher + b, by_teacher, mask=live)
    u = tl.load(users + b, mask=live, other=0)[:, None] * d
    p = tl.load(pos + b, mask=live, other=0)[:, None] * d
    n = tl.load(neg + b, mask=live, other=0)[:, None] * d
    for start in range(0, d, BLOCK_D):
        columns = (start + tl.arange(0, BLOCK_D))[None, :]
        mask = live[:, None] & (columns < d)
        if grad_user is not None:
            rise = tl.load(item_emb + p + columns, mask=mask, other=0.0).to(x.dtype)
            rise -= tl.load(item_emb + n + columns, mask=mask, other=0.0).to(x.dtype)
            tl.atomic_add(grad_user + u + columns, g[:, None] * rise, mask=mask, sem="relaxed")
        if grad_item is not None:
            e = g[:, None] * tl.load(user_emb + u + columns, mask=mask, other=0.0).to(x.dtype)
            tl.atomic_add(grad_item + p + columns, e, mask=mask, sem="relaxed")
            tl.atomic_add(grad_item + n + columns, -e, mask=mask, sem="relaxed")


@triton.jit
def _bpr_kd_scores(
    margin, teacher, bpr, pair, B, tau: tl.float64, BERNOULLI: tl.constexpr, BLOCK_B: tl.constexpr
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    live = b < B
    _losses(tl.load(margin + b, mask=live, other=0.0), b, live, teacher, bpr, pair, tau, BERNOULLI)


@triton.jit
def _bpr_kd_slopes(
    grad_bpr, grad_pair, margin, teacher, grad_margin, grad_teacher, B, tau: tl.float64,
    BERNOULLI: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    live = b < B
    x = tl.load(margin + b, mask=live, other=0.0)
    by_student, by_teacher = _slopes(x, b, live, teacher, grad_bpr, grad_pair, tau, B, BERNOULLI)
    if grad_margin is not None:
        tl.store(grad_margin + b, by_student, mask=live)
    if grad_teacher is not None:
        tl.store(grad_teacher + b, by_teacher, mask=live)


# A scatter is not searched for: every trial would add to the gradients once more.
launch.tuned(_bpr_kd, [triton.Config({"BLOCK_B": b}, num_warps=w) for b, w in ((8, 2), (16, 4))], ["d"])
launch.tuned(_bpr_kd_scatter, [triton.Config({"BLOCK_B": 8}, num_warps=2)], [])
launch.tuned(_bpr_kd_scores, [triton.Config({"BLOCK_B": 256}, num_warps=4)], [])
launch.tuned(_bpr_kd_slopes, [triton.Config({"BLOCK_B": 256}, num_warps=4)], [])


def _grid(count: int):
    return lambda meta: (triton.cdiv(count, meta["BLOCK_B"]),)


def _means(bpr: Tensor, pair: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    return bpr.sum() / max(1, count), bpr.new_zeros(()) if pair is None else pair.sum() / max(1, count)


def bpr_kd(
    user_emb: Tensor,
    item_emb: Tensor,
    users: Tensor,
    pos: Tensor,
    neg: Tensor,
    teacher_margin: Tensor | None,
    tau: float,
    bernoulli: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Both mean losses and the margins `[B]`."""
    for name, index, table in (("users", users, user_emb), ("pos", pos, item_emb), ("neg", neg, item_emb)):
        launch.check_index(index, table.shape[0], name)
    count, d = users.numel(), user_emb.shape[1]
    margin = user_emb.new_empty(count, dtype=launch.accumulate_type(user_emb.dtype))
    bpr = torch.empty_like(margin)
    pair = None if teacher_margin is None else torch.empty_like(margin)
    if count:
        kernel = launch.choose(_bpr_kd)
        wrap_triton(kernel)[_grid(count)](
            user_emb, item_emb, users, pos, neg, teacher_margin, bpr, pair, margin, count, d, tau,
            BERNOULLI=bernoulli, DOUBLE=margin.dtype == torch.float64, BLOCK_D=launch.column_block(user_emb),
        )  # fmt: skip
    return *_means(bpr, pair, count), margin


def bpr_kd_backward(
    grad_bpr: Tensor,
    grad_pair: Tensor,
    user_emb: Tensor,
    item_emb: Tensor,
    users: Tensor,
    pos: Tensor,
    neg: Tensor,
    margin: Tensor,
    teacher_margin: Tensor | None,
    tau: float,
    bernoulli: bool,
    need_user: bool,
    need_item: bool,
    need_teacher: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the tables and of the teacher's margins; what is not needed comes back empty."""
    if torch.are_deterministic_algorithms_enabled():
        by_student, by_teacher = bpr_kd_scores_backward(
            grad_bpr, grad_pair, margin, teacher_margin, tau, bernoulli, True, need_teacher
        )
        weight, items, twice = torch.cat([by_student, -by_student]), torch.cat([pos, neg]), torch.cat([users, users])
        return (
            scatter_rows(user_emb, twice, items, weight, item_emb) if need_user else user_emb.new_empty(0),
            scatter_rows(item_emb, items, twice, weight, user_emb) if need_item else item_emb.new_empty(0),
            by_teacher,
        )
    count, d = users.numel(), user_emb.shape[1]
    grad_user, grad_item = atomic_target(user_emb, need_user), atomic_target(item_emb, need_item)
    grad_teacher = torch.zeros_like(margin) if need_teacher else None
    if count:
        kernel = launch.choose(_bpr_kd_scatter)
        wrap_triton(kernel)[_grid(count)](
            grad_bpr, grad_pair, user_emb, item_emb, users, pos, neg, margin, teacher_margin,
            grad_user, grad_item, grad_teacher, count, d, tau,
            BERNOULLI=bernoulli, BLOCK_D=launch.block(d, 16, 64),
        )  # fmt: skip
    grad_teacher = margin.new_empty(0) if grad_teacher is None else grad_teacher
    return finished(grad_user, user_emb), finished(grad_item, item_emb), grad_teacher


def bpr_kd_scores(margin: Tensor, teacher_margin: Tensor | None, tau: float, bernoulli: bool) -> tuple[Tensor, Tensor]:
    """Both mean losses of margins that are already there."""
    count = margin.numel()
    bpr = torch.empty_like(margin)
    pair = None if teacher_margin is None else torch.empty_like(margin)
    if count:
        kernel = launch.choose(_bpr_kd_scores)
        wrap_triton(kernel)[_grid(count)](margin, teacher_margin, bpr, pair, count, tau, BERNOULLI=bernoulli)
    return _means(bpr, pair, count)


def bpr_kd_scores_backward(
    grad_bpr: Tensor,
    grad_pair: Tensor,
    margin: Tensor,
    teacher_margin: Tensor | None,
    tau: float,
    bernoulli: bool,
    need_student: bool,
    need_teacher: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the student's and the teacher's margins."""
    count = margin.numel()
    by_student = torch.empty_like(margin) if need_student else None
    by_teacher = torch.empty_like(margin) if need_teacher else None
    if count:
        kernel = launch.choose(_bpr_kd_slopes)
        wrap_triton(kernel)[_grid(count)](
            grad_bpr, grad_pair, margin, teacher_margin, by_student, by_teacher, count, tau, BERNOULLI=bernoulli
        )
    nothing = margin.new_empty(0)
    return nothing if by_student is None else by_student, nothing.clone() if by_teacher is None else by_teacher
