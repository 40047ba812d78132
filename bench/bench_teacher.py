"""A teacher's ranking losses over a batch in one call, forward and backward: `BPR(E^T) + mu sum_m BPR(F^m) + nu BPR(p)` at a step's
rows, against eager, torch.compile and our own ops of its parts. Whole steps against eager: `bench_step.py`."""

from __future__ import annotations

import pytest
import steps
import torch
from harness import compiled, forward_backward

from mmkd import ops, reference

WEIGHTS = (1.0, 0.1, 0.1)


@pytest.mark.parametrize("name", ["tiktok", "netflix", "electronics"])
def bench_teacher(compare, name):
    task = steps.teacher_step(name).task
    drawn, model = task.batch(0, 0), task.model
    batch = drawn.nodes
    with torch.no_grad():
        ids, users, items = model.parts(batch.rows, batch.num_users, drawn.mask, drawn.item_rows)
        tables = ids, users, items, model.prompt_at(batch.rows)
    leaves = [t.detach().clone().requires_grad_() for t in tables]
    pairs = batch.users, batch.pos, batch.neg, model.omega.detach()

    def ours():
        return ops.teacher_loss(*leaves[:3], *pairs, leaves[3], weights=WEIGHTS)[0]

    def parts():
        return ops.teacher.composed(*leaves[:3], *pairs, leaves[3], WEIGHTS)[0]

    def eager():
        return reference.teacher(*leaves[:3], *pairs, leaves[3], WEIGHTS)[0]

    torch.testing.assert_close(ours(), eager(), rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(*(torch.autograd.grad(f(), leaves) for f in (ours, eager)), strict=True):
        assert (mine - theirs).norm() < 1e-5 * theirs.norm()
    fused = compiled(eager)
    rivals = {
        "eager": forward_backward(eager, leaves), "torch.compile": fused and forward_backward(fused, leaves),
        "our ops of its parts": forward_backward(parts, leaves),
    }  # fmt: skip
    compare("teacher", f"{name} M={len(model.features)} n={len(batch.rows)} B={len(batch.users)} fwd+bwd",
            forward_backward(ours, leaves), rivals, memory=True)  # fmt: skip
