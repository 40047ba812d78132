"""BPR + PairKD in one pass against eager and torch.compile of the same."""

from __future__ import annotations

import floor
import pytest
import torch
from cases import batch
from harness import compiled, forward_backward

from mmkd import ops, reference


@pytest.mark.parametrize("form", ["full", "compact"])
@pytest.mark.parametrize("name", ["tiktok", "netflix", "electronics", "amazon-book"])
def bench_bpr_pair_kd(compare, name, form):
    b = batch(name) if form == "full" else batch(name).compact()
    where, leaves = (b.users, b.pos, b.neg), [b.user_emb, b.item_emb]

    def eager(user_emb, item_emb):
        margin = reference.margins(user_emb, item_emb, *where)
        return reference.bpr(margin) + reference.pair_kd(margin, b.teacher_margin)

    def ours():
        return sum(ops.bpr_pair_kd_loss(*leaves, *where, b.teacher_margin))

    torch.testing.assert_close(ours(), eager(*leaves))
    fused = compiled(eager)
    compare(
        "bpr_pair_kd", f"{name} {form} fwd+bwd", forward_backward(ours, leaves),
        {"eager": forward_backward(lambda: eager(*leaves), leaves),
         "torch.compile": fused and forward_backward(lambda: fused(*leaves), leaves),
         "floor: a call of nothing": forward_backward(floor.call_alone(leaves), leaves)},
        targets=dict.fromkeys(("eager", "torch.compile"), 5 if form == "full" else 8), memory=True,
        # rows read forward and backward, dense gradients written
        moved_bytes=4 * (6 * b.users.numel() * b.user_emb.shape[1] + b.user_emb.numel() + b.item_emb.numel()),
    )  # fmt: skip
