"""What a student's step asks of the collapsed frozen teacher, against eager and torch.compile of the same."""

from __future__ import annotations

import pytest
import steps
import torch
from harness import compiled

from mmkd import ops, reference
from mmkd.ops.frozen_teacher import composed


@pytest.mark.parametrize("name", ["tiktok", "netflix", "electronics"])
def bench_frozen_teacher(compare, name):
    task = steps.student(name, emb_sample=1024).task
    drawn, teacher, g = task.batch(0, 0), task.teacher, task.graph
    constants = (teacher.content, teacher.design, teacher.ids, teacher.omega)
    state = teacher.state().detach().requires_grad_()
    where = (drawn.asked, drawn.candidates, g.num_users)
    weights = [torch.randn(o.shape) for o in ops.frozen_teacher(*constants, state, *where)]

    def step(function):
        def run() -> None:
            torch.autograd.backward(function(state), weights)
            state.grad = None

        return run

    def ours(z):
        return ops.frozen_teacher(*constants, z, *where)

    def eager(z):
        return reference.frozen_teacher(*constants, z, *where)

    def products(z):
        return composed(*constants, z, *where)

    for rival in (eager, products):
        for mine, theirs in zip(ours(state), rival(state), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    fused = compiled(eager)
    modalities, _, d = teacher.content.shape
    e, asked, listed = d + 1, len(drawn.asked), drawn.candidates.numel()
    compare(
        "frozen_teacher", f"{name} M={modalities} fwd+bwd", step(ours),
        {"eager": step(eager), "torch.compile": fused and step(fused), "baddbmm + list_scores": step(products)}, memory=True,
        # rows of C and K read both ways; the products with Z and Z^T, and their transposes
        moved_bytes=2 * 4 * (asked + listed) * (modalities * d + e),
        flops=4 * modalities * e * d * (asked + len(drawn.candidates)),
    )  # fmt: skip
