"""EmbKD over all items, two modalities, against eager and torch.compile of the same."""

from __future__ import annotations

import pytest
import torch
from cases import DIM, NUM_MODALITIES, SIZES
from harness import compiled, forward_backward

from mmkd import ops, reference


@pytest.mark.parametrize("name", ["tiktok", "netflix", "electronics", "amazon-book"])
def bench_emb_kd(compare, name):
    torch.manual_seed(0)
    student = torch.randn(SIZES[name][1], DIM, requires_grad=True)
    teachers = torch.randn(NUM_MODALITIES, *student.shape)

    def eager(e):
        # the short form, without the zero-row guards of the reference: the fastest way people write it
        return sum((1 - torch.cosine_similarity(e, f, dim=-1)).pow(2).mean() for f in teachers)

    def ours():
        return ops.emb_kd_loss(student, teachers)

    torch.testing.assert_close(ours(), reference.emb_kd(student, teachers))
    fused = compiled(eager)
    compare(
        "emb_kd", f"{name} all items M=2 fwd+bwd", forward_backward(ours, [student]),
        {"eager": forward_backward(lambda: eager(student), [student]),
         "torch.compile": fused and forward_backward(lambda: fused(student), [student])},
        targets=dict.fromkeys(("eager", "torch.compile"), 2.5), memory=True,
        moved_bytes=4 * student.numel() * (1 + NUM_MODALITIES + 1),
    )  # fmt: skip
