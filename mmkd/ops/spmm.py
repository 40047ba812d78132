"""Sparse-dense products, products sampled at sparse entries, and LightGCN propagation."""

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


def spmm(
    rowptr: Tensor,
    col: Tensor,
    x: Tensor,
    value: Tensor | None = None,
    row_scale: Tensor | None = None,
    col_scale: Tensor | None = None,
    *,
    transpose: tuple[Tensor, Tensor] | None = None,
    plans: tuple[Tensor | None, Tensor | None] = (None, None),
    impl: str = "auto",
) -> Tensor:
    """Sparse times dense, `[n, d]`, differentiable in `x` and `value`.

        out[r] = row_scale[r] * sum_{j = rowptr[r] .. rowptr[r+1]-1} value[j] * col_scale[col[j]] * x[col[j]]

    With `row_scale = col_scale = D^-1/2` and no `value` this is one LightGCN layer, `Â x` (paper, Eq. 2).

    Args:
        rowptr: int64 `[n + 1]`. col: int32 or int64 `[nnz]`, each in `[0, len(x))`.
        x: `[m, d]`, float32, float64, bfloat16 or float16; sums are kept in float32 (float64 for float64).
        value: `[nnz]`, ones if not given. row_scale: `[n]`. col_scale: `[m]`; both are constants.
        transpose: `(rowptr, col)` of the transposed pattern, columns ascending; saves the backward pass from building
            it. Used only where there is no `value`.
        plans: of the pattern and of `transpose`, as `BipartiteGraph` keeps them: how a GPU cuts long rows. Without
            them the cut is made in every call.
        impl: `auto`, `reference`, `cpp`, `cuda` or `triton`.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device (named). RuntimeError: `rowptr` is not
            monotone or `col` is out of range; nothing of `x` has been read for that row.
    """
    check_index(rowptr, "rowptr", (torch.int64,))
    check_index(col, "col", (torch.int32, torch.int64))
    check_floating(x, "x")
    check_rank(x, "x", 2)
    acc = accumulate_type(x.dtype)
    scales = []
    for name, t, size in (("row_scale", row_scale, rowptr.numel() - 1), ("col_scale", col_scale, x.shape[0])):
        check_no_grad(t, name)
        scales.append(vector(t, name, size, acc))
    value = vector(value, "value", col.numel(), acc)
    named = zip(("rowptr", "col", "value", "row_scale", "col_scale"), (rowptr, col, value, *scales), strict=True)
    check_same_device(("x", x), *named)
    which = backends.resolve("spmm", x, impl)
    if which == "reference":
        return reference.spmm(rowptr, col, x, value, *scales)
    t_rowptr, t_col = transpose if transpose is not None and value is None else (None, None)
    return call(which, "spmm", dense(rowptr), dense(col), dense(x), value, *scales, t_rowptr, t_col, *plans)


