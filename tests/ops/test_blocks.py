"""Results of 4 MB and more live on blocks that are used again."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from mmkd import BipartiteGraph, ops
from mmkd._library import build_info

LARGE = 40_000  # rows of 32 floats: 5 MB
kept = pytest.mark.skipif(
    build_info().get("sanitize") != "off" or not sys.platform.startswith("linux"),
    reason="a sanitizer build keeps no blocks",
)


@pytest.fixture
def graph():
    users = torch.arange(LARGE // 2)
    return BipartiteGraph.from_edges(users, (users * 7) % (LARGE // 2), num_users=LARGE // 2, num_items=LARGE // 2)


@kept
def test_a_dead_results_block_is_used_again_and_a_live_ones_is_not(graph):
    torch.ops.mmkd.release_memory()
    x = torch.randn(graph.num_nodes, 32)
    first = ops.propagate(graph, x, 1)
    wanted, at = first.clone(), first.data_ptr()
    second = ops.propagate(graph, 2 * x, 1)
    assert second.data_ptr() != at and torch.equal(first, wanted)
    del first
    again = ops.propagate(graph, x, 1)
    assert again.data_ptr() == at and torch.equal(again, wanted)
    del again
    assert torch.ops.mmkd.release_memory() >= x.numel() * 4
    assert torch.ops.mmkd.release_memory() == 0
    assert torch.equal(second, 2 * wanted)


@kept
def test_views_and_gradients_keep_the_block_alive(graph):
    x = torch.randn(graph.num_nodes, 32, requires_grad=True)
    view = ops.propagate(graph, x, 2).detach()[5:9]
    wanted = view.clone()
    for _ in range(3):
        ops.propagate(graph, x, 2).square().sum().backward()
    others = [torch.ops.mmkd.release_memory(), ops.propagate(graph, torch.zeros_like(x), 2)]
    assert torch.equal(view, wanted) and len(others) == 2
    x.grad = None
    ops.propagate(graph, x, 2).sum().backward()
    assert x.grad.shape == x.shape and x.grad.is_contiguous()


@kept
def test_nothing_is_kept_where_the_limit_is_zero():
    code = """
import torch
from mmkd import ops
x = torch.randn(60000, 32)
loss = ops.emb_kd_loss(x.requires_grad_(), torch.randn(1, 60000, 32), gamma=2.0)
loss.backward(); x.grad = None; del loss
print(torch.ops.mmkd.release_memory())
"""
    for limit, least, most in (("0", 0, 0), ("256", 60000 * 32 * 4, 256 << 20)):
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"MMKD_KEEP_MB": limit}, capture_output=True, text=True
        )
        assert least <= int(done.stdout) <= most, done.stderr
