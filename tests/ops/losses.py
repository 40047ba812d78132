"""What the tests of the loss ops share: batches, and one comparison of value and every gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.ops.grid import within_budget


def tables(
    dtype: torch.dtype, d: int, num_users: int = 13, num_items: int = 17, seed: int = 0
) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    scale = 1 / d**0.5
    return (torch.randn(num_users, d) * scale**0.5).to(dtype), (torch.randn(num_items, d) * scale**0.5).to(dtype)


def compare(loss: Callable[..., Tensor], leaves: list[Tensor], dtype: torch.dtype) -> None:
    """Value and gradients of `loss(*leaves, impl=...)` on the kernels, in budget against float64 and same-dtype eager."""

    def run(kind: torch.dtype | None, impl: str) -> list[Tensor]:
        own = [(t.double() if kind == torch.float64 else t).detach().clone().requires_grad_() for t in leaves]
        out = loss(*own, impl=impl)
        out.backward()
        return [out.detach(), *(t.grad for t in own)]

    truth, ours, eager = run(torch.float64, "reference"), run(None, "cpp"), run(None, "reference")
    assert ours[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for o, e, t, leaf in zip(ours[1:], eager[1:], truth[1:], leaves, strict=True):
        assert o.dtype == leaf.dtype
        within_budget(o, e, t, leaf.dtype)
    within_budget(ours[0], eager[0], truth[0], torch.float64 if dtype == torch.float64 else torch.float32)


def gradchecks(losses: list[Callable[..., Tensor]], leaves: list[Tensor]) -> None:
    """Every gradient of the kernels against differences of the loss, float64."""
    own = [t.detach().clone().requires_grad_() for t in leaves]
    for loss in losses:
        assert torch.autograd.gradcheck(lambda *given, loss=loss: loss(*given, impl="cpp"), own)


def each_alone(loss: Callable[..., Tensor], leaves: list[Tensor]) -> None:
    """Each gradient asked for by itself equals the one computed with all the others."""
    together = [t.detach().clone().requires_grad_() for t in leaves]
    loss(*together, impl="cpp").backward()
    for wanted in range(len(leaves)):
        own = [t.detach().clone().requires_grad_(i == wanted) for i, t in enumerate(leaves)]
        loss(*own, impl="cpp").backward()
        assert torch.equal(own[wanted].grad, together[wanted].grad)
        assert all(t.grad is None for i, t in enumerate(own) if i != wanted)


def bit_equal_for_threads(loss: Callable[..., Tensor], leaves: list[Tensor]) -> None:
    """The same bits with one thread, with two, and again."""
    before, seen = torch.get_num_threads(), []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        own = [t.detach().clone().requires_grad_() for t in leaves]
        out = loss(*own, impl="cpp")
        out.backward()
        seen.append([out.detach(), *(t.grad for t in own)])
    torch.set_num_threads(before)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))
