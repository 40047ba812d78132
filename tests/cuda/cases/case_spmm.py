"""spmm, sddmm, csr_transpose, propagate: the CUDA kernels' own source against the float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
import simt
import torch
from budget import DTYPES, within

from mmkd import BipartiteGraph, ops, reference


def csr(n, m, nnz, seed=0, long_row=True, index=torch.int32):
    """Random pattern with empty rows; row 1 holds a third of the entries, so that a plan has to cut it."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, n, nnz)
    if long_row:
        rows[: nnz // 3] = 1
    rows[rows == 2] = 0
    rowptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=n))])
    return torch.from_numpy(rowptr), torch.from_numpy(rng.integers(0, m, nnz)).to(index)


def tensors(n, m, nnz, dtype, generator):
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    return [torch.rand(size, generator=generator, dtype=torch.float64).to(acc) for size in (nnz, n, m)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 7, 32, 64, 65, 128])
def case_spmm_and_gradients(dtype, d, schedules):
    n, m, nnz = 17, 23, 600
    index = torch.int64 if d == 7 else torch.int32
    rowptr, col = csr(n, m, nnz, seed=d, index=index)
    g = torch.Generator().manual_seed(d)
    x = torch.randn(m, d, generator=g, dtype=torch.float64).to(dtype)
    value, row_scale, col_scale = tensors(n, m, nnz, dtype, g)
    up = torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype)

    def grads(fn, dt, vt):
        xs, vs = x.detach().to(dt).requires_grad_(), value.to(vt).requires_grad_()
        out = fn(xs, vs)
        out.backward(up.to(out.dtype))
        return out.detach(), xs.grad, vs.grad

    def ours():
        return grads(lambda a, v: ops.spmm(rowptr, col, a, v, row_scale, col_scale), dtype, value.dtype)

    def plain(a, v):
        return reference.spmm(rowptr, col, a, v, row_scale.to(v.dtype), col_scale.to(v.dtype))

    truth, eager = grads(plain, torch.float64, torch.float64), grads(plain, dtype, value.dtype)
    results = schedules(ours)
    for mine, e, t in zip(results[0], eager, truth, strict=True):
        within(mine, e, t, dtype)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("d", [7, 64])
@pytest.mark.parametrize("case", ["no entries", "no rows", "one row", "no scales", "all in one row"])
def case_spmm_edges(case, d, schedules):
    n, m, nnz = {"no entries": (5, 4, 0), "no rows": (0, 4, 0), "one row": (1, 9, 300)}.get(case, (6, 9, 500))
    rng = np.random.default_rng(0)
    rows = np.full(nnz, 3) if case == "all in one row" else np.sort(rng.integers(0, max(n, 1), nnz))
    rowptr = torch.from_numpy(np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=n)[:n])]).astype(np.int64))
    col = torch.from_numpy(rng.integers(0, m, nnz))
    x = torch.randn(m, d)
    truth = reference.spmm(rowptr, col, x.double())
    for out in schedules(lambda: ops.spmm(rowptr, col, x), launches=n > 0):
        within(out, reference.spmm(rowptr, col, x), truth, torch.float32)


def case_unaligned_rows_take_the_narrow_path(schedules):
    rowptr, col = csr(9, 11, 200)
    x = torch.randn(11 * 64 + 1)[1:].view(11, 64)  # begins 4 bytes off a 16-byte boundary
    truth = reference.spmm(rowptr, col, x.double())
    for out in schedules(lambda: ops.spmm(rowptr, col, x)):
        within(out, reference.spmm(rowptr, col, x), truth, torch.float32)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def case_csr_transpose(index):
    rowptr, col = csr(13, 9, 300, index=index)
    got = simt.ops.csr_transpose(rowptr, col, 9)
    for mine, theirs in zip(got, torch.ops.mmkd.csr_transpose(rowptr, col, 9), strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    empty = simt.ops.csr_transpose(torch.zeros(4, dtype=torch.int64), col[:0], 0)
    assert [t.tolist() for t in empty] == [[0], [], []]


def graph(seed=0, users=30, items=20, edges=260):
    rng = np.random.default_rng(seed)
    i = rng.integers(0, items - 1, edges)  # the last item and the last user stay alone
    i[: edges // 2] = 0
    return BipartiteGraph.from_edges(rng.integers(0, users - 1, edges), i, users, items)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layers", [0, 1, 2, 3])
@pytest.mark.parametrize("which", ["all", "rows", "many rows", "repeated", "none"])
def case_propagate(dtype, layers, which, schedules, deterministic):
    if deterministic and which == "all":
        pytest.skip("nothing is scattered")
    g, d = graph(users=150, edges=900), 64 if layers == 2 else 7
    rows = {
        "all": None,
        "rows": torch.randperm(g.num_nodes)[:12],
        "many rows": torch.randperm(g.num_nodes)[:100],  # so many that the layer before leaves no row out
        "repeated": torch.tensor([150, 0, 150, 3, 169, 150, 0]),
        "none": torch.empty(0, dtype=torch.int64),
    }[which]
    x = torch.randn(g.num_nodes, d, dtype=torch.float64).to(dtype)
    n = g.num_nodes if rows is None else len(rows)
    up = torch.randn(n, d, dtype=torch.float64).to(dtype)

    def grads(fn, dt):
        leaf = x.detach().to(dt).requires_grad_()
        out = fn(leaf)
        out.backward(up.to(dt))
        return out.detach(), leaf.grad

    def plain(leaf):
        return reference.propagate(g.rowptr, g.col, g.scale_as(leaf.dtype), leaf, layers, rows)

    truth, eager = grads(plain, torch.float64), grads(plain, dtype)
    launches = layers > 0 or rows is not None  # no layer and all rows: a copy
    results = schedules(lambda: grads(lambda leaf: ops.propagate(g, leaf, layers, rows), dtype), launches=launches)
    for mine in results:
        for m, e, t in zip(mine, eager, truth, strict=True):
            within(m, e, t, dtype)
    if deterministic:
        assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))


