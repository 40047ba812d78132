"""propagate(gather=bfloat16): float32 tables whose layers are gathered in half the bytes, forward, back and in a step of AdamW."""

from __future__ import annotations

import pytest
import torch

from mmkd import ops, reference
from mmkd.models.lightgcn import LightGCN
from mmkd.training.optim import PropagatedAdamW
from tests.ops.grid import DIMS
from tests.ops.test_propagate_adamw import RATES, case, fuses, trained
from tests.ops.test_spmm import make_graph

BF16 = torch.bfloat16


def rows_of(g, kind: str) -> torch.Tensor | None:
    n = g.num_nodes
    return {
        "all": None,
        "none": torch.empty(0, dtype=torch.int64),
        "few": torch.tensor([n - 1, 0, 3, 3]),
        "many": torch.randperm(n)[: 2 * n // 3],
    }[kind]


def as_rounded(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Sums in another order may fall on the other side of a rounding to bfloat16: few entries, by 2^-8 at most."""
    assert ours.shape == theirs.shape and ours.dtype == torch.float32 and torch.isfinite(ours).all()
    if ours.numel():
        off, size = (ours - theirs).abs(), theirs.abs().max().clamp_min(1e-30)
        assert off.max() <= 2**-8 * size and off.mean() <= 2e-5 * size, (off.max() / size, off.mean() / size)


@pytest.mark.parametrize("kind", ["all", "none", "few", "many"])
@pytest.mark.parametrize("num_layers", [0, 1, 2, 3])
@pytest.mark.parametrize("d", [*DIMS, 16, 48])
def test_grid(d, num_layers, kind, cpu_isa, poison_empty):
    g, rows = make_graph(), None
    x, rows = torch.randn(g.num_nodes, d, requires_grad=True), rows_of(g, kind)
    ours = ops.propagate(g, x, num_layers, rows=rows, gather=BF16)
    theirs = reference.propagate_mixed(g.rowptr, g.col, g.scale, x, num_layers, rows)
    as_rounded(ours.detach(), theirs.detach())
    grad = torch.randn_like(ours)
    (back,) = torch.autograd.grad(ours, x, grad)
    named = torch.arange(g.num_nodes) if rows is None else rows
    as_rounded(back, reference.propagate_mixed_backward(g.rowptr, g.col, g.scale, grad, num_layers, named))
    as_rounded(back, torch.autograd.grad(theirs, x, grad)[0])


def test_error_against_float64_is_that_of_one_rounding_a_layer():
    g = make_graph(3000, 800, 20_000)
    x = torch.randn(g.num_nodes, 64)
    truth = ops.propagate(g, x.double(), 3)
    off = (ops.propagate(g, x, 3, gather=BF16).double() - truth).abs().max() / truth.abs().max()
    narrow = (ops.propagate(g, x.to(BF16), 3).double() - truth).abs().max() / truth.abs().max()
    assert (
        1e-6 < off < 2e-3 and off < narrow / 2
    )  # a table in bfloat16 rounds what is added and what comes back as well


def test_numbers_that_bfloat16_has_give_the_bits_of_float32():
    g = make_graph(3000, 800, 20_000)
    x = torch.randint(-3, 4, (g.num_nodes, 64)).float()
    assert torch.equal(ops.propagate(g, x, 1, gather=BF16), ops.propagate(g, x, 1))


@pytest.mark.parametrize("size", [(3000, 800, 20_000), (40_000, 800, 60_000)], ids=["small", "large"])
def test_rows_are_those_of_all_and_any_number_of_threads_gives_the_same_bits(size, cpu_isa):
    g = make_graph(*size)
    x, before, seen = torch.randn(g.num_nodes, 64), torch.get_num_threads(), []
    rows, many = torch.randperm(g.num_nodes)[:700], torch.randperm(g.num_nodes)[: g.num_nodes // 2]
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        full = ops.propagate(g, x, 2, gather=BF16)
        for some in (rows, many):
            leaf = x.clone().requires_grad_()
            out = ops.propagate(g, leaf, 2, rows=some, gather=BF16)
            out.square().sum().backward()
            assert torch.equal(out, full[some])
            seen.append((some is rows, leaf.grad))
    torch.set_num_threads(before)
    for kind in (True, False):
        first, *others = [grad for few, grad in seen if few is kind]
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("num_layers", [0, 1, 2, 3])
@pytest.mark.parametrize("d", [7, 16, 40, 64])
def test_a_step_of_adamw_against_the_reference(d, num_layers, cpu_isa):
    g = make_graph()
    rows, grad, l2, tables = case(g, d, 30, torch.float32)
    ours, theirs = ([t.clone() for t in tables] for _ in range(2))
    for impl, to in (("cpp", ours), ("reference", theirs)):
        ops.propagate_adamw_(g, grad, num_layers, rows, *to, step=3, l2=l2, gather=BF16, impl=impl, **RATES)
    for mine, other in zip(ours, theirs, strict=True):
        as_rounded(mine, other)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("d", [16, 40, 64])
def test_the_optimizer_has_the_bits_of_torchs(d, num_layers, one_thread):
    if not fuses():
        pytest.skip("this processor rounds products that torch's build or ours does not")
    g = make_graph(3000, 800, 20_000)
    table = torch.randn(g.num_nodes, d)
    ours, plain = (LightGCN(g, table, num_layers, BF16) for _ in range(2))
    mine = PropagatedAdamW(ours, [{"params": [ours.table]}], 1e-2)
    seen = trained(ours, mine)
    assert ours.table.grad is None and mine.held.gather == BF16
    theirs = trained(plain, torch.optim.AdamW([plain.table], lr=1e-2, weight_decay=0, fused=True))
    assert all(torch.equal(a, b) for a, b in zip(seen, theirs, strict=True))


def test_without_gradients_a_model_is_float32():
    g = make_graph()
    table = torch.randn(g.num_nodes, 16)
    narrow, wide = LightGCN(g, table, 2, BF16), LightGCN(g, table, 2)
    assert all(torch.equal(a, b) for a, b in zip(narrow.tables(), wide.tables(), strict=True))
    assert not torch.equal(narrow(), wide()) and narrow().dtype == torch.float32
    rows = torch.tensor([0, 7])
    optimizer = PropagatedAdamW(narrow, [{"params": [narrow.table]}], 1e-2)
    narrow(rows).sum().backward()
    held = narrow.held.dense(narrow.table)
    optimizer.materialize()
    assert torch.equal(narrow.table.grad, held)


def test_infinity_stays_what_it_is():
    g = make_graph()
    x = torch.randn(g.num_nodes, 16)
    x[3, 0], x[5, 1], x[7, 2] = float("inf"), float("nan"), 3.4e38  # the last rounds to infinity
    ours = ops.propagate(g, x, 1, gather=BF16)
    theirs = ops.propagate(g, x, 1, gather=BF16, impl="reference")
    for count in (torch.isinf, torch.isnan):
        assert count(ours).any() and torch.equal(count(ours), count(theirs))


def test_a_model_that_is_changed_under_its_optimizer():
    g = make_graph()
    model = LightGCN(g, torch.randn(g.num_nodes, 16), 2, BF16)
    optimizer = PropagatedAdamW(model, [{"params": [model.table]}], 1e-2)
    rows = torch.tensor([0, 7])
    model.compute = None
    assert torch.equal(model(rows), model()[rows])
    model(rows).sum().backward()
    assert optimizer.held.grad is None and model.table.grad is not None
    wide = LightGCN(g, torch.randn(g.num_nodes, 16), 2, BF16)
    optimizer = PropagatedAdamW(wide, [{"params": [wide.table]}], 1e-2)
    wide.double()(rows).sum().backward()
    assert optimizer.held.grad is None and wide.table.grad.dtype == torch.float64


def test_refusals_name_the_argument():
    g = make_graph()
    x, rows = torch.randn(g.num_nodes, 8), torch.tensor([1, 5])
    with pytest.raises(ValueError, match=r"gather: expected torch.bfloat16 or None, got torch.float16"):
        ops.propagate(g, x, 2, gather=torch.float16)
    for dtype in (torch.float64, BF16, torch.float16):
        with pytest.raises(TypeError, match="x: expected float32 where bfloat16 is gathered"):
            ops.propagate(g, x.to(dtype), 2, gather=BF16)
    tables = [torch.ones(g.num_nodes, 8, dtype=torch.float64) for _ in range(3)]
    with pytest.raises(TypeError, match="grad: expected float32 where bfloat16 is gathered"):
        ops.propagate_adamw_(g, torch.ones(2, 8).double(), 2, rows, *tables, step=1, lr=0.1, gather=BF16)
    with pytest.raises(RuntimeError, match="rows: entry 0 is 99"):
        ops.propagate(g, x, 2, rows=torch.tensor([99]), gather=BF16)
    raw = torch.ops.mmkd.propagate_mixed
    with pytest.raises(RuntimeError, match="x: expected dtype"):
        raw(g.rowptr, g.col, g.scale.double(), x.double(), 2, None)
    bad = g.col.clone()
    bad[-1] = g.num_nodes
    with pytest.raises(RuntimeError, match="col"):
        raw(g.rowptr, bad, g.scale, x, 2, None)


def test_opcheck_and_compile():
    g = make_graph()
    x, rows = torch.randn(g.num_nodes, 16, requires_grad=True), torch.tensor([4, 0, 4])
    for given in (None, rows):
        torch.library.opcheck(torch.ops.mmkd.propagate_mixed.default, (g.rowptr, g.col, g.scale, x, 2, given))
    grad = torch.randn(3, 16, requires_grad=True)
    torch.library.opcheck(torch.ops.mmkd.propagate_mixed_backward.default, (g.rowptr, g.col, g.scale, grad, 2, rows))

    def loss(x):
        return ops.propagate(g, x, 2, rows=rows, gather=BF16).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (ours,), (theirs,) = (torch.autograd.grad(f(x), x) for f in (compiled, loss))
    torch.testing.assert_close(ours, theirs)
