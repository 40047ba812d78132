"""Three and more layers on a CPU, whose middle ones take a table and a side: graphs of two sides, and those that are none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmkd import BipartiteGraph, ops, reference
from tests.ops.grid import within_budget
from tests.ops.test_blocks import kept
from tests.ops.test_spmm import make_graph

KERNELS = torch.ops.mmkd
SIDES = [(30, 17, 150), (17, 30, 150), (1, 40, 60), (40, 1, 60), (12, 12, 20)]


def ways_to_name(g: BipartiteGraph) -> dict[str, torch.Tensor | None]:
    """Lists of nodes: both sides in order, in any order, and one side alone."""
    everyone = torch.arange(g.num_nodes)
    return {
        "all": None, "some": everyone[::3].contiguous(), "any order": torch.randint(0, g.num_nodes, (25,)),
        "users": everyone[: g.num_users], "items": everyone[g.num_users :], "one": everyone[-2:-1],
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_layers", [3, 4, 5, 6])
@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_against_the_reference(sides, num_layers, dtype, cpu_isa, poison_empty):
    g = make_graph(*sides)
    torch.manual_seed(num_layers)
    x = torch.randn(g.num_nodes, 20).to(dtype)
    kept_x = x.clone()
    for rows in ways_to_name(g).values():
        own, plain, wide = (t.clone().requires_grad_() for t in (x, x, x.double()))
        ours = ops.propagate(g, own, num_layers, rows)
        eager, truth = (ops.propagate(g, t, num_layers, rows, impl="reference") for t in (plain, wide))
        within_budget(ours, eager, truth, dtype)
        weight = torch.randn(truth.shape)
        for out in (ours, eager, truth):
            out.backward(weight.to(out.dtype))
        within_budget(own.grad, plain.grad, wide.grad, dtype)
        assert torch.equal(own, kept_x)


@pytest.mark.parametrize("num_layers", [2, 3, 4, 5])
@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_layers_in_bfloat16(sides, num_layers, cpu_isa, poison_empty):
    g = make_graph(*sides)
    torch.manual_seed(num_layers)
    x = torch.randn(g.num_nodes, 20)
    for rows in ways_to_name(g).values():
        own, exact = (t.clone().requires_grad_() for t in (x, x))
        ours = ops.propagate(g, own, num_layers, rows, gather=torch.bfloat16)
        truth = ops.propagate(g, exact, num_layers, rows, gather=torch.bfloat16, impl="reference")
        close = {"rtol": 0, "atol": 0.01 * float(truth.detach().abs().max())}  # sums a bit apart are rounded apart
        torch.testing.assert_close(ours, truth, **close)
        weight = torch.randn(truth.shape)
        ours.backward(weight)
        truth.backward(weight)
        torch.testing.assert_close(own.grad, exact.grad, rtol=0, atol=0.01 * float(exact.grad.abs().max()))


def adjacency(edges: list[tuple[int, int]], num_nodes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A symmetric adjacency of any edges as (rowptr, col, scale)."""
    both = np.array(sorted({e for a, b in edges for e in ((a, b), (b, a))}), np.int64).reshape(-1, 2)
    degree = np.bincount(both[:, 0], minlength=num_nodes)
    scale = 1 / np.sqrt(np.maximum(degree, 1))
    rowptr = np.concatenate([[0], np.cumsum(degree)])
    return torch.from_numpy(rowptr), torch.from_numpy(both[:, 1].astype(np.int32)), torch.from_numpy(scale)


