"""What a student's step asks of the frozen teacher, as a function of the prompt alone."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkd import backends, reference
from mmkd.ops._checks import (
    check_floating,
    check_index,
    check_no_grad,
    check_rank,
    check_same_device,
    check_shape,
    dense,
)
from mmkd.ops._registry import call, differentiable, on_register, refuse_second_derivative
from mmkd.ops.list_kd import list_scores

_SHARED_BYTES = 96 * 1024  # of a GPU's block, as csrc/cuda/frozen_teacher_kernel.cu has it


def frozen_teacher(
    content: Tensor, design: Tensor, ids: Tensor, omega: Tensor, state: Tensor, nodes: Tensor, candidates: Tensor,
    first_item: int, *, impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Margins, list logits and features of a teacher whose prompt is all that still learns (spec section 3).

        F^m_v = C^m_v + K_v Z^m                                      (paper, Eq. 3, 4 with everything else frozen)
        E^T_v = ids_v + sum_m omega_m F^m_v / max(||F^m_v||, 1e-12)
        margin_b = E^T_u . (E^T_i - E^T_j)                           (Eq. 7)
        logits^m_bk = F^m_u . F^m_i(k) = F_u . C_i + (F_u Z^T) . K_i   (Eq. 8)

    The candidates' rows of `F` and the gradients of any row are never stored: differentiable in `state` alone.

    Args:
        content: C, `[M, N, d]`, float32 or float64. design: K, `[N, e]`. ids: `[N, d]`. omega: `[M]`. All constants.
        state: Z, `[M, e, d]`.
        nodes: int64 `[3B + n]` node ids: users u, observed items i, negatives j, then those whose F is returned.
        candidates: int64 `[B, K]` item ids; item x is node `first_item + x`.
        first_item: the number of users.
        impl: `auto`, `reference`, `cpp` or `cuda` (float32 and float64). Off the CPU `auto` is :func:`composed`, library products
            and `list_scores`: the CUDA kernels were not yet run on a GPU. So is `cuda` for a `[e, d]` too large for a GPU's
            shared memory (beyond about 90 KB).

    Returns:
        `margin [B]`, `logits [M, B, K]`, `targets [M, n, d]`.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device (named). RuntimeError: an id out of range.
    """
    check_frozen(content, design, ids, omega, state, nodes, "nodes", candidates, "candidates", first_item)
    which = _which(content, impl)
    if which == "cuda" and not _fits(state):
        which = "composed"
    if which == "composed":
        return composed(content, design, ids, omega, state, nodes, candidates, first_item)
    if which == "reference":
        return reference.frozen_teacher(content, design, ids, omega, state, nodes, candidates, first_item)
    tables = (dense(content), dense(design), dense(ids), dense(omega), dense(state))
    return call(which, "frozen_teacher", *tables, dense(nodes), dense(candidates), first_item)[:3]


def _which(content: Tensor, impl: str) -> str:
    if impl == "auto" and content.device.type != "cpu":
        return "composed"  # CUDA's kernels too, until they were run on a GPU: backends.UNTRIED
    return backends.resolve("frozen_teacher", content, impl)


