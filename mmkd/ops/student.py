"""What a student's step minimises, from its table and the prompt to the loss, in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkd import backends, reference
from mmkd.graph import BipartiteGraph
from mmkd.ops._checks import (
    accumulate_type,
    check_floating,
    check_index,
    check_no_grad,
    check_rank,
    check_same_device,
    check_shape,
    dense,
    vector,
)
from mmkd.ops._registry import call, differentiable, on_register
from mmkd.ops.distill import SETTINGS, check_lists, checked_settings, checked_weights, modalities_of, schema_settings
from mmkd.ops.distill_frozen import checked_nodes, distill_frozen_loss
from mmkd.ops.frozen_teacher import check_constants
from mmkd.ops.spmm import check_gather, propagate


def _state(stacked: Tensor, mixed: Tensor, modalities: int) -> Tensor:
    inner, wide = mixed.shape
    product = (stacked @ stacked.T) @ mixed
    return product.view(inner, modalities, wide // modalities).transpose(0, 1).contiguous()


class _State(torch.autograd.Function):
    """:func:`_state` in two products each way, where autograd's matmul makes ten small calls."""

    @staticmethod
    def forward(ctx, stacked: Tensor, mixed: Tensor, modalities: int) -> Tensor:  # V [e, k], S [e, M d]
        ctx.save_for_backward(stacked, mixed)
        return _state(stacked, mixed, modalities)

    @staticmethod
    def backward(ctx, grad: Tensor):
        stacked, mixed = ctx.saved_tensors
        flat = grad.transpose(0, 1).reshape(mixed.shape).to(mixed.dtype)  # 16 bits from an autocast region
        square = flat @ mixed.T  # [e, e], of V V^T
        return (square + square.T) @ stacked, None, None


def prompt_state(stacked: Tensor, mixed: Tensor, modalities: int) -> Tensor:
    """``V V^T S^m`` from ``V [e, k]`` and the ``S^m`` side by side, ``[e, M d]``; ``[M, e, d]``, of their dtype. Any device."""
    kind = mixed.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return prompt_state(stacked, mixed, modalities)
    transformed = torch._C._are_functorch_transforms_active()  # they take no Function of this, quicker, kind
    return (_state if transformed else _State.apply)(stacked, mixed, modalities)


