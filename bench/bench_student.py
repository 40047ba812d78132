"""What a student's step minimises in one call, against the ops of its parts one after the other.

Whole steps against eager: `bench_step.py`.
"""

from __future__ import annotations

import pytest
import steps
import torch
from harness import forward_backward

from mmkd import ops
from mmkd.ops.student import prompt_state


@pytest.mark.parametrize("name", ["tiktok", "netflix", "electronics"])
def bench_student(compare, name):
    """`student_loss` and the way back to the table, as an autograd loop has it."""
    task = steps.student(name, emb_sample=1024).task
    drawn, teacher, graph, prompt = task.batch(0, 0), task.teacher, task.graph, task.teacher.prompt
    batch, constants = drawn.nodes, (teacher.content, teacher.design, teacher.ids, teacher.omega)
    own = batch.num_users, batch.users, batch.candidates, batch.extra, *constants
    asked = drawn.asked, drawn.candidates, graph.num_users
    settings = task._settings()
    leaves = [t.detach().clone().requires_grad_() for t in (task.student.table, prompt.weight, prompt.bias)]

    def ours(table, weight, bias):
        given = *own, weight, bias, teacher.mixed, *asked
        return ops.student_loss(graph, table, steps.LAYERS, batch.rows, *given, l2=drawn.l2, **settings)[0]

    def parts(table, weight, bias):
        state = prompt_state(torch.cat([weight, bias[None]]), teacher.mixed, teacher.modalities)
        rows = ops.propagate(graph, table, steps.LAYERS, batch.rows)
        loss, _ = ops.distill_frozen_loss(rows, *own, state, *asked, **settings)
        return loss + 0.5 * torch.dot(drawn.l2, table.index_select(0, batch.rows).square().sum(1))

    torch.testing.assert_close(ours(*leaves), parts(*leaves), rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(*(torch.autograd.grad(f(*leaves), leaves) for f in (ours, parts)), strict=True):
        assert (mine - theirs).norm() < 1e-5 * theirs.norm()
    rivals = {"our ops of its parts": forward_backward(lambda: parts(*leaves), leaves)}
    compare("student", f"{name} M={teacher.modalities} L={steps.LAYERS}, fwd+bwd",
            forward_backward(lambda: ours(*leaves), leaves), rivals, memory=True)  # fmt: skip


@pytest.mark.parametrize("name", ["tiktok", "netflix", "electronics"])
def bench_student_gradients(compare, name):
    """The gradients of the propagated rows and of the prompt, which training takes; the rival is autograd down to the rows."""
    task = steps.student(name, emb_sample=1024).task
    drawns = [task.batch(0, step) for step in range(task.sampler.num_steps)][:64]
    counts = {"ours": 0, "parts": 0}
    optimizer = task.optimizer()

    def drawn(side):
        counts[side] += 1
        return drawns[counts[side] % len(drawns)]

    def ours():
        optimizer.zero_grad(set_to_none=True)
        task.gradients(drawn("ours"))

    def parts():
        optimizer.zero_grad(set_to_none=True)
        task._by_autograd(drawn("parts"))

    compare("student", f"{name} gradients of the rows", ours, {"autograd over our ops": parts})