def case_propagate_is_the_same_under_any_schedule(schedules):
    g = graph()
    x = torch.randn(g.num_nodes, 64)
    results = schedules(lambda: ops.propagate(g, x, 3), seeds=range(8))
    assert all(torch.equal(results[0], r) for r in results[1:])


def case_a_graph_is_planned_once():
    g, x = graph(), torch.randn(50, 64, requires_grad=True)

    def launches(fn):
        before = simt.ops.launches()
        out = fn()
        return out, simt.ops.launches() - before

    def step():
        ops.propagate(g, x, 2).sum().backward()
        x.grad = None
        halves = g.users_from_items(x[30:]), g.items_from_users(x[:30])
        (halves[0].sum() + halves[1].sum()).backward()
        return x.grad

    first, with_plans = launches(step)
    x.grad = None
    again, without = launches(step)
    assert with_plans - without == 3 and torch.equal(first, again)  # of A, R and R^T
    assert without == 2 * (2 + 2 + 2 + 2)  # each product: its kernel and the one that adds cut rows
    torch.testing.assert_close(first, step_reference(g, x))
    plan = g._cache["plan all cuda"]
    with pytest.raises(RuntimeError, match="plan: expected"):
        simt.ops.propagate(g.rowptr, g.col, g.scale, x.detach(), 2, None, plan[:-1])


def step_reference(g, x):
    leaf = x.detach().clone().requires_grad_()
    halves = g.users_from_items(leaf[30:], impl="reference"), g.items_from_users(leaf[:30], impl="reference")
    (halves[0].sum() + halves[1].sum()).backward()
    return leaf.grad


def case_non_contiguous_inputs_are_taken():
    rowptr, col = csr(9, 11, 200)
    wide = torch.randn(11, 128)
    for x in (wide[:, ::2], wide.T.contiguous().T[:, :64], torch.randn(11, 1).expand(11, 64)):
        within(
            ops.spmm(rowptr, col, x), reference.spmm(rowptr, col, x), reference.spmm(rowptr, col, x.double()), x.dtype
        )


def case_out_of_range_stops_the_kernel():
    rowptr, col = csr(5, 6, 40, long_row=False)
    with pytest.raises(RuntimeError, match="a check in the kernel failed"):  # more entries than there are columns for
        ops.spmm(rowptr + (torch.arange(6) > 3) * 9, col, torch.randn(6, 64))
    with pytest.raises(RuntimeError, match="a check in the kernel failed"):
        ops.spmm(rowptr, col, torch.randn(3, 64))
    late = torch.arange(42)
    late[-1] = 90  # the end of a row beyond the first 32, which are looked at together
    with pytest.raises(RuntimeError, match="a check in the kernel failed"):
        simt.ops.spmm(late, torch.zeros(40, dtype=torch.int64), torch.randn(3, 4), *[None] * 7)
    g = graph()
    with pytest.raises(RuntimeError, match="a check in the kernel failed"):
        ops.propagate(g, torch.randn(g.num_nodes, 8), 1, torch.tensor([g.num_nodes]))


def case_entries_without_rows_are_refused():
    with pytest.raises(RuntimeError, match="col: expected no entries"):
        ops.spmm(torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), torch.randn(3, 4))


@pytest.mark.parametrize("name", ["rowptr", "x", "row_scale"])
def case_wrong_arguments_are_named(name):
    rowptr, col = csr(5, 6, 40)
    x, scale = torch.randn(6, 4), torch.ones(5)
    arguments = {"rowptr": rowptr, "x": x, "row_scale": scale}
    arguments[name] = arguments[name][:-1] if name == "row_scale" else arguments[name].to(torch.int32)
    with pytest.raises(RuntimeError, match=name):
        simt.ops.spmm(arguments["rowptr"], col, arguments["x"], None, arguments["row_scale"], None, None, None)


def case_gradcheck():
    rowptr, col = csr(6, 5, 30)
    x, value = torch.randn(5, 3, dtype=torch.float64), torch.rand(30, dtype=torch.float64)
    torch.autograd.gradcheck(
        lambda a, v: ops.spmm(rowptr, col, a, v), (x.requires_grad_(), value.requires_grad_()), fast_mode=True
    )
