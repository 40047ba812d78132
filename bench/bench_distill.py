"""The student's whole loss (BPR, PairKD, ListKD, EmbKD) against the same composed: our own single ops, eager, torch.compile."""

from __future__ import annotations

import pytest
import torch
from cases import NUM_MODALITIES, batch
from harness import compiled, forward_backward

from mmkd import ops, reference

WEIGHTS = (1.0, 0.1, 0.1, 0.01)
NODES = 1024  # that EmbKD looks at


@pytest.mark.parametrize("name", ["tiktok", "netflix", "electronics", "amazon-book"])
def bench_distill(compare, name):
    b = batch(name).compact()
    num_users, width = b.user_emb.shape
    table = torch.cat([b.user_emb, b.item_emb]).detach().requires_grad_()
    torch.manual_seed(0)
    nodes = torch.randint(num_users, len(table), (NODES,))
    margin, logits, targets = (
        t.requires_grad_()
        for t in (b.teacher_margin.clone(), b.teacher_logits.clone(), torch.randn(NUM_MODALITIES, NODES, width))
    )
    leaves = [table, margin, logits, targets]  # the teacher's prompt learns, so all of its outputs get gradients

    def ours():
        return ops.distill_loss(
            table, num_users, b.users, b.candidates, margin, logits, nodes, targets, weights=WEIGHTS
        )[0]

    def single():
        users, items = table.split([num_users, len(table) - num_users])
        bpr, pair = ops.bpr_pair_kd_loss(users, items, b.users, b.candidates[:, 0], b.candidates[:, 1], margin)
        by_list = ops.list_kd_loss(users, items, b.users, b.candidates, logits)
        emb = ops.emb_kd_loss(table.index_select(0, nodes), targets)
        return sum(w * t for w, t in zip(WEIGHTS, (bpr, pair, by_list, emb), strict=True))

    def eager(table, margin, logits, targets):
        return reference.distill(
            table, num_users, b.users, b.candidates, margin, logits, nodes, targets, WEIGHTS, 1.0, "bernoulli", 1.0, 1.0,
            1.0, "coupled", 2.0, None, None,
        )[0]  # fmt: skip

    for rival in (single, lambda: eager(*leaves)):
        torch.testing.assert_close(ours(), rival())
        for mine, theirs in zip(torch.autograd.grad(ours(), leaves), torch.autograd.grad(rival(), leaves), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    fused = compiled(eager)
    compare(
        "distill", f"{name} compact M={NUM_MODALITIES} fwd+bwd", forward_backward(ours, leaves),
        {"eager": forward_backward(lambda: eager(*leaves), leaves),
         "torch.compile": fused and forward_backward(lambda: fused(*leaves), leaves),
         "our single ops": forward_backward(single, leaves)},
        memory=True,
        # rows of the pairs, both ways, and of EmbKD; the gradients of table and targets
        moved_bytes=4 * width * (3 * b.candidates.numel() + len(table) + (2 + 2 * NUM_MODALITIES) * NODES),
    )  # fmt: skip
