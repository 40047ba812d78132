"""ListKD of two modalities against eager and torch.compile of the same."""

from __future__ import annotations

import floor
import pytest
import torch
from cases import batch
from harness import compiled, forward_backward

from mmkd import ops, reference


@pytest.mark.parametrize("form", ["full", "compact"])
@pytest.mark.parametrize("name", ["tiktok", "netflix", "electronics", "amazon-book"])
def bench_list_kd(compare, name, form):
    b = batch(name) if form == "full" else batch(name).compact()
    leaves = [b.user_emb, b.item_emb]

    def eager(user_emb, item_emb):
        return reference.list_kd(reference.list_scores(user_emb, item_emb, b.users, b.candidates), b.teacher_logits)

    def ours():
        return ops.list_kd_loss(*leaves, b.users, b.candidates, b.teacher_logits)

    eager(*leaves)  # torch's first one in a process is now and then 2e-5 away from all that follow
    torch.testing.assert_close(ours(), eager(*leaves))
    fused = compiled(eager)
    compare(
        "list_kd", f"{name} {form} M=2 fwd+bwd", forward_backward(ours, leaves),
        {"eager": forward_backward(lambda: eager(*leaves), leaves),
         "torch.compile": fused and forward_backward(lambda: fused(*leaves), leaves),
         "floor: a call of nothing": forward_backward(floor.call_alone(leaves), leaves)},
        targets=dict.fromkeys(("eager", "torch.compile"), 7 if form == "full" else 8), memory=True,
        moved_bytes=4 * (3 * b.candidates.numel() * b.user_emb.shape[1] + b.user_emb.numel() + b.item_emb.numel()),
    )  # fmt: skip
