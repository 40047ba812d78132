"""Random CSR patterns, good and malformed, through every op that takes one."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkd import BipartiteGraph, csr, ops
from mmkd.data import Sampler
from tests.ops.matrices import Pattern, malformed, patterns

REFUSAL = r"(rowptr|col)\)?: (expected to start|row|falls|entry)"


def tensors(p: Pattern) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(p.rowptr), torch.from_numpy(p.col)


def scipy_of(p: Pattern) -> sp.csr_matrix:
    """The pattern as scipy holds it, put in place past scipy's own checks."""
    matrix = sp.csr_matrix((p.num_rows, p.num_cols), dtype=np.float32)
    matrix.indptr, matrix.indices, matrix.data = p.rowptr, p.col, np.ones(len(p.col), np.float32)
    return matrix


def dense(p: Pattern) -> np.ndarray:
    out = np.zeros((p.num_rows, p.num_cols))
    np.add.at(out, (np.repeat(np.arange(p.num_rows), np.diff(p.rowptr)), p.col), 1)
    return out


@settings(max_examples=40)
@given(patterns(tidy=False), st.integers(1, 70))
def test_spmm_and_its_gradient(p, d):
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((p.num_cols, d))).requires_grad_()
    out, grad = ops.spmm(*tensors(p), x), torch.from_numpy(rng.standard_normal((p.num_rows, d)))
    out.backward(grad)
    truth = torch.from_numpy(dense(p))
    torch.testing.assert_close(out.detach(), truth @ x.detach(), atol=1e-12, rtol=0)
    torch.testing.assert_close(x.grad, truth.T @ grad, atol=1e-12, rtol=0)


@settings(max_examples=40)
@given(patterns(tidy=False), st.integers(1, 50))
def test_topk_leaves_out_the_excluded(p, k):
    rng = np.random.default_rng(0)
    users, items = (torch.from_numpy(rng.integers(-3, 4, (n, 5)).astype(np.float32)) for n in (p.num_rows, p.num_cols))
    scores, ids = ops.topk(users, items, k, exclude=tensors(p))
    has = dense(p) > 0
    for user in range(p.num_rows):
        found = ids[user][ids[user] >= 0].tolist()
        assert not has[user, found].any()
        assert len(found) == min(k, p.num_cols - has[user].sum())
    truth = ops.topk(users, items, k, exclude=tensors(p), impl="reference")
    assert torch.equal(scores, truth[0]) and torch.equal(ids, truth[1])


@settings(max_examples=40)
@given(patterns(tidy=False, full=False))
def test_sampler_and_graph_take_any_order(p):
    has, matrix = dense(p) > 0, scipy_of(p)
    graph = BipartiteGraph.from_scipy(matrix)
    assert np.array_equal(graph.to_scipy().toarray() > 0, has)
    assert np.array_equal(dense(Pattern(graph.item_rowptr.numpy(), graph.item_col.numpy(), p.num_rows)), has.T)
    if has.all(1).any():
        with pytest.raises(ValueError, match=f"user {has.all(1).argmax()} has all"):
            Sampler(matrix, 2, 20)
        return
    batch = Sampler(matrix, 2, 20).batch(0, 0)
    assert has[batch.users, batch.pos].all() and not has[batch.users[:, None], batch.neg].any()


@settings(max_examples=80)
@given(malformed())
def test_malformed_is_refused_before_it_is_followed(p):
    x, users = torch.randn(p.num_cols, 8), torch.randn(p.num_rows, 8)
    matrix = scipy_of(p)
    refused = pytest.raises((ValueError, RuntimeError), match=REFUSAL)
    with refused:
        ops.spmm(*tensors(p), x)
    with refused:
        torch.ops.mmkd.csr_transpose(*tensors(p), p.num_cols)
    with refused:
        torch.ops.mmkd.sddmm(*tensors(p), users, x, None, None)
    with refused:
        ops.topk(users, x, 3, exclude=tensors(p))
    with refused:
        Sampler(matrix, 2, 4)
    with refused:
        BipartiteGraph.from_scipy(matrix)


@settings(max_examples=40)
@given(patterns(tidy=False), st.data())
def test_some_rows(p, data):
    rows = np.array(data.draw(st.lists(st.integers(0, p.num_rows - 1), max_size=8)), np.int64)
    got = Pattern(*csr.some_rows(p.rowptr, p.col.astype(np.int32), rows), p.num_cols)
    assert np.array_equal(dense(got), dense(p)[rows])


