"""spmm and propagate: the grid of design section 6, malformed input, and bit-equality for any number of threads."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkd import BipartiteGraph, ops, reference
from tests.ops.grid import DIMS, DTYPES, within_budget


def make_graph(num_users=30, num_items=17, num_edges=150, seed=0) -> BipartiteGraph:
    rng = np.random.default_rng(seed)
    # one user and one item more than are drawn, so that both sides have an isolated node
    return BipartiteGraph.from_edges(
        rng.integers(0, num_users, num_edges), rng.integers(0, num_items, num_edges), num_users + 1, num_items + 1
    )


def random_csr(num_rows, num_cols, density=0.2, seed=0, index=torch.int32):
    m = sp.random(num_rows, num_cols, density, format="csr", random_state=seed)
    m.sort_indices()
    return torch.from_numpy(m.indptr.astype(np.int64)), torch.from_numpy(m.indices).to(index), torch.from_numpy(m.data)


def dense_of(rowptr, col, value, shape):
    rows = torch.repeat_interleave(torch.arange(shape[0]), rowptr.diff())
    out = torch.zeros(shape, dtype=torch.float64)
    return out.index_put((rows, col.long()), value.double(), accumulate=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", DIMS)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_spmm_grid(d, dtype, index, cpu_isa, poison_empty):
    rowptr, col, value = random_csr(23, 31, index=index)
    torch.manual_seed(d)
    x = torch.randn(31, d).to(dtype)
    row_scale, col_scale = torch.rand(23) + 0.5, torch.rand(31) + 0.5
    for v, r, c in (
        (value, row_scale, col_scale),
        (None, row_scale, col_scale),
        (value, None, None),
        (None, None, None),
    ):
        scaled = dense_of(rowptr, col, torch.ones_like(value) if v is None else v.float(), (23, 31))
        if r is not None:
            scaled = row_scale.double()[:, None] * scaled * col_scale.double()
        truth = scaled @ x.double()
        ours = ops.spmm(rowptr, col, x, v if v is None else v.to(torch.float32), r, c)
        eager = reference.spmm(rowptr, col, x, v if v is None else v.float(), r, c)
        assert ours.dtype == dtype
        within_budget(ours, eager, truth, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", DIMS)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_sddmm_grid(d, dtype, index, cpu_isa, poison_empty):
    rowptr, col, _ = random_csr(23, 31, index=index)
    torch.manual_seed(d)
    a, b = torch.randn(23, d).to(dtype), torch.randn(31, d).to(dtype)
    scales = torch.rand(23) + 0.5, torch.rand(31) + 0.5
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    rows = torch.repeat_interleave(torch.arange(23), rowptr.diff())
    weight = torch.randn(col.numel()).to(acc)
    for r, c in (scales, (None, None)):
        wide, own, plain = ([t.clone().requires_grad_() for t in (u, v)] for u, v in
                            ((a.double(), b.double()), (a, b), (a, b)))  # fmt: skip
        truth = (wide[0] @ wide[1].T)[rows, col.long()]
        if r is not None:
            truth = truth * r.double()[rows] * c.double()[col.long()]
        ours, eager = ops.sddmm(rowptr, col, *own, r, c), reference.sddmm(rowptr, col, *plain, r, c)
        assert ours.dtype == acc
        within_budget(ours, eager, truth, dtype)
        for out in (truth, ours, eager):
            out.backward(weight.to(out.dtype))
        for x, y, z in zip(own, plain, wide, strict=True):
            within_budget(x.grad, y.grad, z.grad, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", DIMS)
@pytest.mark.parametrize("num_layers", [0, 1, 2, 3])
def test_propagate_grid(d, dtype, num_layers, cpu_isa, poison_empty):
    g = make_graph()
    torch.manual_seed(d)
    x = torch.randn(g.num_nodes, d).to(dtype)
    repeated = torch.tensor([0, 5, 5, g.num_nodes - 1, 33, 0])
    for rows in (None, repeated, torch.empty(0, dtype=torch.int64)):
        wide, own, plain = (t.clone().requires_grad_() for t in (x.double(), x, x))
        truth = ops.propagate(g, wide, num_layers, rows, impl="reference")
        ours = ops.propagate(g, own, num_layers, rows)
        eager = ops.propagate(g, plain, num_layers, rows, impl="reference")
        within_budget(ours, eager, truth, dtype)
        weight = torch.randn(truth.shape).to(dtype)
        for out, w in ((truth, weight.double()), (ours, weight), (eager, weight)):
            out.backward(w)
        within_budget(own.grad, plain.grad, wide.grad, dtype)


def test_rows_equal_full_and_isolated_nodes_keep_their_share():
    g = make_graph()
    x = torch.randn(g.num_nodes, 16, dtype=torch.float64)
    rows = torch.arange(g.num_nodes).flip(0)
    full = ops.propagate(g, x, 3)
    torch.testing.assert_close(ops.propagate(g, x, 3, rows), full[rows], atol=1e-14, rtol=0)
    lonely = (g.degree == 0).nonzero()[:, 0]
    assert lonely.numel() >= 2
    torch.testing.assert_close(full[lonely], x[lonely] / 4)


# A hub is longer than a block of the kernel's; few, some or all of its neighbours have a gradient.
@pytest.mark.parametrize("share", [0.002, 0.3, 1.0])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_rows_of_a_graph_with_a_hub(num_layers, share, dtype, cpu_isa):
    count = 1500
    users = np.arange(count)
    g = BipartiteGraph.from_edges(np.r_[users, users], np.r_[np.zeros(count, int), 1 + users % 50], count, 51)
    rows = torch.randperm(count)[: int(count * share)]
    rows = torch.cat(
        [rows, torch.tensor([count + 5])] if share < 1 else [rows, torch.arange(count, g.num_nodes), rows[:7]]
    )
    for d in (7, 64, 70):
        x, w = torch.randn(g.num_nodes, d, dtype=dtype), torch.randn(len(rows), d, dtype=dtype)
        close = {"atol": 1e-12, "rtol": 0} if dtype == torch.float64 else {"atol": 1e-5, "rtol": 1e-5}
        for order in (rows, rows.unique()):
            a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
            ours = ops.propagate(g, a, num_layers, order)
            truth = ops.propagate(g, b, num_layers, order, impl="reference")
            torch.testing.assert_close(ours, truth, **close)
            ours.backward(w[: len(order)])
            truth.backward(w[: len(order)])
            torch.testing.assert_close(a.grad, b.grad, **close)


# Rows that just fit a block of the kernel's, or do not, or are many in it.
DEGREES = [[1023, 1, 0], [1024, 0, 1], [1025], [1024, 1024], [0] * 700 + [3] * 700, [511, 513, 17], [1, 2048, 1]]


@pytest.mark.parametrize("degrees", DEGREES, ids=lambda d: f"{len(d)} rows, {max(d)}")
def test_the_first_layer_back_has_the_bits_of_the_gradient_among_zeros(degrees, cpu_isa):
    """Where rows end among the entries that are listed at once, and where lists end, makes no difference."""
    _first_layer_back(degrees)


def test_the_first_layer_back_has_these_bits_where_rows_are_prefetched_whole():
    code = "from tests.ops.test_spmm import DEGREES, _first_layer_back as f; [f(d) for d in DEGREES]"
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "MMKD_FAR_PREFETCH": "1"}, capture_output=True
    )
    assert run.returncode == 0, run.stderr.decode()


def _first_layer_back(degrees: list[int]) -> None:
    generator, users = torch.Generator().manual_seed(len(degrees)), len(degrees)
    items = max(40, max(degrees))
    pairs = [(u, i) for u, n in enumerate(degrees) for i in torch.randperm(items, generator=generator)[:n].tolist()]
    g = BipartiteGraph.from_edges(*map(np.array, zip(*pairs, strict=True)), users, items)
    for share in (0.03, 0.5, 1.0):
        rows = torch.randperm(g.num_nodes, generator=generator)[: max(1, int(share * g.num_nodes))].sort().values
        for d in (5, 64):
            grad = torch.randn(len(rows), d, generator=generator)
            among_zeros = torch.zeros(g.num_nodes, d).index_copy_(0, rows, grad)
            for col in (g.col, g.col.long()):
                back = torch.ops.mmkd.propagate_backward
                listed = back(g.rowptr, col, g.scale, grad, 1, rows, None)
                assert torch.equal(listed, back(g.rowptr, col, g.scale, among_zeros, 1, None, None))


@pytest.mark.parametrize("col_type", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("bad", [-1, 40, 2**31 - 1, -(2**31)])
def test_a_bad_column_of_a_listed_row_is_named(bad, col_type, cpu_isa):
    """Wherever among the entries copied together it lies, forward from the rows and back from them."""
    kernels, degree = torch.ops.mmkd, 35
    rowptr, scale, x = torch.arange(41) * degree, torch.ones(40), torch.randn(40, 16)
    rows = torch.arange(0, 40, 3)
    ways = [
        lambda col: kernels.propagate(rowptr, col, scale, x, 1, rows, None),
        lambda col: kernels.propagate_backward(rowptr, col, scale, x[rows], 1, rows, None),
        lambda col: kernels.propagate_mixed(rowptr, col, scale, x, 1, rows),
    ]
    for at in (0, 15, 16, 33, 34):
        col = torch.randint(0, 40, (40 * degree,), dtype=col_type)
        entry = 6 * degree + at  # of a listed row
        col[entry] = bad
        for way in ways:
            with pytest.raises(RuntimeError, match=rf"entry {entry} \(row 6\) is {bad}"):
                way(col)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [64, 72])
def test_results_too_large_for_a_cache(d, dtype, cpu_isa):
    g = make_graph(40_000, 3_000, 60_000)  # 11 MB of float32
    torch.manual_seed(0)
    x = torch.randn(g.num_nodes, d).to(dtype)
    rows = torch.arange(0, g.num_nodes, 2)
    truth = reference.propagate(g.rowptr, g.col, g.scale_as(torch.float64), x.double(), 2, None)
    eager = reference.propagate(g.rowptr, g.col, g.scale, x, 2, None)
    within_budget(ops.propagate(g, x, 2), eager, truth, dtype)
    within_budget(ops.propagate(g, x, 2, rows), eager[rows], truth[rows], dtype)
    leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    w = torch.randn(len(rows), d).to(dtype)
    ops.propagate(g, leaf, 2, rows).backward(w)
    reference.propagate(g.rowptr, g.col, g.scale_as(torch.float64), exact, 2, rows).backward(w.double())
    within_budget(leaf.grad, exact.grad.to(dtype), exact.grad, dtype)


def test_inputs_that_are_not_contiguous_or_are_expanded():
    g = make_graph()
    base = torch.randn(8, g.num_nodes)
    torch.testing.assert_close(ops.propagate(g, base.T, 2), ops.propagate(g, base.T.contiguous(), 2))
    x = torch.randn(1, 8).expand(g.num_nodes, 8)
    torch.testing.assert_close(ops.propagate(g, x, 2), ops.propagate(g, x.clone(), 2))
    rows = torch.arange(10)[::2]
    torch.testing.assert_close(ops.propagate(g, x, 2, rows), ops.propagate(g, x, 2)[rows])


def test_inputs_are_never_written():
    g = make_graph()
    x = torch.randn(g.num_nodes, 16, requires_grad=True)
    before = x.detach().clone()
    grad = torch.ones(3, 16)
    ops.propagate(g, x, 2, torch.tensor([1, 1, 40])).backward(grad)
    assert torch.equal(x, before) and torch.equal(grad, torch.ones(3, 16))


def test_empty_tables():
    rowptr, col = torch.zeros(1, dtype=torch.int64), torch.empty(0, dtype=torch.int32)
    assert ops.spmm(rowptr, col, torch.randn(5, 4)).shape == (0, 4)
    assert ops.spmm(torch.zeros(4, dtype=torch.int64), col, torch.empty(0, 4)).eq(0).all()
    assert ops.spmm(torch.zeros(4, dtype=torch.int64), col, torch.empty(3, 0)).shape == (3, 0)


def test_gradcheck_of_each_argument():
    rowptr, col, value = random_csr(6, 5, 0.5)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    value = value.double().requires_grad_()
    row, column = torch.rand(6, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    check = torch.autograd.gradcheck
    assert check(lambda x, v: ops.spmm(rowptr, col, x, v, row, column), (x, value))
    assert check(lambda x: ops.spmm(rowptr, col, x, None, row, column), (x,))
    assert check(lambda v: ops.spmm(rowptr, col, x.detach(), v), (value,))
    a = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert check(lambda a, b: ops.sddmm(rowptr, col, a, b, row, column), (a, x))
    assert check(lambda b: ops.sddmm(rowptr, col, a.detach(), b), (x,))
    g = make_graph(5, 4, 12)
    x = torch.randn(g.num_nodes, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([2, 2, 7, 0])
    for num_layers in (0, 1, 2, 3):
        assert check(lambda x, n=num_layers: ops.propagate(g, x, n), (x,))
        assert check(lambda x, n=num_layers: ops.propagate(g, x, n, rows), (x,))


def test_second_derivatives():
    g = make_graph(5, 4, 12)
    x = torch.randn(g.num_nodes, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([2, 2, 7, 0])
    for r in (None, rows):
        assert torch.autograd.gradgradcheck(lambda x, r=r: ops.propagate(g, x, 2, r).square(), (x,))
    rowptr, col, value = random_csr(6, 5, 0.5)
    assert torch.autograd.gradgradcheck(lambda x: ops.spmm(rowptr, col, x, value.double()).square(), (x[:5],))
    value, twice = value.double().requires_grad_(), torch.autograd.gradgradcheck
    assert twice(lambda x, v: ops.spmm(rowptr, col, x, v).square(), (x[:5], value))
    a, scales = (
        torch.randn(6, 3, dtype=torch.float64, requires_grad=True),
        (torch.rand(6).double(), torch.rand(5).double()),
    )
    assert twice(lambda a, b: ops.sddmm(rowptr, col, a, b, *scales).exp(), (a, x[:5]))


def test_attention_over_edges_compiles_without_a_graph_break():
    g = make_graph()

    def attend(x):
        weight = ops.sddmm(g.rowptr, g.col, x, x).exp()
        return ops.spmm(g.rowptr, g.col, x, weight).square().sum()

    x = torch.randn(g.num_nodes, 8, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    torch.compile(attend, fullgraph=True, backend="aot_eager")(x).backward()
    attend(y).backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_halves_of_the_normalised_adjacency_are_each_others_transpose():
    g = make_graph()
    f = torch.randn(g.num_items, 5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(g.num_users, 5, dtype=torch.float64)
    dense = g.scale_as(torch.float64)[: g.num_users, None] * torch.from_numpy(g.to_scipy().toarray()).double()
    dense = dense * g.scale_as(torch.float64)[g.num_users :]
    torch.testing.assert_close(g.users_from_items(f), dense @ f)
    torch.testing.assert_close(g.items_from_users(x), dense.T @ x)
    g.users_from_items(f).backward(x)
    torch.testing.assert_close(f.grad, dense.T @ x)


# Where blocks of rows begin depends on the threads, and whether a block is prefetched twice on what it reaches over: of the
# larger graph's table some do and some do not.
@pytest.mark.parametrize("size", [(3000, 800, 20_000), (40_000, 800, 60_000)], ids=["small", "large"])
@pytest.mark.parametrize("d", [5, 64, 72])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bit_equal_for_any_number_of_threads(dtype, d, size, cpu_isa):
    g = make_graph(*size)
    x = torch.randn(g.num_nodes, d).to(dtype)
    rows = torch.randint(0, g.num_nodes, (500,))
    before, seen = torch.get_num_threads(), []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        leaf = x.clone().requires_grad_()
        out = ops.propagate(g, leaf, 3, rows)
        out.backward(torch.ones_like(out))
        seen.append((ops.propagate(g, x, 3), out.detach(), leaf.grad))
    torch.set_num_threads(before)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_opcheck():
    rowptr, col, value = random_csr(6, 5, 0.5)
    x = torch.randn(5, 3, requires_grad=True)
    v, scale = value.float().requires_grad_(), torch.rand(6)
    torch.library.opcheck(torch.ops.mmkd.spmm.default, (rowptr, col, x, v, scale, None, None, None))
    torch.library.opcheck(torch.ops.mmkd.csr_transpose.default, (rowptr, col, 5))
    a = torch.randn(6, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.mmkd.sddmm.default, (rowptr, col, a, x, scale, None))
    g = make_graph(5, 4, 12)
    x = torch.randn(g.num_nodes, 3, requires_grad=True)
    for rows in (None, torch.tensor([1, 2])):
        torch.library.opcheck(torch.ops.mmkd.propagate.default, (g.rowptr, g.col, g.scale, x, 2, rows))


def test_compiles_without_a_graph_break():
    g = make_graph()
    rows = torch.tensor([1, 5, 40])

    def step(x):
        return ops.propagate(g, x, 2, rows).square().sum() + g.users_from_items(x[g.num_users :]).sum()

    x = torch.randn(g.num_nodes, 8, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    torch.compile(step, fullgraph=True, backend="aot_eager")(x).backward()
    step(y).backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_autocast_leaves_the_dtype_of_the_table():
    g = make_graph()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.propagate(g, torch.randn(g.num_nodes, 8), 2).dtype == torch.float32


@pytest.mark.parametrize(
    ("rowptr", "col", "message"),
    [
        ([0, 3, 2, 4], [0, 1, 2, 3], "row 1 spans"),
        ([0, 1, 2, 4], [0, 1, 2, 9], "is 9, expected"),
        ([0, 1, 2, 4], [0, 1, 2, -1], "is -1, expected"),
        ([1, 1, 2, 4], [0, 1, 2, 3], "start at 0"),
        ([0, 1, 2, 3], [0, 1, 2, 3], "end at len"),
        ([0, 9, 2, 4], [0, 1, 2, 3], "spans"),
        ([0, -7, 2, 4], [0, 1, 2, 3], "spans"),
    ],
)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_malformed_csr_is_refused(rowptr, col, message, index):
    rowptr, col = torch.tensor(rowptr), torch.tensor(col, dtype=index)
    with pytest.raises(RuntimeError, match=message):
        ops.spmm(rowptr, col, torch.randn(5, 64))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.mmkd.csr_transpose(rowptr, col, 5)


@pytest.mark.parametrize("name", ["rowptr", "col", "value", "row_scale", "col_scale", "rows"])
def test_a_tensor_on_another_device_is_refused(name):
    """A kernel would take its address for one of its own device."""
    rowptr, col, value = random_csr(4, 5)
    given = {"rowptr": rowptr, "col": col, "value": value, "row_scale": torch.ones(4), "col_scale": torch.ones(5)}
    with pytest.raises(ValueError, match=rf"{name}: expected on cpu like x, got meta"):
        if name == "rows":
            ops.propagate(
                g := make_graph(), torch.randn(g.num_nodes, 3), 1, torch.zeros(2, dtype=torch.int64).to("meta")
            )
        else:
            ops.spmm(x=torch.randn(5, 3), **(given | {name: given[name].to("meta")}))


def test_an_int32_column_is_not_fooled_by_wrapping():
    col = torch.tensor([2**31 + 1])  # as int32 this would be negative, as an offset far away
    with pytest.raises(RuntimeError, match="expected"):
        ops.spmm(torch.tensor([0, 1]), col, torch.randn(5, 8))


def test_errors_name_the_argument():
    g = make_graph()
    x = torch.randn(g.num_nodes, 4)
    rowptr, col = g.rowptr, g.col
    cases = [
        (TypeError, "x: expected", lambda: ops.propagate(g, x.long(), 2)),
        (ValueError, "x: expected 49 rows", lambda: ops.propagate(g, x[:5], 2)),
        (ValueError, "num_layers", lambda: ops.propagate(g, x, -1)),
        (TypeError, "rows: expected", lambda: ops.propagate(g, x, 1, torch.tensor([1.0]))),
        (RuntimeError, "rows: entry 1 is 99", lambda: ops.propagate(g, x, 1, torch.tensor([1, 99]))),
        (ValueError, "impl: expected one of", lambda: ops.propagate(g, x, 1, impl="numba")),
        (ValueError, "the CUDA kernels take CUDA tensors", lambda: ops.propagate(g, x, 1, impl="cuda")),
        (TypeError, "rowptr: expected", lambda: ops.spmm(rowptr.int(), col, x)),
        (TypeError, "col: expected", lambda: ops.spmm(rowptr, col.float(), x)),
        (ValueError, "row_scale: expected shape", lambda: ops.spmm(rowptr, col, x, row_scale=torch.ones(3))),
        (ValueError, "a: expected 49 rows", lambda: ops.sddmm(rowptr, col, x[:5], x)),
        (ValueError, "b: expected torch.float32 with 4 columns", lambda: ops.sddmm(rowptr, col, x, x[:, :2])),
        (ValueError, "b: expected torch.float32 with 4 columns", lambda: ops.sddmm(rowptr, col, x, x.double())),
        (RuntimeError, "col", lambda: ops.sddmm(rowptr, col, x, x[:30])),
        (ValueError, "value: expected shape", lambda: ops.spmm(rowptr, col, x, torch.ones(3))),
        (ValueError, "col_scale: is a constant", lambda: ops.spmm(rowptr, col, x, col_scale=torch.ones(49, requires_grad=True))),
    ]  # fmt: skip
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 200), st.integers(1, 20), st.integers(0, 2**31 - 1))
def test_random_matrices_against_scipy(num_rows, num_cols, nnz, d, seed):
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.integers(0, num_rows, nnz))
    col = rng.integers(0, num_cols, nnz)  # neither sorted nor unique within a row
    rowptr = np.searchsorted(rows, np.arange(num_rows + 1))
    value, x = rng.standard_normal(nnz), rng.standard_normal((num_cols, d))
    ours = ops.spmm(torch.from_numpy(rowptr), torch.from_numpy(col), torch.from_numpy(x), torch.from_numpy(value))
    truth = sp.csr_matrix((value, col, rowptr), shape=(num_rows, num_cols)) @ x
    np.testing.assert_allclose(ours.numpy(), truth, atol=1e-12)
    t_rowptr, t_col, perm = torch.ops.mmkd.csr_transpose(torch.from_numpy(rowptr), torch.from_numpy(col), num_cols)
    back = sp.csr_matrix((value[perm.numpy()], t_col.numpy(), t_rowptr.numpy()), shape=(num_cols, num_rows)).toarray()
    np.testing.assert_allclose(
        back, sp.csr_matrix((value, col, rowptr), shape=(num_rows, num_cols)).toarray().T, atol=1e-12
    )


def test_unknown_instruction_set_is_refused():
    with pytest.raises(RuntimeError, match="expected generic, avx2 or avx512"):
        torch.ops.mmkd.set_cpu_isa("sse9")