def sddmm(
    rowptr: Tensor,
    col: Tensor,
    a: Tensor,
    b: Tensor,
    row_scale: Tensor | None = None,
    col_scale: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """Inner products at the stored entries of a sparse matrix, `[nnz]`, differentiable in `a` and `b`, twice too.

        out[j] = row_scale[r] * col_scale[col[j]] * <a[r], b[col[j]]>    for entry j of row r

    With `spmm(..., value=...)` this is attention over a graph's edges; the `n x m` product is never formed.

    Args:
        rowptr, col, row_scale, col_scale: as in `spmm`.
        a: `[n, d]`. b: `[m, d]`, of the same dtype; float32, float64, bfloat16 or float16.
        impl: `auto`, `reference`, `cpp`, `cuda` or `triton`.

    Returns:
        `[nnz]`, float32, or float64 for float64.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device (named). RuntimeError: `rowptr` is not
            monotone or `col` is out of range.
    """
    check_index(rowptr, "rowptr", (torch.int64,))
    check_index(col, "col", (torch.int32, torch.int64))
    check_floating(a, "a")
    check_rank(a, "a", 2)
    check_rank(b, "b", 2)
    if b.dtype != a.dtype or b.shape[1] != a.shape[1]:
        raise ValueError(f"b: expected {a.dtype} with {a.shape[1]} columns like a, got {b.dtype} {tuple(b.shape)}")
    if a.shape[0] != rowptr.numel() - 1:
        raise ValueError(f"a: expected {rowptr.numel() - 1} rows, one per row of rowptr, got shape {tuple(a.shape)}")
    acc = accumulate_type(a.dtype)
    scales = []
    for name, t, size in (("row_scale", row_scale, a.shape[0]), ("col_scale", col_scale, b.shape[0])):
        check_no_grad(t, name)
        scales.append(vector(t, name, size, acc))
    named = zip(("rowptr", "col", "b", "row_scale", "col_scale"), (rowptr, col, b, *scales), strict=True)
    check_same_device(("a", a), *named)
    which = backends.resolve("spmm", a, impl)
    if which == "reference":
        return reference.sddmm(rowptr, col, a, b, *scales)
    return call(which, "sddmm", dense(rowptr), dense(col), dense(a), dense(b), *scales)


def propagate(
    graph: BipartiteGraph, x: Tensor, num_layers: int, rows: Tensor | None = None, *,
    gather: torch.dtype | None = None, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """LightGCN propagation with the mean over layers, `1/(L+1) * sum_{l=0..L} Â^l x` (paper, Eq. 2; spec section 2).

    Args:
        graph: gives `Â`; on the same device as `x`.
        x: `[N, d]`, users first, then items; float32, float64, bfloat16 or float16.
        num_layers: `L >= 0`.
        rows: int64 `[n]`, nodes to return, in this order, repeats allowed. The last layer is then computed for them
            only, the layer before for their neighbours only, and the backward pass starts from them only.
        gather: `torch.bfloat16`, for float32 `x`: what a layer gathers is rounded to it, once a layer, and half the
            bytes are read; `x` itself, all sums and what comes back are float32. `h <- x + Â bf16(h)`, `L` times, over
            `L + 1`. The backward pass is the same operator on the gradient: it takes the rounding for the identity and
            rounds what it gathers itself. A CPU kernel; elsewhere `auto` is the reference, without gain, and says so.
        impl: `auto`, `reference`, `cpp`, `cuda` or `triton`; the first three where `gather` is given.

    Returns:
        `[N, d]`, or `[n, d]` equal to `propagate(graph, x, L)[rows]`.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device (named).
        RuntimeError: an entry of `rows` is out of range.
    """
    check_floating(x, "x")
    check_rank(x, "x", 2)
    if x.shape[0] != graph.num_nodes:
        raise ValueError(f"x: expected {graph.num_nodes} rows (users + items of the graph), got shape {tuple(x.shape)}")
    if graph.device != x.device:
        raise ValueError(f"graph: expected on {x.device} like x, got {graph.device}; use graph.to(x.device)")
    if num_layers < 0:
        raise ValueError(f"num_layers: expected >= 0, got {num_layers}")
    if rows is not None:
        check_index(rows, "rows", (torch.int64,))
        check_same_device(("x", x), ("rows", rows))
        rows = dense(rows)
    scale = graph.scale_as(x.dtype)
    if gather is not None:
        check_gather(gather, x, "x")
        which = backends.resolve("propagate_mixed", x, impl)
        if which == "reference":
            return reference.propagate_mixed(graph.rowptr, graph.col, scale, x, num_layers, rows)
        return call(which, "propagate_mixed", graph.rowptr, graph.col, scale, dense(x), num_layers, rows)
    which = backends.resolve("propagate", x, impl)
    if which == "reference":
        return reference.propagate(graph.rowptr, graph.col, scale, x, num_layers, rows)
    plan = plan_of(graph, "all", which) if num_layers else None
    return call(which, "propagate", graph.rowptr, graph.col, scale, dense(x), num_layers, rows, plan)


def check_gather(gather: torch.dtype, t: Tensor, name: str) -> None:
    """Raises where layers of `t` cannot be gathered in `gather`."""
    if gather != torch.bfloat16:
        raise ValueError(f"gather: expected torch.bfloat16 or None, got {gather}")
    if t.dtype != torch.float32:
        raise TypeError(f"{name}: expected float32 where bfloat16 is gathered, got {t.dtype}; leave gather out")


def propagate_adamw_(
    graph: BipartiteGraph, grad: Tensor, num_layers: int, rows: Tensor, weight: Tensor, exp_avg: Tensor,
    exp_avg_sq: Tensor, *, step: int, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
    weight_decay: float = 0.0, l2: Tensor | None = None, gather: torch.dtype | None = None, impl: str = "auto",
) -> None:  # fmt: skip
    """A step of AdamW on the table behind `propagate(graph, weight, num_layers, rows)`, in place, from the gradient of
    what that returned (paper, Eq. 2 backwards; Loshchilov and Hutter 2019, Algorithm 2).

        G = 1/(L+1) sum_{l=0..L} Â^l P^T grad + P^T (l2 * weight[rows]),   P^T: rows to their places among all nodes
        weight <- (1 - lr weight_decay) weight
        exp_avg <- b1 exp_avg + (1 - b1) G,   exp_avg_sq <- b2 exp_avg_sq + (1 - b2) G^2
        weight <- weight - lr / (1 - b1^step) exp_avg / (sqrt(exp_avg_sq / (1 - b2^step)) + eps)

    On a CPU the last layer back and the step are one pass over the table: `G` is never written. The bits are those of
    `propagate`'s backward with the same `gather` and `torch.optim.AdamW(fused=True)` (where the processor fuses multiply
    and add, and but for the few elements at the ends of its threads' shares that torch computes one by one).

    Args:
        graph: gives `Â`.
        grad: `[n, d]`, float32 or float64. num_layers: `L >= 0`.
        rows: int64 `[n]`, node ids in ascending order, each once.
        weight, exp_avg, exp_avg_sq: `[N, d]`, contiguous, of `grad`'s dtype; changed.
        step: number of this step, from 1. lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        l2: `[n]`, weights of an L2 term on the table's own rows, or None.
        gather: as in `propagate`, of layers back; `weight` and its moments stay float32.
        impl: `auto`, `reference` or `cpp`. Off the CPU `auto` is the reference with that device's propagation.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, layout or device (named), or `step` below 1.
        RuntimeError: `rows` is not ascending or out of range; nothing has been changed then. The graph's columns have been
            tampered with; rows before the wrong one may have made their step.
    """
    check_floating(grad, "grad")
    if grad.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"grad: expected a tensor of float32 or float64, got {grad.dtype}")
    check_index(rows, "rows", (torch.int64,))
    check_rank(grad, "grad", 2)
    check_shape(grad, "grad", (rows.numel(), grad.shape[1]))
    tables = {"weight": weight, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    for name, t in tables.items():
        check_floating(t, name, grad.dtype)
        check_shape(t, name, (graph.num_nodes, grad.shape[1]))
        if not t.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, for it is changed in place")
    check_no_grad(l2, "l2")
    l2 = vector(l2, "l2", rows.numel(), grad.dtype)
    check_same_device(("grad", grad), *tables.items(), ("rows", rows), ("l2", l2))
    if graph.device != grad.device:
        raise ValueError(f"graph: expected on {grad.device} like grad, got {graph.device}; use graph.to(grad.device)")
    if len({t.data_ptr() for t in tables.values()}) < 3 and weight.numel():
        raise ValueError("weight, exp_avg, exp_avg_sq: expected three tables, got the same one twice")
    if num_layers < 0 or step < 1:
        raise ValueError(f"num_layers, step: expected >= 0 and >= 1, got {num_layers} and {step}")
    if gather is not None:
        check_gather(gather, grad, "grad")
    mixed = gather is not None
    given = graph.rowptr, graph.col, graph.scale_as(grad.dtype), dense(grad), num_layers, dense(rows)
    settings = lr, *betas, eps, weight_decay, step
    with torch.no_grad():
        if impl == "auto" and grad.device.type != "cpu":
            which = backends.resolve("propagate", grad)
            back = reference.propagate_mixed_backward if mixed else reference.propagate_backward
            if which != "reference" and not mixed:
                plan = plan_of(graph, "all", which) if num_layers else None
                back = lambda *a: call(which, "propagate_backward", *a, plan)  # noqa: E731
            return reference.propagate_adamw_(*given, l2, *tables.values(), *settings, back=back)
        which = backends.resolve("propagate_adamw", grad, impl)
        if which == "reference":
            back = reference.propagate_mixed_backward if mixed else reference.propagate_backward
            return reference.propagate_adamw_(*given, l2, *tables.values(), *settings, back=back)
        return call(which, "propagate_adamw", *given, l2, *tables.values(), *settings, mixed)


def plan_of(graph: BipartiteGraph, side: str, which: str) -> Tensor | None:
    """How `which` cuts the long rows of `A` ("all"), `R` ("users") or `R^T` ("items"): made once per graph and kept.

    None where that is done on the fly: on a CPU, and while a call is only being traced or captured.
    """
    if which not in ("cuda", "triton"):
        return None
    key = f"plan {side} {which}"
    if key not in graph._cache:
        if torch.compiler.is_compiling() or type(graph.rowptr) is not Tensor:
            return None
        if graph.rowptr.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        rowptr, col = {
            "all": (graph.rowptr, graph.col),
            "users": (graph.user_rowptr, graph.user_col),
            "items": (graph.item_rowptr, graph.item_col),
        }[side]
        with torch.inference_mode(False):  # it is saved for backward passes to come
            graph._cache[key] = call(which, "spmm_plan", rowptr, col.numel())
        if rowptr.is_cuda:
            torch.cuda.current_stream(rowptr.device).synchronize()  # once: calls on other streams will read it
    return graph._cache[key]


def _spmm_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _spmm_backward(ops):
    def backward(ctx, grad):
        rowptr, col, x, value, row_scale, col_scale, t_rowptr, t_col, plan, t_plan = ctx.saved_tensors
        grad, grad_x, grad_value = grad.contiguous(), None, None
        if ctx.needs_input_grad[2]:
            t_value = None
            if t_rowptr is None:
                t_rowptr, t_col, perm = ops.csr_transpose(rowptr, col, x.shape[0])
                t_value, t_plan = None if value is None else value[perm], None
            # (S_r A S_c)^T = S_c A^T S_r; the pattern alone says how to go back only where there are no values
            back = (rowptr, col) if value is None else (None, None)
            grad_x = ops.spmm(t_rowptr, t_col, grad, t_value, col_scale, row_scale, *back, t_plan, plan)
        if ctx.needs_input_grad[3]:
            grad_value = ops.sddmm(rowptr, col, grad, x, row_scale, col_scale)
        return None, None, grad_x, grad_value, None, None, None, None, None, None

    return backward


def _sddmm_backward(ops):
    def backward(ctx, grad):
        rowptr, col, a, b, row_scale, col_scale = ctx.saved_tensors
        grad, grad_a, grad_b, rest = grad.contiguous(), None, None, (None, None, None, None)
        if ctx.needs_input_grad[2]:
            grad_a = ops.spmm(rowptr, col, b, grad, row_scale, col_scale, *rest)
        if ctx.needs_input_grad[3]:
            t_rowptr, t_col, perm = ops.csr_transpose(rowptr, col, b.shape[0])
            grad_b = ops.spmm(t_rowptr, t_col, a, grad[perm], col_scale, row_scale, *rest)
        return None, None, grad_a, grad_b, None, None

    return backward


def _propagate_setup(ctx, inputs, output) -> None:
    rowptr, col, scale, _, ctx.num_layers, *rest = inputs  # rest: rows, and a plan where the op has one
    ctx.save_for_backward(rowptr, col, scale, *rest)


def _back_by(name: str):
    """The way back through propagation is op `name`: `Â` is symmetric, so it is the same operator, started from `rows`
    only where they are given. That is linear in the gradient, and its own adjoint is propagation itself."""

    def make(ops):
        def backward(ctx, grad):
            rowptr, col, scale, *rest = ctx.saved_tensors
            out = getattr(ops, name)(rowptr, col, scale, grad.contiguous(), ctx.num_layers, *rest)
            return None, None, None, out, None, *(None for _ in rest)

        return backward

    return make


def _register_cpu_only(ns: str) -> None:
    fake = torch.library.register_fake
    fake(f"{ns}::propagate_adamw", lambda *_: None)
    fake(
        f"{ns}::propagate_mixed",
        lambda rowptr, col, scale, x, num_layers, rows: x.new_empty(
            x.shape[0] if rows is None else rows.numel(), x.shape[1]
        ),
    )
    fake(
        f"{ns}::propagate_mixed_backward",
        lambda rowptr, col, scale, grad, num_layers, rows: grad.new_empty(rowptr.numel() - 1, grad.shape[1]),
    )
    differentiable(ns, "propagate_mixed", _back_by("propagate_mixed_backward"), _propagate_setup)
    differentiable(ns, "propagate_mixed_backward", _back_by("propagate_mixed"), _propagate_setup)


@on_register
def _register(ns: str, ops) -> None:
    library = torch.library
    library.register_fake(f"{ns}::spmm", lambda rowptr, col, x, *_: x.new_empty(rowptr.numel() - 1, x.shape[1]))
    library.register_fake(
        f"{ns}::sddmm", lambda rowptr, col, a, *_: a.new_empty(col.numel(), dtype=accumulate_type(a.dtype))
    )
    library.register_fake(
        f"{ns}::csr_transpose",
        lambda rowptr, col, n: (rowptr.new_empty(n + 1), torch.empty_like(col), rowptr.new_empty(col.numel())),
    )
    library.register_fake(
        f"{ns}::propagate",
        lambda rowptr, col, scale, x, num_layers, rows, plan=None: x.new_empty(
            x.shape[0] if rows is None else rows.numel(), x.shape[1]
        ),
    )
    library.register_fake(
        f"{ns}::propagate_backward",
        lambda rowptr, col, scale, grad, num_layers, rows, plan=None: grad.new_empty(rowptr.numel() - 1, grad.shape[1]),
    )
    if hasattr(ops, "propagate_mixed"):
        _register_cpu_only(ns)
    differentiable(ns, "spmm", _spmm_backward, _spmm_setup)
    differentiable(ns, "propagate", _back_by("propagate_backward"), _propagate_setup)
    differentiable(ns, "sddmm", _sddmm_backward, _spmm_setup)
    differentiable(ns, "propagate_backward", _back_by("propagate"), _propagate_setup)