def _fits(state: Tensor) -> bool:
    """Whether a modality's Z, its rows at an odd stride, fits a GPU block's shared memory beside the rows of one sample."""
    (_, e, d), size = state.shape, state.element_size()
    elements = -(-e * (d | 1) // 4) * 4 + 4 * (-(-e // 4) * 4) + 6 * (-(-d // 4) * 4)
    return elements * size <= _SHARED_BYTES


def check_frozen(
    content: Tensor, design: Tensor, ids: Tensor, omega: Tensor, state: Tensor, nodes: Tensor, nodes_name: str,
    candidates: Tensor, list_name: str, first_item: int,
) -> None:  # fmt: skip
    """The constants of a collapsed teacher with its state, and what it is asked for."""
    check_floating(state, "state")
    check_rank(state, "state", 3)
    inner = state.shape[1]
    check_constants(content, design, ids, omega, inner, nodes, nodes_name, candidates, list_name, first_item)
    check_floating(state, "state", content.dtype)
    check_shape(state, "state", (content.shape[0], inner, content.shape[2]))
    check_same_device(("content", content), ("state", state))


def check_constants(
    content: Tensor, design: Tensor, ids: Tensor, omega: Tensor, inner: int, nodes: Tensor, nodes_name: str,
    candidates: Tensor, list_name: str, first_item: int,
) -> None:  # fmt: skip
    """The constants of a collapsed teacher whose design is `inner` wide, and what it is asked for."""
    check_floating(content, "content")
    check_rank(content, "content", 3)
    check_no_grad(content, "content")
    count, num_nodes, d = content.shape
    for name, t, shape in (
        ("design", design, (num_nodes, inner)),
        ("ids", ids, (num_nodes, d)),
        ("omega", omega, (count,)),
    ):
        check_floating(t, name, content.dtype)
        check_shape(t, name, shape)
        check_no_grad(t, name)
    if isinstance(first_item, bool) or not hasattr(first_item, "__index__"):
        raise TypeError(f"first_item: expected an int, got {type(first_item).__name__}")
    if not 0 <= first_item <= num_nodes:
        raise ValueError(f"first_item: expected 0 to {num_nodes}, the nodes of content, got {first_item}")
    check_index(nodes, nodes_name)
    check_index(candidates, list_name, rank=2)
    if len(nodes) < 3 * len(candidates):
        raise ValueError(
            f"{nodes_name}: expected at least {3 * len(candidates)} ids, 3 per row of {list_name}, got shape "
            f"{tuple(nodes.shape)}"
        )
    named = (("design", design), ("ids", ids), ("omega", omega), (nodes_name, nodes))
    check_same_device(("content", content), *named, (list_name, candidates))


def composed(
    content: Tensor, design: Tensor, ids: Tensor, omega: Tensor, state: Tensor, nodes: Tensor, candidates: Tensor,
    first_item: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same from library products and list scores over the constants: any device, no candidate's row of `F` either."""
    count = len(candidates)
    # One product over all modalities: its gradient sums over thousands of nodes, which a GPU's library cuts up for a single
    # product and not for a batch of them.
    side_by_side = design.index_select(0, nodes) @ state.transpose(0, 1).flatten(1)  # [3B + n, M d]
    heads = content.index_select(1, nodes) + side_by_side.unflatten(1, (len(content), -1)).transpose(0, 1)
    own = torch.arange(count, device=content.device)
    through = torch.bmm(heads[:, :count], state.mT)  # F_u Z^T, [M, B, e]
    logits = [
        list_scores(head, table[first_item:], own, candidates) + list_scores(part, design[first_item:], own, candidates)
        for head, table, part in zip(heads[:, :count].unbind(), content.unbind(), through.unbind(), strict=True)
    ]
    unit = torch.nn.functional.normalize(heads[:, : 3 * count], dim=-1)
    joint = ids.index_select(0, nodes[: 3 * count]) + (omega[:, None, None] * unit).sum(0)
    user, observed, negative = joint.chunk(3)
    return (user * (observed - negative)).sum(1), torch.stack(logits), heads[:, 3 * count :]


def _setup(ctx, inputs, output) -> None:
    *tables, ctx.first_item = inputs
    ctx.save_for_backward(*tables, output[3])
    ctx.set_materialize_grads(False)


def _backward(ops):
    def backward(ctx, grad_margin, grad_logits, grad_targets, _grad_heads):
        grads = [None if g is None else g.contiguous() for g in (grad_margin, grad_logits, grad_targets)]
        if all(g is None for g in grads):
            return (None,) * 8
        grad = ops.frozen_teacher_backward(*grads, *ctx.saved_tensors, ctx.first_item)
        return None, None, None, None, grad, None, None, None

    return backward


@on_register
def _register(ns: str, ops) -> None:
    if not hasattr(ops, "frozen_teacher"):
        return

    def fake(content, design, ids, omega, state, nodes, candidates, first_item):
        (count, _, d), (batch, width) = content.shape, candidates.shape
        sizes = (batch,), (count, batch, width), (count, nodes.shape[0] - 3 * batch, d), (count, 3 * batch, d)
        return tuple(content.new_empty(size) for size in sizes)

    def fake_backward(grad_margin, grad_logits, grad_targets, content, design, ids, omega, state, *_):
        return torch.empty_like(state)

    torch.library.register_fake(f"{ns}::frozen_teacher", fake)
    torch.library.register_fake(f"{ns}::frozen_teacher_backward", fake_backward)
    differentiable(ns, "frozen_teacher", _backward, _setup)
    refuse_second_derivative(f"{ns}::frozen_teacher_backward")