@settings(max_examples=80)
@given(malformed())
def test_some_rows_of_malformed_stay_within_it(p):
    col = p.col.astype(np.int32)
    try:
        got = csr.some_rows(p.rowptr, col, np.arange(p.num_rows))
    except ValueError as error:
        assert "rowptr: row" in str(error)
    else:  # the rows themselves are sound, whatever `rowptr` begins or ends with
        spans = [col[a:b] for a, b in pairwise(p.rowptr)]
        assert np.array_equal(got[1], np.concatenate(spans)) and got[0][-1] == len(got[1])


@settings(max_examples=40)
@given(malformed(square=True))
def test_propagate_refuses_malformed(p):
    scale, x, everyone = torch.ones(p.num_rows), torch.randn(p.num_rows, 8), torch.arange(p.num_rows)
    for op in (torch.ops.mmkd.propagate, torch.ops.mmkd.propagate_backward):
        for rows, num_layers in ((None, 2), (everyone, 2), (None, 3), (everyone, 3)):
            with pytest.raises(RuntimeError, match=REFUSAL):
                op(*tensors(p), scale, x, num_layers, rows)
    with pytest.raises(RuntimeError, match=REFUSAL):  # where no layer before checked a row
        torch.ops.mmkd.propagate_mixed(*tensors(p), scale, x, 3, None)


def test_wrong_lengths_and_types_are_refused():
    rowptr, col, x = torch.tensor([0, 1, 2]), torch.tensor([0, 1]), torch.randn(3, 4)
    for bad_rowptr, bad_col, kind in (
        (rowptr[:0], col, RuntimeError),
        (rowptr[:2], col, RuntimeError),
        (rowptr[None], col, ValueError),
        (rowptr, col[:1], RuntimeError),
        (rowptr, col[None], ValueError),
        (rowptr.int(), col, TypeError),
        (rowptr, col.short(), TypeError),
    ):
        with pytest.raises(kind, match=r"rowptr|col|exclude"):
            ops.spmm(bad_rowptr, bad_col, x)
        with pytest.raises((kind, ValueError), match=r"rowptr|col|exclude"):
            ops.topk(x[:2], x, 1, exclude=(bad_rowptr, bad_col))
    matrix = sp.csr_matrix(np.eye(3, dtype=np.float32))
    matrix.indptr = np.array([0, 1, 3], np.int32)
    for door in (lambda m: Sampler(m, 1, 2), BipartiteGraph.from_scipy):
        with pytest.raises(ValueError, match="rowptr: expected 4 entries"):
            door(matrix)


def test_more_nodes_than_int32_can_name_are_refused():
    for users, items in ((1, 2**31 - 1), (2**31, 1), (2**40, 2**40)):
        with pytest.raises(ValueError, match="exceed the 2"):
            BipartiteGraph.from_edges([0], [0], users, items)
    with pytest.raises(ValueError, match="num_cols: expected 0 to 2"):
        csr.from_edges(np.array([0]), np.array([2**31]), 1, 2**31 + 1)
    # spmm reads an int64 column as it is: narrowed to int32 these would be in range
    for bad in (2**32, 2**32 + 1, -(2**32), 2**31):
        with pytest.raises(RuntimeError, match="expected"):
            ops.spmm(torch.tensor([0, 1]), torch.tensor([bad]), torch.randn(5, 8))


@settings(max_examples=40)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 200), st.integers(0, 2**32 - 1))
def test_edges_to_csr_and_back(num_rows, num_cols, n, seed):
    rng = np.random.default_rng(seed)
    rows, cols = rng.integers(0, num_rows, n), rng.integers(0, num_cols, n)
    rowptr, col = csr.from_edges(rows, cols, num_rows, num_cols)
    truth = sp.csr_matrix((np.ones(n), (rows, cols)), shape=(num_rows, num_cols))
    truth.sum_duplicates()
    assert np.array_equal(rowptr, truth.indptr) and np.array_equal(col, truth.indices)
    t_rowptr, t_col = csr.transpose(rowptr, col, num_cols)
    back = truth.T.tocsr()
    back.sort_indices()
    assert np.array_equal(t_rowptr, back.indptr) and np.array_equal(t_col, back.indices)
