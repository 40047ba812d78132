"""The student's whole loss straight from a collapsed teacher's constants, against eager, torch.compile and our own two ops."""

from __future__ import annotations

import pytest
import steps
import torch
from harness import compiled, forward_backward

from mmkd import ops, reference


@pytest.mark.parametrize("name", ["tiktok", "netflix", "electronics"])
@pytest.mark.parametrize("emb", ["sampled", "all"])
def bench_distill_frozen(compare, name, emb):
    task = steps.student(name, emb_sample=1024 if emb == "sampled" else None).task
    drawn, teacher, first_item = task.batch(0, 0), task.teacher, task.graph.num_users
    batch, constants = drawn.nodes, (teacher.content, teacher.design, teacher.ids, teacher.omega)
    table = task.student(batch.rows).detach().requires_grad_()
    state = teacher.state().detach().requires_grad_()
    own = batch.num_users, batch.users, batch.candidates
    asked = drawn.asked, drawn.candidates, first_item
    d = task.distill
    weights = 1.0, d.pair, d.list, d.emb
    by = {"list_modalities": task.modality_weights, "emb_modalities": task.emb_modalities}

    def ours(table, state):
        return ops.distill_frozen_loss(table, *own, batch.extra, *constants, state, *asked, weights=weights, **by)[0]

    def two(table, state):
        margin, logits, targets = ops.frozen_teacher(*constants, state, *asked)
        return ops.distill_loss(table, *own, margin, logits, batch.extra, targets, weights=weights, **by)[0]

    def eager(table, state):
        return reference.distill_frozen(
            table, *own, batch.extra, *constants, state, *asked, weights, 1.0, "bernoulli", 1.0, 1.0, 1.0, "coupled", 2.0,
            task.modality_weights, task.emb_modalities,
        )[0]  # fmt: skip

    leaves = [table, state]
    for rival in (two, eager):
        torch.testing.assert_close(ours(*leaves), rival(*leaves), rtol=1e-4, atol=1e-5)
        for mine, theirs in zip(*(torch.autograd.grad(f(*leaves), leaves) for f in (ours, rival)), strict=True):
            assert (mine - theirs).norm() < 1e-3 * theirs.norm()
    fused = compiled(eager)

    def step(function):
        return forward_backward(lambda: function(*leaves), leaves)

    modalities, _, width = teacher.content.shape
    e, listed, nodes = width + 1, drawn.candidates.numel(), len(drawn.asked)
    compare(
        "distill_frozen", f"{name} M={modalities}, EmbKD {emb}, fwd+bwd", step(ours),
        {"eager": step(eager), "torch.compile": fused and step(fused), "our two ops": step(two)}, memory=True,
        # rows of C and K once; the student's rows of the pairs both ways and of EmbKD, and the gradient of its table
        moved_bytes=4 * ((nodes + listed) * (modalities * width + e) + width * (3 * listed + 2 * len(batch.extra) + len(table))),
        flops=4 * modalities * e * width * (nodes + len(drawn.candidates)),
    )  # fmt: skip
