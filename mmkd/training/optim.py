"""AdamW for a model whose table is propagated."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import profiler
from torch.optim.optimizer import _global_optimizer_post_hooks as _global_post_hooks
from torch.optim.optimizer import _global_optimizer_pre_hooks as _global_pre_hooks

from mmkd.models.lightgcn import RowGradient
from mmkd.ops._checks import check_no_grad


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
        if set_to_none:  # without torch's wrapping, which takes longer
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad = None
        else:
            super().zero_grad(set_to_none=False)
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
        if self._watched():
            return _watched_step(self)
        return self._step()

    step.hooked = True  # type: ignore[attr-defined]  # torch wraps steps that are not; that takes as long as one of small tensors

    def _watched(self) -> bool:
        """Whether hooks or a profiler are to see the step."""
        own = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
        return bool(own or _global_pre_hooks or _global_post_hooks or profiler._is_profiler_enabled)

    def _step(self) -> None:
        held = self.held
        if held is not None and held.grad is not None:
            own = self._table_group()
            if self.table.grad is not None or not self._plain(own) or not held.in_order():
                self.materialize()
            else:
                self._step_table(held, own)
                others = [group for group in self.param_groups if group is not own or len(own["params"]) > 1]
                if all(map(self._plain, others)):
                    self._step_others(others)
                    return
        torchs: Any = torch.optim.AdamW.step
        (torchs.__wrapped__ if getattr(torchs, "hooked", False) else torchs)(self)  # hooks have run

    def _table_group(self) -> dict[str, Any]:
        """The group that has the table."""
        for group in self.param_groups:
            for p in group["params"]:
                if p is self.table:
                    return group
        raise ValueError("params: expected the model's table among them")

    def _plain(self, group: dict[str, Any]) -> bool:
        """Whether a group wants nothing but AdamW of tensors of one kind beside the table, in a step that no `GradScaler`
        has a word in."""
        if group["fused"] is not True or group["maximize"] or group["amsgrad"]:
            return False
        if group["capturable"] or group["differentiable"]:
            return False
        if getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None:
            return False
        params = group["params"]
        dtype, device = params[0].dtype, self.table.device
        if not dtype.is_floating_point:
            return False
        for p in params:
            grad = p.grad
            if p.dtype != dtype or p.device != device or (grad is not None and grad.is_sparse):
                return False
        return True

    def _step_table(self, held: RowGradient, group: dict[str, Any]) -> None:
        """By the kernel itself, which checks again what the door checks."""
        state, table, graph, l2 = self._state(self.table), self.table, held.graph, held.l2
        if l2 is not None:
            check_no_grad(l2, "l2")
            l2 = l2.to(table.dtype).contiguous()
        beta1, beta2 = group["betas"]
        with torch._C._AutoDispatchBelowAutograd():
            torch.ops.mmkd.propagate_adamw.default(
                graph.rowptr, graph.col, graph.scale_as(table.dtype), held.grad.contiguous(), held.layers, held.rows.contiguous(), l2,
                table, state["exp_avg"], state["exp_avg_sq"], float(group["lr"]), beta1, beta2, group["eps"],
                group["weight_decay"], int(state["step"]) + 1, held.gather is not None,
            )  # fmt: skip
        state["step"] += 1  # a step that was refused does not count
        held.clear()

    @torch.no_grad()
    def _step_others(self, groups: list[dict[str, Any]]) -> None:
        """Of the small tensors beside the table, by the op torch's step ends in: what is around it takes five times as long."""
        for group in groups:
            ready = [p for p in group["params"] if p.grad is not None]
            if not ready:
                continue
            states = [self._state(p) for p in ready]
            steps = [state["step"] for state in states]
            torch._foreach_add_(steps, 1)
            beta1, beta2 = group["betas"]
            torch._fused_adamw_(
                ready, [p.grad for p in ready], [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states], [], steps,
                lr=float(group["lr"]), beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"],
                amsgrad=False, maximize=False,
            )  # fmt: skip

    def _state(self, p: Tensor) -> dict[str, Tensor]:
        """AdamW's of a parameter, as torch makes it."""
        state: dict[str, Tensor] = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state


_watched_step = torch.optim.Optimizer.profile_hook_step(PropagatedAdamW._step)
