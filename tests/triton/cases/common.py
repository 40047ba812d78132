"""One comparison of value and gradients for every op, on the Triton kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.ops.grid import within_budget


def compare(f: Callable[..., Tensor], leaves: Sequence[Tensor], seed: int = 0) -> None:
    """Value and gradients of `f(*leaves, impl=...)`, in budget against float64 and same-dtype eager."""
    weight = None

    def run(wide: bool, impl: str) -> list[Tensor]:
        nonlocal weight
        own = [(t.double() if wide else t).detach().clone().requires_grad_() for t in leaves]
        out = f(*own, impl=impl)
        if weight is None:
            weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            weight = weight if out.dim() else torch.ones(())
        out.backward(weight.to(out.dtype))
        return [out.detach(), *(t.grad for t in own)]

    truth, ours, eager = run(True, "reference"), run(False, "triton"), run(False, "reference")
    for o, e, t in zip(ours, eager, truth, strict=True):
        assert o.dtype == e.dtype
        within_budget(o, e, t, leaves[0].dtype)


def gradients(f: Callable[..., Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of `f(*leaves, impl="triton")`."""
    own = [t.detach().clone().requires_grad_() for t in leaves]
    f(*own, impl="triton").backward()
    return [t.grad for t in own]


def each_alone(f: Callable[..., Tensor], leaves: Sequence[Tensor]) -> None:
    """Each gradient asked for by itself equals the one computed with the others."""
    together = gradients(f, leaves)
    for wanted in range(len(leaves)):
        own = [t.detach().clone().requires_grad_(i == wanted) for i, t in enumerate(leaves)]
        f(*own, impl="triton").backward()
        torch.testing.assert_close(own[wanted].grad, together[wanted])
        assert all(t.grad is None for i, t in enumerate(own) if i != wanted)
