"""AdamW for a model whose table is propagated."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mmkd import ops
from mmkd.models.lightgcn import RowGradient


class Propagated(Protocol):
    """A model with a table of free rows that are propagated."""

    table: nn.Parameter
    held: RowGradient | None

    def hold_gradient(self) -> RowGradient | None: ...


class PropagatedAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW(fused=True)` that steps `model.table` while the last layer of its gradient is made; it rounds where
    torch does (:func:`mmkd.ops.propagate_adamw_`).

    Where the model cannot hold its gradient back (a GPU, a table that is not only propagated) it is
    torch's and nothing else. State and checkpoints are the same.

    Args:
        model: its `hold_gradient` is asked; the table is one of the parameters. One `forward(rows)` a step; to look at the
            table's gradient, to clip it or to add to it, call :meth:`materialize` first.
        params, lr: as torch's; decay is 0 unless a group says otherwise.
    """

    table: nn.Parameter | None = None  # of a copy: torch's optimizer and nothing else
    held: RowGradient | None = None

    def __init__(self, model: Propagated, params: Iterable[dict[str, Any]], lr: float) -> None:
        super().__init__(params, lr=lr, weight_decay=0.0, fused=True)
        if not any(p is model.table for group in self.param_groups for p in group["params"]):
            raise ValueError("params: expected the model's table among them")
        self.table, self.held = model.table, model.hold_gradient()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Also of what the model holds."""
        super().zero_grad(set_to_none)
        if self.held is not None:
            self.held.clear()

    def materialize(self) -> None:
        """Puts what the model holds into `table.grad`, for who wants to look at it or change it; `step` is then torch's."""
        if self.held is None or self.held.grad is None:
            return
        full = self.held.dense(self.table)
        self.table.grad = full if self.table.grad is None else self.table.grad + full
        self.held.clear()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step."""
        if closure is not None:
            raise ValueError("closure: expected None; call backward() before step()")
        if self.held is not None and self.held.grad is not None:
            group = next(g for g in self.param_groups if any(p is self.table for p in g["params"]))
            changed = self.table.grad is not None or group["maximize"] or group["amsgrad"]
            if changed or not self.held.in_order():
                self.materialize()
            else:
                self._step_table(self.held, group)
        return super().step()

    def _step_table(self, held: RowGradient, group: dict[str, Any]) -> None:
        state: dict[str, Tensor] = self.state[self.table]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(self.table, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(self.table, memory_format=torch.preserve_format)
        ops.propagate_adamw_(
            held.graph, held.grad, held.layers, held.rows, self.table.detach(), state["exp_avg"], state["exp_avg_sq"],
            step=int(state["step"]) + 1, lr=float(group["lr"]), betas=group["betas"], eps=group["eps"],
            weight_decay=group["weight_decay"], l2=held.l2, gather=held.gather,
        )  # fmt: skip
        state["step"] += 1  # a step that was refused does not count
        held.clear()
