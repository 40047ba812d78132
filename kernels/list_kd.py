"""List scores and disentangled list-wise KD in Triton (spec section 4); the gathered `[B, K, d]` never exists.

One program is one list: its K logits stay in registers from the dot products to the loss and, in the backward, to the
gradients. Lists longer than MAX_FUSED are scored and judged by two launches.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from mmkd.kernels import launch
from mmkd.kernels.maths import kl_bernoulli, logistic
from mmkd.kernels.scatter import atomic_target, finished, scatter_rows

MAX_FUSED = 64
MAX_LIST = 4096  # what the registers of one program hold


@triton.jit
def _scores(user_emb, item_emb, u, c, live, d, DOUBLE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """`[BLOCK_K]` inner products of row u with rows c."""
    s = tl.zeros([BLOCK_K], tl.float64 if DOUBLE else tl.float32)
    for start in range(0, d, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        live_d = columns < d
        e = tl.load(user_emb + u * d + columns, mask=live_d, other=0.0).to(s.dtype)
        f = tl.load(item_emb + c[:, None] * d + columns[None, :], mask=live[:, None] & live_d[None, :], other=0.0)
        s += tl.sum(e[None, :] * f.to(s.dtype), 1)
    return s


@triton.jit
def _split(z, k, K):
    """Margin of entry 0 over the log-sum-exp of the others, and the others' log-softmax."""
    other = (k > 0) & (k < K)
    top = tl.sum(tl.where(k == 0, z, 0.0), 0)
    peak = tl.max(tl.where(other, z, float("-inf")), 0)
    rest = peak + tl.log(tl.sum(tl.where(other, tl.exp(tl.where(other, z - peak, 0.0)), 0.0), 0))
    return top - rest, tl.where(other, z - rest, 0.0)


@triton.jit
def _loss(s, b, B, k, K, M, teacher, weights, alpha, beta, tau, COUPLED: tl.constexpr):
    """Sum over modalities of one list's weighted loss; s: raw student logits."""
    temperature, a, bt = tl.full([], tau, s.dtype), tl.full([], alpha, s.dtype), tl.full([], beta, s.dtype)
    live = k < K
    s_margin, s_logq = _split(s / temperature, k, K)
    loss = tl.sum(tl.zeros_like(s), 0)
    for m in range(0, M):
        t = tl.load(teacher + (tl.cast(B, tl.int64) * m + b) * K + k, mask=live, other=0.0)
        t_margin, t_logq = _split(t / temperature, k, K)
        other = (k > 0) & live
        kl_q = tl.sum(tl.where(other, tl.exp(t_logq) * (t_logq - s_logq), 0.0), 0)
        kl_b, _by_s, _by_t = kl_bernoulli(t_margin, s_margin)
        if COUPLED:
            _p, q, _log_p, _log_q = logistic(t_margin)
            kl_q = q * kl_q
        loss += tl.load(weights + m) * (a * kl_b + bt * kl_q)
    return temperature * temperature * loss


@triton.jit
def _slopes(
    s, b, B, k, K, M, teacher, weights, scale, alpha, beta, tau, grad_teacher, COUPLED: tl.constexpr
):  # fmt: skip
    """Gradient of `scale * loss` by the raw student logits, `[BLOCK_K]`; the teacher's is stored."""
    temperature, a, bt = tl.full([], tau, s.dtype), tl.full([], alpha, s.dtype), tl.full([], beta, s.dtype)
    live = k < K
    other = (k > 0) & live
    s_margin, s_logq = _split(s / temperature, k, K)
    s_q = tl.where(other, tl.exp(s_logq), 0.0)
    grad = tl.zeros_like(s)
    for m in range(0, M):
        place = (tl.cast(B, tl.int64) * m + b) * K + k
        t_margin, t_logq = _split(tl.load(teacher + place, mask=live, other=0.0) / temperature, k, K)
        t_q = tl.where(other, tl.exp(t_logq), 0.0)
        _kl_b, by_s, by_t = kl_bernoulli(t_margin, s_margin)
        p, q, _log_p, _log_q = logistic(t_margin)
        spread = bt
        if COUPLED:
            spread = bt * q
        w = tl.load(weights + m) * scale * temperature
        grad += w * tl.where(k == 0, a * by_s, spread * (s_q - t_q) - a * by_s * s_q)
        if grad_teacher is not None:
            rise = t_logq - s_logq
            kl_q = tl.sum(t_q * rise, 0)
            top = a * by_t
            if COUPLED:
                top -= bt * p * q * kl_q
            tl.store(grad_teacher + place, w * tl.where(k == 0, top, t_q * (spread * (rise - kl_q) - top)), mask=live)
    return grad


