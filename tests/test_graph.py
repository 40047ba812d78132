"""BipartiteGraph: normalisation, merged duplicates, refused ids."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from mmkd import BipartiteGraph


def test_adjacency_is_symmetric_normalised_and_safe_for_isolated_nodes():
    g = BipartiteGraph.from_edges([0, 0, 1, 0], [1, 2, 1, 1], 3, 4)  # (0, 1) twice; user 2, items 0 and 3 isolated
    assert (g.num_users, g.num_items, g.num_nodes, g.num_edges) == (3, 4, 7, 3)
    dense = torch.zeros(7, 7)
    for r in range(7):
        dense[r, g.col[g.rowptr[r] : g.rowptr[r + 1]].long()] = 1
    assert torch.equal(dense, dense.T) and dense.sum() == 6
    assert g.degree.tolist() == [2, 1, 0, 0, 2, 1, 0]
    torch.testing.assert_close(g.scale, torch.tensor([0.5**0.5, 1, 0, 0, 0.5**0.5, 1, 0]))
    torch.testing.assert_close(g.scale_as(torch.float64).float(), g.scale)
    assert g.to_scipy().toarray().tolist() == [[0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert "3 users, 4 items, 3 edges" in repr(g)


def test_rows_are_sorted_whatever_the_order_of_edges():
    rng = np.random.default_rng(0)
    g = BipartiteGraph.from_edges(rng.integers(0, 20, 200), rng.integers(0, 30, 200), 20, 30)
    for rowptr, col in ((g.rowptr, g.col), (g.user_rowptr, g.user_col), (g.item_rowptr, g.item_col)):
        assert all((col[a:b].diff() > 0).all() for a, b in pairwise(rowptr.tolist()))


def test_refused():
    with pytest.raises(ValueError, match="items: entry 1 is 4, expected"):
        BipartiteGraph.from_edges([0, 1], [0, 4], 2, 4)
    with pytest.raises(ValueError, match="users: entry 0 is -1"):
        BipartiteGraph.from_edges([-1, 1], [0, 3], 2, 4)
    with pytest.raises(ValueError, match="equal lengths"):
        BipartiteGraph.from_edges([0], [0, 1], 2, 4)
    with pytest.raises(TypeError, match="integer ids"):
        BipartiteGraph.from_edges([0.5], [0], 2, 4)


def test_products_with_some_items_alone():
    rng = np.random.default_rng(0)
    g = BipartiteGraph.from_edges(rng.integers(0, 20, 200), rng.integers(0, 30, 200), 21, 31)
    items = torch.tensor([7, 30, 0, 7])  # one of them twice, one that nobody has
    rows = g.item_rows(items)
    x = torch.randn(21, 5, dtype=torch.float64, requires_grad=True)
    y = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    spread = torch.zeros(31, 5, dtype=torch.float64).index_add(0, items, y)
    assert torch.equal(g.items_from_users(x, rows=rows), g.items_from_users(x)[items])
    torch.testing.assert_close(g.users_from_items(y, rows=rows), g.users_from_items(spread))
    for short, whole, leaf in (
        (g.items_from_users(x, rows=rows), g.items_from_users(x)[items], x),
        (g.users_from_items(y, rows=rows), g.users_from_items(spread), y),
    ):
        weight = torch.randn_like(short)
        torch.testing.assert_close(*(torch.autograd.grad((out * weight).sum(), leaf)[0] for out in (short, whole)))
    assert g.items_from_users(x, rows=g.item_rows(items[:0])).shape == (0, 5)
    with pytest.raises(ValueError, match="rows: entry 1 is 31, expected"):
        g.item_rows(torch.tensor([0, 31]))
    with pytest.raises(ValueError, match="graph on the CPU, got meta"):
        g.to("meta").item_rows(items)