def student_loss(
    graph: BipartiteGraph, table: Tensor, num_layers: int, rows: Tensor, num_users: int, users: Tensor, candidates: Tensor,
    nodes: Tensor | None, content: Tensor, design: Tensor, ids: Tensor, omega: Tensor, prompt_weight: Tensor,
    prompt_bias: Tensor, mixed: Tensor, asked: Tensor, listed: Tensor, first_item: int, *, l2: Tensor | None = None,
    weights: tuple[float, float, float, float] = (1.0, 0.1, 0.1, 0.01), pair_tau: float = 1.0,
    pair_kind: str = "bernoulli", alpha: float = 1.0, beta: float = 1.0, list_tau: float = 1.0,
    list_weight: str = "coupled", gamma: float = 2.0, list_modalities: Tensor | None = None,
    emb_modalities: Tensor | None = None, gather: torch.dtype | None = None, impl: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The student's whole objective (paper, Eq. 2, 4, 6 to 12), as a function of its table and of the prompt:

        distill_frozen_loss(propagate(graph, table, num_layers, rows), ..., state, ...) + 1/2 sum_i l2_i ||table[rows_i]||^2
        state[m] = V V^T S^m,   V = [prompt_weight; prompt_bias^T],   mixed = [S^1 .. S^M]

    On a CPU one call of one kernel library: propagation, the prompt's products, teacher, losses, and the gradients of the
    propagated rows and of the prompt, which a backward pass takes from there. Differentiable in `table`, `prompt_weight` and
    `prompt_bias`.

    Args:
        graph, table, num_layers, rows, gather: as in :func:`propagate`; rows int64 `[n]`: users, then items.
        num_users, users, candidates, nodes: places among `rows`, as in :func:`distill_frozen_loss`.
        content, design, ids, omega, asked, listed, first_item: the teacher's, as there.
        prompt_weight: `[e-1, k]`. prompt_bias: `[k]`. mixed: `[e, M d]`, a constant. All of the table's dtype in the kernel.
        l2: `[n]`, weights of an L2 term on the table's own rows, or None.
        weights ... emb_modalities: as in :func:`distill_loss`.
        impl: `auto`, `reference` or `cpp` (one dtype for all, float32 or float64, at most 16 modalities in EmbKD). Off the CPU,
            and for a table of another dtype than the constants, `auto` is :func:`composed`.

    Returns:
        The loss, a scalar, and `[5]`, its summands, without gradient: BPR, PairKD, ListKD and EmbKD with their weights, and the
        L2 term.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, range or device (named). RuntimeError: an index out
        of range; a second derivative (of `impl="cpp"`).
    """
    by = checked_weights(weights)
    settings = checked_settings(pair_tau, pair_kind, alpha, beta, list_tau, list_weight, gamma)
    nodes = checked_nodes(nodes, by, users)
    _check_table(graph, table, num_layers, rows, gather)
    check_lists(len(rows), "rows", num_users, users, candidates)
    _check_prompt(prompt_weight, prompt_bias, mixed, content)
    check_constants(content, design, ids, omega, len(mixed), asked, "asked", listed, "listed", first_item)
    check_shape(asked, "asked", (3 * len(users) + len(nodes),))
    check_shape(listed, "listed", tuple(candidates.shape))
    check_shape(table, "table", (len(table), content.shape[2]))
    l2 = vector(l2, "l2", len(rows), accumulate_type(table.dtype))
    check_no_grad(l2, "l2")
    index = ("rows", rows), ("l2", l2), ("users", users), ("candidates", candidates), ("nodes", nodes)
    check_same_device(("table", table), *index, ("content", content), ("mixed", mixed))
    if not by[2]:
        candidates, listed = candidates[:, :2], listed[:, :0]
    own = graph, table, num_layers, rows, gather, l2
    batch = num_users, users, candidates, nodes
    teacher = content, design, ids, omega, prompt_weight, prompt_bias, mixed, asked, listed, first_item
    if impl == "auto" and (table.device.type != "cpu" or table.dtype != content.dtype):
        return composed(own, batch, teacher, by, settings, list_modalities, emb_modalities)
    if table.dtype != content.dtype:
        raise TypeError(f"table: expected {content.dtype}, as content, for impl={impl!r}, got {table.dtype}")
    heads = modalities_of(content, table, list_modalities, emb_modalities)
    which = backends.resolve("student", table, impl)
    if which == "reference":
        graph_given = graph.rowptr, graph.col, graph.scale_as(table.dtype)
        args = table, num_layers, rows, gather is not None, l2
        return reference.student(*graph_given, *args, *batch, *teacher, by, *settings, *heads)
    return _fused(which, own, batch, teacher, by, settings, heads)


def _check_table(graph: BipartiteGraph, table: Tensor, num_layers: int, rows: Tensor, gather) -> None:
    check_floating(table, "table")
    check_rank(table, "table", 2)
    check_shape(table, "table", (graph.num_nodes, table.shape[1]))
    check_index(rows, "rows", (torch.int64,))
    if graph.device != table.device:
        raise ValueError(
            f"graph: expected on {table.device} like table, got {graph.device}; use graph.to(table.device)"
        )
    if not hasattr(num_layers, "__index__") or num_layers < 0:
        raise ValueError(f"num_layers: expected an int >= 0, got {num_layers!r}")
    if gather is not None:
        check_gather(gather, table, "table")


def _check_prompt(weight: Tensor, bias: Tensor, mixed: Tensor, content: Tensor) -> None:
    check_floating(content, "content")
    check_rank(content, "content", 3)
    if not len(content):
        raise ValueError(f"content: expected at least one modality, got shape {tuple(content.shape)}")
    check_floating(weight, "prompt_weight", content.dtype)
    check_rank(weight, "prompt_weight", 2)
    check_floating(bias, "prompt_bias", content.dtype)
    check_shape(bias, "prompt_bias", (weight.shape[1],))
    check_floating(mixed, "mixed", content.dtype)
    check_shape(mixed, "mixed", (len(weight) + 1, len(content) * content.shape[2]))
    check_no_grad(mixed, "mixed")
    check_same_device(("content", content), ("prompt_weight", weight), ("prompt_bias", bias))


def _fused(which, own, batch, teacher, by, settings, heads) -> tuple[Tensor, Tensor]:
    graph, table, num_layers, rows, gather, l2 = own
    num_users, *index = batch
    *tensors, first_item = teacher
    grad = torch.is_grad_enabled()
    need = grad and table.requires_grad, grad and (teacher[4].requires_grad or teacher[5].requires_grad)
    loss, terms, *_ = call(
        which, "student", graph.rowptr, graph.col, graph.scale_as(table.dtype), dense(table), num_layers, dense(rows),
        gather is not None, l2, int(num_users), *map(dense, index), *map(dense, tensors), first_item, *heads, *by,
        *schema_settings(*settings), *need,
    )  # fmt: skip
    return loss, terms.detach()


def composed(own, batch, teacher, by, settings, list_modalities, emb_modalities) -> tuple[Tensor, Tensor]:
    """The same from the ops of its parts: any device, a table of any dtype."""
    graph, table, num_layers, rows, gather, l2 = own
    content, design, ids, omega, weight, bias, mixed, *asked = teacher
    num_users, users, candidates, nodes = batch
    state = prompt_state(torch.cat([weight, bias[None]]), mixed, len(content))
    kinds = {"list_modalities": list_modalities, "emb_modalities": emb_modalities}
    if not by[2]:
        asked[1] = candidates[:, :2]  # of the candidates' shape; not looked at
    loss, terms = distill_frozen_loss(
        propagate(graph, table, num_layers, rows, gather=gather), num_users, users, candidates, nodes, content, design,
        ids, omega, state, *asked, weights=by, **dict(zip(SETTINGS, settings, strict=True)), **kinds,
    )  # fmt: skip
    squares = loss.new_zeros(())
    if l2 is not None:
        picked = table.index_select(0, rows).to(l2.dtype)
        squares = 0.5 * torch.dot(l2, picked.square().sum(1)).to(loss.dtype)
    return loss + squares, torch.cat([terms * terms.new_tensor(by), squares.detach()[None].to(terms.dtype)])


class StudentGradients:
    """What :func:`student_loss` gives a step of a student's stage, without autograd: the summands of the loss, and the
    gradients of the propagated rows, of `prompt_weight` and of `prompt_bias`.

    What stays the same from step to step is conformed once; the kernel checks what it is given all the same.

    Args:
        graph, table, num_layers, gather, content ... mixed, first_item, weights ... emb_modalities: as there; the values of `table`
            and of the prompt are those they have when a step is made.
    """

    def __init__(
        self, graph: BipartiteGraph, table: Tensor, num_layers: int, constants: tuple[Tensor, ...], prompt_weight: Tensor,
        prompt_bias: Tensor, mixed: Tensor, first_item: int, *, weights, pair_tau, pair_kind, alpha, beta, list_tau,
        list_weight, gamma, list_modalities, emb_modalities, gather=None,
    ) -> None:  # fmt: skip
        self.table, self.gather, self.by = table, gather, checked_weights(weights)
        settings = checked_settings(pair_tau, pair_kind, alpha, beta, list_tau, list_weight, gamma)
        _check_prompt(prompt_weight, prompt_bias, mixed, constants[0])
        content = constants[0]
        self._graph = graph.rowptr, graph.col, graph.scale_as(table.dtype), table, num_layers
        self._mixed_layers = gather is not None
        self._teacher = *constants, prompt_weight, prompt_bias, mixed
        heads = modalities_of(content, table, list_modalities, emb_modalities)
        self._settings = first_item, *heads, *self.by, *schema_settings(*settings), True

    def __call__(
        self, rows: Tensor, l2: Tensor | None, num_users: int, users: Tensor, candidates: Tensor, nodes: Tensor,
        asked: Tensor, listed: Tensor, need_prompt: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """`[5]`, `[n, d]`, `[e-1, k]` and `[k]`; the last two empty where they are not needed. listed: of all candidates."""
        if not self.by[2]:  # a list of two for BPR and PairKD
            candidates, listed = candidates[:, :2].contiguous(), listed[:, :0]
        with torch._C._AutoDispatchBelowAutograd():
            _, *made = torch.ops.mmkd.student.default(
                *self._graph, rows, self._mixed_layers, l2, num_users, users, candidates, nodes, *self._teacher, asked,
                listed, *self._settings, need_prompt,
            )  # fmt: skip
        return tuple(made)


def _setup(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    rowptr, col, scale, table, ctx.num_layers, rows, ctx.mixed_layers, l2, *_ = inputs
    ctx.count, ctx.need = len(inputs), inputs[-2:]
    ctx.save_for_backward(rowptr, col, scale, rows, l2, None if l2 is None else table, *output[2:])


def _make_backward(ops):
    def backward(ctx, grad, *_others):
        if torch.is_grad_enabled():
            raise RuntimeError("mmkd::student: second derivatives are not supported; use impl='reference' for them")
        out: list[Tensor | None] = [None] * ctx.count
        if grad is None:
            return tuple(out)
        rowptr, col, scale, rows, l2, table, grad_rows, grad_weight, grad_bias = ctx.saved_tensors
        if ctx.need[0]:
            back = ops.propagate_mixed_backward if ctx.mixed_layers else ops.propagate_backward
            full = back(rowptr, col, scale, grad_rows * grad, ctx.num_layers, rows)
            if l2 is not None:
                full = full.index_add(0, rows, (grad * l2)[:, None] * table.index_select(0, rows))
            out[3] = full
        if ctx.need[1]:
            out[16], out[17] = grad_weight * grad, grad_bias * grad
        return tuple(out)

    return backward


@on_register
def _register(ns: str, ops) -> None:
    if not hasattr(ops, "student"):
        return

    def fake(rowptr, col, scale, table, num_layers, rows, mixed_layers, l2, *rest):
        weight, bias, need_table, need_prompt = rest[8], rest[9], *rest[-2:]
        grads = (
            table.new_empty((rows.numel(), table.shape[1]) if need_table else (0,)),
            *(table.new_empty(t.shape if need_prompt else (0,)) for t in (weight, bias)),
        )
        return table.new_empty(()), table.new_empty(5), *grads

    torch.library.register_fake(f"{ns}::student", fake)
    differentiable(ns, "student", _make_backward, _setup, losses=1)