@triton.jit
def _list_scores(
    user_emb, item_emb, users, candidates, logits, K, d,
    DOUBLE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    live = k < K
    c = tl.load(candidates + b * K + k, mask=live, other=0)
    s = _scores(user_emb, item_emb, tl.load(users + b), c, live, d, DOUBLE, BLOCK_K, BLOCK_D)
    tl.store(logits + b * K + k, s, mask=live)


@triton.jit
def _list_kd(
    user_emb, item_emb, users, candidates, teacher, weights, logits, loss, B, K, M, d,
    alpha: tl.float64, beta: tl.float64, tau: tl.float64,
    COUPLED: tl.constexpr, DOUBLE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    live = k < K
    c = tl.load(candidates + b * K + k, mask=live, other=0)
    s = _scores(user_emb, item_emb, tl.load(users + b), c, live, d, DOUBLE, BLOCK_K, BLOCK_D)
    tl.store(logits + b * K + k, s, mask=live)
    tl.store(loss + b, _loss(s, b, B, k, K, M, teacher, weights, alpha, beta, tau, COUPLED))


@triton.jit
def _list_kd_scores(
    student, teacher, weights, loss, B, K, M, alpha: tl.float64, beta: tl.float64, tau: tl.float64,
    COUPLED: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    s = tl.load(student + b * K + k, mask=k < K, other=0.0)
    tl.store(loss + b, _loss(s, b, B, k, K, M, teacher, weights, alpha, beta, tau, COUPLED))


@triton.jit
def _list_kd_slopes(
    grad, student, teacher, weights, grad_student, grad_teacher, B, K, M,
    alpha: tl.float64, beta: tl.float64, tau: tl.float64,
    COUPLED: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    s = tl.load(student + b * K + k, mask=k < K, other=0.0)
    scale = tl.load(grad) / B
    g = _slopes(s, b, B, k, K, M, teacher, weights, scale, alpha, beta, tau, grad_teacher, COUPLED)
    if grad_student is not None:
        tl.store(grad_student + b * K + k, g, mask=k < K)


@triton.jit
def _scatter_list(
    g, user_emb, item_emb, u, c, grad_user, grad_item, live, d, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Adds one list's gradients to the tables; g `[BLOCK_K]`: gradient of each logit."""
    for start in range(0, d, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        live_d = columns < d
        mask = live[:, None] & live_d[None, :]
        places = c[:, None] * d + columns[None, :]
        if grad_user is not None:
            f = tl.load(item_emb + places, mask=mask, other=0.0).to(g.dtype)
            tl.atomic_add(grad_user + u * d + columns, tl.sum(g[:, None] * f, 0), mask=live_d, sem="relaxed")
        if grad_item is not None:
            e = tl.load(user_emb + u * d + columns, mask=live_d, other=0.0).to(g.dtype)
            tl.atomic_add(grad_item + places, g[:, None] * e[None, :], mask=mask, sem="relaxed")


@triton.jit
def _list_scores_scatter(
    grad, user_emb, item_emb, users, candidates, grad_user, grad_item, K, d,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    live = k < K
    g = tl.load(grad + b * K + k, mask=live, other=0.0)
    c = tl.load(candidates + b * K + k, mask=live, other=0)
    _scatter_list(g, user_emb, item_emb, tl.load(users + b), c, grad_user, grad_item, live, d, BLOCK_D)


@triton.jit
def _list_kd_scatter(
    grad, user_emb, item_emb, users, candidates, teacher, weights, logits, grad_user, grad_item, grad_teacher,
    B, K, M, d, alpha: tl.float64, beta: tl.float64, tau: tl.float64,
    COUPLED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    live = k < K
    s = tl.load(logits + b * K + k, mask=live, other=0.0)
    scale = tl.load(grad) / B
    g = _slopes(s, b, B, k, K, M, teacher, weights, scale, alpha, beta, tau, grad_teacher, COUPLED)
    c = tl.load(candidates + b * K + k, mask=live, other=0)
    _scatter_list(g, user_emb, item_emb, tl.load(users + b), c, grad_user, grad_item, live, d, BLOCK_D)


_WARPS = [triton.Config({}, num_warps=w) for w in (2, 1, 4)]
launch.tuned(_list_kd, _WARPS, ["d", "K"])
launch.tuned(_list_scores, _WARPS[:2], ["d", "K"])
# Scatters are not searched for: every trial would add to the gradients once more.
launch.tuned(_list_kd_scatter, [triton.Config({}, num_warps=4)], [])
launch.tuned(_list_scores_scatter, [triton.Config({}, num_warps=4)], [])
launch.tuned(_list_kd_scores, [triton.Config({}, num_warps=w) for w in (1, 4)], ["K"])
launch.tuned(_list_kd_slopes, [triton.Config({}, num_warps=w) for w in (1, 4)], ["K"])


def _whole(length: int) -> int:
    if length > MAX_LIST:
        raise ValueError(
            f"candidates: expected at most {MAX_LIST} a list, got {length}; one Triton program holds a whole list: "
            "use impl='cuda' or impl='reference', or fewer candidates"
        )
    return launch.block(length, 2, 1 << 30)


def _check(user_emb: Tensor, item_emb: Tensor, users: Tensor, candidates: Tensor) -> None:
    launch.check_index(users, user_emb.shape[0], "users")
    launch.check_index(candidates, item_emb.shape[0], "candidates")


def list_scores(user_emb: Tensor, item_emb: Tensor, users: Tensor, candidates: Tensor) -> Tensor:
    """`s_bk = e_{u_b} . e_{c_bk}`, `[B, K]` in the accumulator type."""
    _check(user_emb, item_emb, users, candidates)
    batch, length = candidates.shape
    logits = user_emb.new_empty(batch, length, dtype=launch.accumulate_type(user_emb.dtype))
    if logits.numel():
        block_k, d = launch.block(length, 2, 32), user_emb.shape[1]
        kernel = launch.choose(_list_scores)
        wrap_triton(kernel)[(batch, triton.cdiv(length, block_k))](
            user_emb, item_emb, users, candidates, logits, length, d,
            DOUBLE=logits.dtype == torch.float64, BLOCK_K=block_k, BLOCK_D=launch.block(d, 16, 64),
        )  # fmt: skip
    return logits


def _scatter_sorted(
    g: Tensor, user_emb: Tensor, item_emb: Tensor, users: Tensor, candidates: Tensor, need_user: bool, need_item: bool
) -> tuple[Tensor, Tensor]:
    """Both tables' gradients in a fixed order of addition; g `[B, K]`: gradient of each logit."""
    u = users[:, None].expand(candidates.shape).reshape(-1)
    c, weight = candidates.reshape(-1), g.reshape(-1)
    return (
        scatter_rows(user_emb, u, c, weight, item_emb) if need_user else user_emb.new_empty(0),
        scatter_rows(item_emb, c, u, weight, user_emb) if need_item else item_emb.new_empty(0),
    )


def list_scores_backward(
    grad: Tensor,
    user_emb: Tensor,
    item_emb: Tensor,
    users: Tensor,
    candidates: Tensor,
    need_user: bool,
    need_item: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the tables for `grad` `[B, K]`; what is not needed comes back empty."""
    if torch.are_deterministic_algorithms_enabled():
        return _scatter_sorted(grad, user_emb, item_emb, users, candidates, need_user, need_item)
    grad_user, grad_item = atomic_target(user_emb, need_user), atomic_target(item_emb, need_item)
    batch, length = candidates.shape
    if grad.numel():
        block_k, d = launch.block(length, 2, 32), user_emb.shape[1]
        kernel = launch.choose(_list_scores_scatter)
        wrap_triton(kernel)[(batch, triton.cdiv(length, block_k))](
            grad, user_emb, item_emb, users, candidates, grad_user, grad_item, length, d,
            BLOCK_K=block_k, BLOCK_D=launch.block(d, 16, 64),
        )  # fmt: skip
    return finished(grad_user, user_emb), finished(grad_item, item_emb)


def list_kd(
    user_emb: Tensor,
    item_emb: Tensor,
    users: Tensor,
    candidates: Tensor,
    teacher_logits: Tensor,
    modality_weights: Tensor,
    alpha: float,
    beta: float,
    tau: float,
    coupled: bool,
) -> tuple[Tensor, Tensor]:
    """The mean loss over the batch and the student's logits `[B, K]`."""
    _check(user_emb, item_emb, users, candidates)
    batch, length = candidates.shape
    if length > MAX_FUSED:
        _whole(length)  # refused before anything is computed
        logits = list_scores(user_emb, item_emb, users, candidates)
        return list_kd_scores(logits, teacher_logits, modality_weights, alpha, beta, tau, coupled), logits
    logits = teacher_logits.new_empty(batch, length)
    loss = logits.new_empty(batch)
    if batch:
        d = user_emb.shape[1]
        kernel = launch.choose(_list_kd)
        wrap_triton(kernel)[(batch,)](
            user_emb, item_emb, users, candidates, teacher_logits, modality_weights, logits, loss,
            batch, length, teacher_logits.shape[0], d, alpha, beta, tau,
            COUPLED=coupled, DOUBLE=loss.dtype == torch.float64, BLOCK_K=_whole(length),
            BLOCK_D=launch.block(d, 16, 16 if loss.dtype == torch.float64 else 64),
        )  # fmt: skip
    return loss.sum() / max(1, batch), logits


def list_kd_backward(
    grad: Tensor,
    user_emb: Tensor,
    item_emb: Tensor,
    users: Tensor,
    candidates: Tensor,
    teacher_logits: Tensor,
    modality_weights: Tensor,
    logits: Tensor,
    alpha: float,
    beta: float,
    tau: float,
    coupled: bool,
    need_user: bool,
    need_item: bool,
    need_teacher: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the tables and the teacher's logits; what is not needed comes back empty."""
    batch, length = candidates.shape
    if torch.are_deterministic_algorithms_enabled() or length > MAX_FUSED:
        g, grad_teacher = list_kd_scores_backward(
            grad, logits, teacher_logits, modality_weights, alpha, beta, tau, coupled, True, need_teacher
        )
        tables = list_scores_backward(g, user_emb, item_emb, users, candidates, need_user, need_item)
        return *tables, grad_teacher
    grad_user, grad_item = atomic_target(user_emb, need_user), atomic_target(item_emb, need_item)
    grad_teacher = torch.empty_like(teacher_logits) if need_teacher else None
    if batch:
        d = user_emb.shape[1]
        kernel = launch.choose(_list_kd_scatter)
        wrap_triton(kernel)[(batch,)](
            grad, user_emb, item_emb, users, candidates, teacher_logits, modality_weights, logits,
            grad_user, grad_item, grad_teacher, batch, length, teacher_logits.shape[0], d, alpha, beta, tau,
            COUPLED=coupled, BLOCK_K=_whole(length), BLOCK_D=launch.block(d, 16, 64),
        )  # fmt: skip
    grad_teacher = logits.new_empty(0) if grad_teacher is None else grad_teacher
    return finished(grad_user, user_emb), finished(grad_item, item_emb), grad_teacher


def list_kd_scores(
    student_logits: Tensor,
    teacher_logits: Tensor,
    modality_weights: Tensor,
    alpha: float,
    beta: float,
    tau: float,
    coupled: bool,
) -> Tensor:
    """The mean loss of student logits `[B, K]` that are already there."""
    batch, length = student_logits.shape
    loss = student_logits.new_empty(batch)
    if batch:
        kernel = launch.choose(_list_kd_scores)
        wrap_triton(kernel)[(batch,)](
            student_logits, teacher_logits, modality_weights, loss, batch, length, teacher_logits.shape[0],
            alpha, beta, tau, COUPLED=coupled, BLOCK_K=_whole(length),
        )  # fmt: skip
    return loss.sum() / max(1, batch)


def list_kd_scores_backward(
    grad: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor,
    modality_weights: Tensor,
    alpha: float,
    beta: float,
    tau: float,
    coupled: bool,
    need_student: bool,
    need_teacher: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the student's and the teacher's logits; what is not needed comes back empty."""
    batch, length = student_logits.shape
    by_student = torch.empty_like(student_logits) if need_student else None
    by_teacher = torch.empty_like(teacher_logits) if need_teacher else None
    if batch:
        kernel = launch.choose(_list_kd_slopes)
        wrap_triton(kernel)[(batch,)](
            grad, student_logits, teacher_logits, modality_weights, by_student, by_teacher,
            batch, length, teacher_logits.shape[0], alpha, beta, tau, COUPLED=coupled, BLOCK_K=_whole(length),
        )  # fmt: skip
    nothing = student_logits.new_empty(0)
    return nothing if by_student is None else by_student, nothing.clone() if by_teacher is None else by_teacher
