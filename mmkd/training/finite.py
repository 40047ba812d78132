"""Where a NaN or Inf came from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmkd.finite import all_finite


def first_bad(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> str | None:
    """Name of the first tensor that holds NaN or Inf."""
    named = tensors.items() if isinstance(tensors, Mapping) else tensors
    return next((name for name, t in named if t.is_floating_point() and not all_finite(t)), None)


class _FirstBadOp(TorchDispatchMode):
    """Remembers the first op, forward or backward, that got finite numbers and gave back others."""

    def __init__(self) -> None:
        super().__init__()
        self.name: str | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.name().split(".")[0]
        if self.name is None and "empty" not in name and _bad(out) and not _bad((args, kwargs)):
            self.name = name
        return out


def _bad(tree: object) -> bool:
    leaves = (t for t in tree_leaves(tree) if isinstance(t, Tensor) and t.is_floating_point())
    return any(not all_finite(t) for t in leaves)


def origin(model: nn.Module, step: Callable[[], object]) -> str:
    """Why a step gives NaN or Inf, found by running it once more: the parameter that holds one already, or the first op
    whose result holds one though its arguments do not."""
    name = first_bad(model.named_parameters())
    if name is not None:
        return f"parameter {name} already holds NaN or Inf, from the gradient of an earlier step"
    with _FirstBadOp() as seen:
        step()
    return (
        f"first seen in the result of {seen.name}" if seen.name else "no op alone gives it when the step is run again"
    )
