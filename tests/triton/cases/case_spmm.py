from __future__ import annotations

import pytest
import torch
from common import compare, each_alone

from mmkd import BipartiteGraph, ops
from mmkd.kernels import spmm as kernels
from tests.ops.grid import DIMS, DTYPES


def sparse(rows=7, cols=9, seed=0, index=torch.int32):
    """A pattern with an empty first row, an empty last row and one full row."""
    pattern = torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) < 0.35
    pattern[0], pattern[-1], pattern[2] = False, False, True
    rowptr = torch.cat([torch.zeros(1, dtype=torch.int64), pattern.sum(1).cumsum(0)])
    return rowptr, pattern.nonzero()[:, 1].to(index).contiguous()


def graph(users=6, items=8):
    edges = (torch.rand(users, items, generator=torch.Generator().manual_seed(1)) < 0.4).nonzero()
    edges = edges[(edges[:, 0] != 0) & (edges[:, 1] != items - 1)]  # a user and an item without edges
    return BipartiteGraph.from_edges(edges[:, 0], edges[:, 1], users, items)


@pytest.fixture(params=[512, 2], ids=["whole", "cut"])
def split(request, monkeypatch):
    monkeypatch.setattr(kernels, "SPLIT", request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", DIMS)
def case_grid(d, dtype, poison_empty):
    torch.manual_seed(d)
    rowptr, col = sparse(index=torch.int64 if d == 7 else torch.int32)
    scales = (torch.rand(7), torch.rand(9)) if d % 2 else (None, None)

    def f(x, value, impl):
        return ops.spmm(rowptr, col, x, value, *scales, impl=impl)

    compare(f, [torch.randn(9, d).to(dtype), torch.randn(len(col)).to(dtype)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [None, [3, 3, 13, 0], []], ids=["all", "rows", "none"])
@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def case_propagate(layers, rows, dtype, split, poison_empty):
    if dtype in (torch.float16, torch.bfloat16) and layers != 2:
        pytest.skip("one depth is enough for 16 bits, which the interpreter rounds towards zero")
    g, rows = graph(), None if rows is None else torch.tensor(rows, dtype=torch.int64)
    torch.manual_seed(layers)
    x = torch.randn(g.num_nodes, 5).to(dtype)
    compare(lambda x, impl: ops.propagate(g, x, layers, rows, impl=impl), [x])


def case_long_rows_are_cut_and_deterministic(split):
    rowptr, col = sparse(5, 30)
    x, value = torch.randn(30, 9), torch.randn(len(col))
    compare(lambda x, v, impl: ops.spmm(rowptr, col, x, v, impl=impl), [x, value])
    each_alone(lambda x, v, impl: ops.spmm(rowptr, col, x, v, impl=impl).sum(), [x, value])
    first, again = (ops.spmm(rowptr, col, x, value, impl="triton") for _ in range(2))
    assert torch.equal(first, again)


def case_plan_covers_every_entry_once():
    degrees = torch.tensor([0, 1, 512, 513, 1024, 1025, 5000, 0])
    rowptr = torch.cat([torch.zeros(1, dtype=torch.int64), degrees.cumsum(0)])
    piece_row, piece_end = kernels.plan(rowptr, int(degrees.sum()))
    counts = torch.bincount(piece_row, minlength=len(degrees) + 1)[: len(degrees)]
    assert torch.equal(counts, ((degrees + 511) // 512 - 1).clamp(min=0))
    assert torch.equal(piece_end, counts.cumsum(0))


def case_transpose_and_halves():
    rowptr, col = sparse()
    t_rowptr, t_col, perm = torch.ops.mmkd_triton.csr_transpose(rowptr, col, 9)
    for ours, truth in zip((t_rowptr, t_col, perm), torch.ops.mmkd.csr_transpose(rowptr, col, 9), strict=True):
        assert torch.equal(ours, truth) and ours.dtype == truth.dtype
    g = graph()
    compare(g.users_from_items, [torch.randn(8, 4)])
    compare(g.items_from_users, [torch.randn(6, 4)])


def case_nothing_to_do():
    rowptr, col = torch.zeros(4, dtype=torch.int64), torch.empty(0, dtype=torch.int32)
    assert ops.spmm(rowptr, col, torch.randn(5, 3), impl="triton").eq(0).all()
    assert ops.spmm(rowptr[:1], col, torch.randn(5, 3), impl="triton").shape == (0, 3)


def case_gradcheck():
    rowptr, col = sparse(4, 5)
    leaves = [torch.randn(n, dtype=torch.float64, requires_grad=True) for n in ((5, 2), (len(col),))]
    assert torch.autograd.gradcheck(lambda x, v: ops.spmm(rowptr, col, x, v, impl="triton"), leaves, fast_mode=True)
