"""What the kernels do differently from processor to processor (prefetches, stores past the caches) changes no bit."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import hashlib
import torch
from mmkd import BipartiteGraph, ops

torch.manual_seed(0)
users, items, n = 30_000, 12_000, 200_000  # tables of 10.8 MB: more than a quarter of 32 MB, and far for a prefetch
g = BipartiteGraph.from_edges(torch.randint(users, (n,)), torch.randint(items, (n,)), num_users=users, num_items=items)
digest = hashlib.sha256()


def show(*tensors):
    for t in tensors:
        digest.update(t.detach().contiguous().view(torch.uint8).numpy().tobytes())


for dtype in (torch.float32, torch.bfloat16):
    x = torch.randn(g.num_nodes, 64).to(dtype)
    show(ops.spmm(g.rowptr, g.col, x, row_scale=g.scale, col_scale=g.scale))
    few, many = torch.randperm(g.num_nodes)[:2000].sort().values, torch.arange(users, users + items)
    for rows in (None, few, many):
        leaf = x.clone().requires_grad_()
        out = ops.propagate(g, leaf, 2, rows=rows)
        out.square().sum().backward()
        show(out, leaf.grad)
x = torch.randn(g.num_nodes, 64)
for rows in (None, few, many):
    leaf = x.clone().requires_grad_()
    out = ops.propagate(g, leaf, 2, rows=rows, gather=torch.bfloat16)
    out.square().sum().backward()
    show(out, leaf.grad)
weight, avg, avg_sq = (torch.randn(g.num_nodes, 64).abs_() for _ in range(3))
ops.propagate_adamw_(g, torch.randn(2000, 64), 2, few, weight, avg, avg_sq, step=1, lr=0.1)
ops.propagate_adamw_(g, torch.randn(2000, 64), 2, few, weight, avg, avg_sq, step=2, lr=0.1, gather=torch.bfloat16)
show(weight, avg, avg_sq)
u, v = torch.randn(users, 64, requires_grad=True), torch.randn(items, 64, requires_grad=True)
pairs = [torch.randint(k, (1024,)) for k in (users, items, items)]
sum(ops.bpr_pair_kd_loss(u, v, *pairs, torch.randn(1024))).backward()
ops.emb_kd_loss(u, torch.randn(2, users, 64), gamma=2.0).backward()
show(u.grad, v.grad)
print(digest.hexdigest())
"""


def test_prefetches_and_stores_past_the_caches_change_no_bit():
    def bits(far: str, cache_mb: str) -> str:
        setting = {"MMKD_FAR_PREFETCH": far, "MMKD_CACHE_MB": cache_mb}
        done = subprocess.run([sys.executable, "-c", CODE], env=os.environ | setting, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert bits("1", "32") == bits("0", "4096")  # with 32 MB the tables above are written past the caches


@pytest.mark.parametrize(
    ("name", "value"), [("MMKD_FAR_PREFETCH", "off"), ("MMKD_CACHE_MB", "auto"), ("MMKD_CACHE_MB", "-5")]
)
def test_a_wrong_setting_is_refused_by_name(name, value):
    code = CODE.split("for dtype in")[0] + "x = torch.randn(g.num_nodes, 64)\nops.spmm(g.rowptr, g.col, x)"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {name: value}, capture_output=True, text=True)
    assert done.returncode != 0 and f"{name}: expected a whole number from" in done.stderr, done.stderr
