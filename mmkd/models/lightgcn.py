"""LightGCN: the student, and the undistilled baseline (spec section 2, He et al. 2020 Eq. 3, 4)."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from mmkd import backends, ops
from mmkd.graph import BipartiteGraph


def initial_table(
    rows: int, dim: int, kind: str, generator: torch.Generator | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """A random ``[rows, dim]`` layer-0 table: ``"xavier"`` (uniform) or ``"normal"`` (standard deviation 0.1)."""
    table = torch.empty(rows, dim, dtype=dtype)
    if kind == "xavier":
        return nn.init.xavier_uniform_(table, generator=generator)
    if kind == "normal":
        return nn.init.normal_(table, std=0.1, generator=generator)
    raise ValueError(f"init: expected xavier or normal, got {kind!r}")


def rounded(x: Tensor, compute: torch.dtype | None) -> Tensor:
    """``x`` in the type training computes in; ``x`` itself where there is none, or without gradients."""
    return x if compute is None or not torch.is_grad_enabled() else x.to(compute)


def gathered_in(x: Tensor, compute: torch.dtype | None) -> torch.dtype | None:
    """The type layers over ``x`` are gathered in where nothing else need be rounded (a CPU's kernels); None: as `rounded` says."""
    return compute if compute == torch.bfloat16 and x.device.type == "cpu" and x.dtype == torch.float32 else None


class RowGradient:
    """The gradient of a propagated table, held at the rows that were propagated to instead of going back through the layers.

    An optimizer that takes it from here (:class:`mmkd.training.optim.PropagatedAdamW`) makes the last layer back and its
    step one pass; no gradient ``[N, d]`` is written. Belongs to the optimizer that asked the model's ``hold_gradient`` for it;
    when that is gone, gradients are autograd's again.

    Attributes:
        rows: int64 ``[n]``, node ids. grad: ``[n, d]``, of what ``propagate`` gave for them; None before a backward pass.
        l2: ``[n]``, weights of an L2 term on the table's rows, or None. gather: as in `propagate`.
    """

    def __init__(self, graph: BipartiteGraph, layers: int, gather: torch.dtype | None = None) -> None:
        self.graph, self.layers, self.gather = graph, layers, gather
        self.clear()

    def clear(self) -> None:
        """Forgets it: a step was made, or another begins."""
        self.rows: Tensor | None = None
        self.grad: Tensor | None = None
        self.l2: Tensor | None = None
        self._ascend = False

    def put(self, rows: Tensor, grad: Tensor, l2: Tensor | None = None, ascending: bool = False) -> None:
        """What a backward pass arrives with; a second one before a step is an error. ascending: the rows are known to ascend,
        each once."""
        if self.grad is not None:
            raise RuntimeError(
                "a second backward pass before step(): one forward(rows) a step, optimizer.materialize() between two, or "
                "optimizer.zero_grad() to drop the first"
            )
        self.rows, self.grad, self.l2, self._ascend = rows, grad, l2, ascending

    def in_order(self) -> bool:
        """Whether the rows ascend, each once."""
        if self._ascend:
            return True
        rows = self.rows.cpu().numpy()  # a tenth of what torch takes for three small ops
        return bool((rows[1:] > rows[:-1]).all())

    def dense(self, table: Tensor) -> Tensor:
        """``[N, d]``, what autograd would have given."""
        with torch.no_grad():
            leaf = table.detach().requires_grad_()
            with torch.enable_grad():
                out = ops.propagate(self.graph, leaf, self.layers, rows=self.rows, gather=self.gather)
            (full,) = torch.autograd.grad(out, leaf, self.grad)
            if self.l2 is not None:
                full.index_add_(0, self.rows, self.l2[:, None] * table.index_select(0, self.rows))
            return full


class _Hold(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table: Tensor, held: RowGradient, rows: Tensor) -> Tensor:
        ctx.held = held
        ctx.save_for_backward(rows)
        return ops.propagate(held.graph, table.detach(), held.layers, rows=rows, gather=held.gather)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        ctx.held.put(*ctx.saved_tensors, grad)
        return None, None, None


def propagated(
    graph: BipartiteGraph, x: Tensor, layers: int, rows: Tensor | None, compute: torch.dtype | None,
    held: RowGradient | None,
) -> Tensor:  # fmt: skip
    """``propagate`` as the models train with it: in the type ``compute``, and into ``held`` where it is to hold the gradient."""
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    gather = gathered_in(x, compute)
    # what `held` was made for may have changed since
    holds = held is not None and held.gather == gather and (compute is None or gather is not None)
    if holds and rows is not None and torch.is_grad_enabled() and not transformed:
        return _Hold.apply(x, held, rows)
    if gather is not None and torch.is_grad_enabled():
        return ops.propagate(graph, x, layers, rows=rows, gather=gather)
    return ops.propagate(graph, rounded(x, compute), layers, rows=rows)


def can_hold(table: Tensor, compute: torch.dtype | None) -> bool:
    """Whether there is a kernel that takes a :class:`RowGradient` of this table."""
    if table.dtype not in (torch.float32, torch.float64) or not table.is_contiguous():
        return False
    kernel = backends.why_not("propagate_adamw", "cpp", table.device.type) is None
    return kernel and (compute is None or gathered_in(table, compute) is not None)


class HoldsGradient:
    """Part of a module whose ``table`` is propagated, for an optimizer that takes a :class:`RowGradient`.

    The module only refers to it: without its optimizer, and in copies of the module, gradients are autograd's.
    """

    _held: weakref.ref[RowGradient] | None = None

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_held"}

    @property
    def held(self) -> RowGradient | None:
        """Where backward passes leave the table's gradient; None: in ``table.grad``."""
        return None if self._held is None else self._held()

    def _hold(self, graph: BipartiteGraph, layers: int, compute: torch.dtype | None) -> RowGradient | None:
        held = self.held
        if held is None and can_hold(self.table, compute):
            held = RowGradient(graph, layers, gathered_in(self.table, compute))
            self._held = weakref.ref(held)
        return held


class LightGCN(HoldsGradient, nn.Module):
    """``E = 1/(L+1) sum_l A_hat^l E0`` over a table ``E0`` of users, then items.

    Args:
        graph: train interactions, ``N = U + I`` nodes.
        table: ``E0``, ``[N, d]``; copied.
        layers: ``L``.
        compute: type of the table in training's propagation, for instance ``torch.bfloat16``; sums and the weights keep
            theirs. bfloat16 over a float32 table on a CPU is what layers are gathered in and nothing else; otherwise also
            what is added and what comes back. Without gradients (evaluation, export) it is not used.

    Shape:
        ``forward()`` gives ``[N, d]``; ``forward(rows)`` only those rows, ``[len(rows), d]``.
    """

    def __init__(self, graph: BipartiteGraph, table: Tensor, layers: int, compute: torch.dtype | None = None) -> None:
        super().__init__()
        if table.ndim != 2 or table.shape[0] != graph.num_nodes:
            raise ValueError(f"table: expected [{graph.num_nodes}, d] (users, then items), got {tuple(table.shape)}")
        self.graph = graph
        self.layers, self.compute = layers, compute
        self.table = nn.Parameter(table.detach().clone())

    def hold_gradient(self) -> RowGradient | None:
        """While the caller keeps the result, backward passes leave the table's gradient in it, not in ``table.grad``; None
        where they cannot."""
        return self._hold(self.graph, self.layers, self.compute)

    def forward(self, rows: Tensor | None = None) -> Tensor:
        return propagated(self.graph, self.table, self.layers, rows, self.compute, self.held)

    def tables(self) -> tuple[Tensor, Tensor]:
        """Final embeddings of users ``[U, d]`` and items ``[I, d]``, without gradient."""
        with torch.no_grad():
            users, items = self().split([self.graph.num_users, self.graph.num_items])
        return users, items


def matching_table(
    graph: BipartiteGraph, target: Tensor, layers: int, *, ridge: float = 1e-3, steps: int = 60
) -> Tensor:
    """The layer-0 table whose propagation comes nearest to ``target``: ``argmin_x ||P x - target||^2 + ridge ||x||^2``.

    ``P = 1/(L+1) sum_l A_hat^l`` is symmetric; conjugate gradients on ``(P^2 + ridge) x = P target``, all columns at once.
    A table that starts a student at ``target`` itself is smoothed ``L`` more times before it is ever used.

    Args:
        target: ``[N, d]``. layers: ``L``; 0 returns ``target``.
        ridge: keeps directions that ``P`` nearly removes small. steps: of the solver.

    Returns:
        ``[N, d]``, without gradient.
    """
    if layers == 0:
        return target.detach().clone()
    with torch.no_grad():
        residual = ops.propagate(graph, target, layers)
        x, direction = torch.zeros_like(residual), residual.clone()
        square = residual.square().sum(0)
        for _ in range(steps):
            image = ops.propagate(graph, ops.propagate(graph, direction, layers), layers) + ridge * direction
            step = square / (direction * image).sum(0).clamp_min(1e-30)
            x += step * direction
            residual -= step * image
            before, square = square, residual.square().sum(0)
            direction = residual + square / before.clamp_min(1e-30) * direction
    return x