def two_sides_and(*more: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """24 nodes against 10, isolated ones beside the border, and edges that may join nodes of the same side."""
    rng = np.random.default_rng(3)
    pairs = {(int(u), int(i)) for u, i in zip(rng.integers(0, 22, 70), rng.integers(25, 34, 70), strict=True)}
    return adjacency([*pairs, *more], 34)


GRAPHS = {
    "two sides": two_sides_and(),
    "a loop in the first row": two_sides_and((0, 0)),
    "a loop in the last row": two_sides_and((33, 33)),
    "an edge within the larger side": two_sides_and((20, 21)),
    "an edge within the smaller side": two_sides_and((32, 33)),
    "a ring of odd length": adjacency([(i, (i + 1) % 33) for i in range(33)], 34),
    "everyone with everyone": adjacency([(i, j) for i in range(12) for j in range(i)], 12),
    "no edges": adjacency([], 9),
}


@pytest.mark.parametrize("num_layers", [3, 4])
@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_need_not_have_two_sides(name, num_layers, cpu_isa, poison_empty):
    rowptr, col, scale = GRAPHS[name]
    n = len(rowptr) - 1
    torch.manual_seed(0)
    x = torch.randn(n, 16, dtype=torch.float64)
    for rows in (None, torch.arange(n), torch.arange(0, n, 5), torch.tensor([n - 1, 0, 3])):
        truth = reference.propagate(rowptr, col, scale, x, num_layers, rows)
        torch.testing.assert_close(KERNELS.propagate(rowptr, col, scale, x, num_layers, rows, None), truth)
        if rows is None:
            continue
        grad = torch.randn(len(rows), 16, dtype=torch.float64)
        back = reference.propagate_backward(rowptr, col, scale, grad, num_layers, rows)
        torch.testing.assert_close(KERNELS.propagate_backward(rowptr, col, scale, grad, num_layers, rows, None), back)
    rows = torch.arange(0, n, 2)
    grad = torch.randn(len(rows), 16, dtype=torch.float64)
    ours, truth = ([x.clone(), torch.zeros_like(x), torch.zeros_like(x)] for _ in range(2))
    settings = 1e-2, 0.9, 0.999, 1e-8, 0.0, 1
    KERNELS.propagate_adamw(rowptr, col, scale, grad, num_layers, rows, None, *ours, *settings, False)
    reference.propagate_adamw_(rowptr, col, scale, grad, num_layers, rows, None, *truth, *settings)
    for mine, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine, true)


@pytest.mark.parametrize("bad", [-1, 34, 2**31 - 1])
@pytest.mark.parametrize("entry", [0, 40, -1])
def test_a_bad_column_is_named_and_nothing_is_stepped(entry, bad, cpu_isa):
    rowptr, col, scale = two_sides_and()
    col, scale = col.clone(), scale.float()
    col[entry] = bad
    x, rows = torch.randn(34, 16), torch.arange(34)
    tables = [x.clone(), torch.zeros_like(x), torch.zeros_like(x)]
    calls = [
        lambda: KERNELS.propagate(rowptr, col, scale, x, 3, None, None),
        lambda: KERNELS.propagate(rowptr, col, scale, x, 4, rows, None),
        lambda: KERNELS.propagate_mixed(rowptr, col, scale, x, 3, None),
        lambda: KERNELS.propagate_backward(rowptr, col, scale, x, 3, rows, None),
        lambda: KERNELS.propagate_adamw(
            rowptr, col, scale, x, 3, rows, None, *tables, 1e-2, 0.9, 0.999, 1e-8, 0.0, 1, False
        ),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=rf"entry {entry % len(col)} .*is {bad}, expected \[0, 34\)"):
            call()
    assert torch.equal(tables[0], x) and not tables[1].any()


@kept
@pytest.mark.parametrize("sides", [(40_000, 8_000), (8_000, 40_000)], ids=str)
def test_middle_layers_take_a_table_and_a_side(sides):
    rng = np.random.default_rng(0)
    g = BipartiteGraph.from_edges(rng.integers(0, sides[0], 90_000), rng.integers(0, sides[1], 90_000), *sides)
    x, rows = torch.randn(g.num_nodes, 32), torch.arange(0, g.num_nodes, 4)
    grad, tables = torch.randn(len(rows), 32), [torch.rand(g.num_nodes, 32) for _ in range(3)]
    for call in (
        lambda: ops.propagate(g, x, 5, rows),
        lambda: ops.propagate(g, x, 3),
        lambda: ops.propagate_adamw_(g, grad, 5, rows, *tables, step=1, lr=1e-3),
    ):
        torch.ops.mmkd.release_memory()
        call()
        assert torch.ops.mmkd.release_memory() < 1.5 * x.numel() * 4  # the side is too small for a block
