"""propagate_adamw_: the step against the reference, torch's own optimizer to the bit, any threads, refusals; and the
optimizer that uses it."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from mmkd import ops, reference
from mmkd.models.lightgcn import LightGCN
from mmkd.models.student import GCNStudent, MLPStudent
from mmkd.training.optim import PropagatedAdamW
from tests.ops.grid import DIMS, within_budget
from tests.ops.test_spmm import make_graph

FEW, MANY = 5, 30  # of 48 nodes
RATES = {"lr": 1e-2, "weight_decay": 0.05}


def case(g, d: int, count: int, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list]:
    """rows, their gradient and L2 weights (some zero), and weight, exp_avg, exp_avg_sq as after some steps."""
    rows = torch.randperm(g.num_nodes)[:count].sort().values
    l2 = torch.rand(count, dtype=dtype) * torch.randint(0, 2, (count,))
    tables = [torch.randn(g.num_nodes, d, dtype=torch.float64) for _ in range(3)]
    tables[2] = 0.1 + tables[2].square()
    return rows, torch.randn(count, d, dtype=torch.float64).to(dtype), l2, [t.to(dtype) for t in tables]


@pytest.mark.parametrize("count", [0, FEW, MANY])
@pytest.mark.parametrize("num_layers", [0, 1, 2, 3])
@pytest.mark.parametrize("d", [*DIMS, 16, 48])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_grid(dtype, d, num_layers, count, cpu_isa, poison_empty):
    g = make_graph()
    rows, grad, l2, tables = case(g, d, count, dtype)
    for weights in (l2, None):
        ours, eager, truth = ([t.clone() for t in tables] for _ in range(3))
        truth = [t.double() for t in truth]
        wide = None if weights is None else weights.double()
        ops.propagate_adamw_(g, grad, num_layers, rows, *ours, step=3, l2=weights, **RATES)
        ops.propagate_adamw_(g, grad, num_layers, rows, *eager, step=3, l2=weights, impl="reference", **RATES)
        ops.propagate_adamw_(
            g, grad.double(), num_layers, rows, *truth, step=3, l2=wide, impl="reference", **RATES
        )  # fmt: skip
        for mine, theirs, true in zip(ours, eager, truth, strict=True):
            within_budget(mine, theirs, true, dtype)


def test_the_reference_is_autograd_and_torchs_adamw():
    g = make_graph()
    rows, grad, l2, tables = case(g, 8, MANY)
    leaf = torch.nn.Parameter(tables[0].clone())
    optimizer = torch.optim.AdamW([leaf], betas=(0.8, 0.95), eps=1e-3, **RATES)
    ours = [tables[0].clone(), torch.zeros_like(leaf), torch.zeros_like(leaf)]
    for step in (1, 2, 3):
        optimizer.zero_grad()
        loss = (reference.propagate(g.rowptr, g.col, g.scale_as(grad.dtype), leaf, 2, rows) * grad).sum()
        (loss + 0.5 * (l2[:, None] * leaf[rows].square()).sum()).backward()
        optimizer.step()
        ops.propagate_adamw_(
            g, grad, 2, rows, *ours, step=step, betas=(0.8, 0.95), eps=1e-3, l2=l2, impl="reference", **RATES
        )  # fmt: skip
    torch.testing.assert_close(ours[0], leaf.detach(), atol=1e-12, rtol=0)
    torch.testing.assert_close(ours[2], optimizer.state[leaf]["exp_avg_sq"], atol=1e-12, rtol=0)


def fuses() -> bool:
    return torch.ops.mmkd.cpu_isa() != "generic" and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def trained(model: LightGCN, optimizer: torch.optim.Optimizer, steps: int = 4) -> list[torch.Tensor]:
    """Weights and moments after some steps of a sum of squares over different nodes each."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        rows = torch.randperm(model.graph.num_nodes, generator=generator)[:400].sort().values
        optimizer.zero_grad(set_to_none=True)
        model(rows).square().sum().backward()
        optimizer.step()
    state = optimizer.state[model.table]
    return [model.table.detach(), state["step"], state["exp_avg"], state["exp_avg_sq"]]


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("d", [16, 40, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_optimizer_has_the_bits_of_torchs(dtype, d, num_layers, decay, one_thread):
    if not fuses():
        pytest.skip("this processor rounds products that torch's build or ours does not")
    g = make_graph(3000, 800, 20_000)
    table = torch.randn(g.num_nodes, d, dtype=dtype)
    ours, plain = LightGCN(g, table, num_layers), LightGCN(g, table, num_layers)
    mine = PropagatedAdamW(ours, [{"params": [ours.table], "weight_decay": decay}], 1e-2)
    seen = trained(ours, mine)
    assert ours.table.grad is None and ours.held.grad is None
    for a, b in zip(
        seen, trained(plain, torch.optim.AdamW([plain.table], lr=1e-2, weight_decay=decay, fused=True)), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("size", [(3000, 800, 20_000), (40_000, 800, 60_000)], ids=["small", "large"])
def test_bit_equal_for_any_number_of_threads(size, cpu_isa):
    g = make_graph(*size)
    rows, grad, l2, tables = case(g, 64, 900, torch.float32)
    before, seen = torch.get_num_threads(), []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        seen.append([t.clone() for t in tables])
        ops.propagate_adamw_(g, grad, 3, rows, *seen[-1], step=2, l2=l2, **RATES)
    torch.set_num_threads(before)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_what_is_held_can_be_looked_at_and_added_to():
    g = make_graph()
    model, plain = (LightGCN(g, torch.ones(g.num_nodes, 4, dtype=torch.float64), 2) for _ in range(2))
    optimizer = PropagatedAdamW(model, [{"params": [model.table]}], 1e-2)
    rows = torch.tensor([3, 9, 40])
    model(rows).square().sum().backward()
    plain(rows).square().sum().backward()
    with pytest.raises(RuntimeError, match="a second backward pass before step"):
        model(rows).square().sum().backward()
    model.held.l2 = torch.tensor([0.0, 2.0, 0.5], dtype=torch.float64)
    plain.table.grad[rows] += model.held.l2[:, None]
    optimizer.materialize()
    torch.testing.assert_close(model.table.grad, plain.table.grad)
    model.table.grad.zero_()  # what stands there counts, and nothing is counted twice
    model(rows).sum().backward()
    optimizer.step()
    assert model.table.grad.ne(0).any() and optimizer.state[model.table]["step"] == 1 and model.held.grad is None
    model(rows).sum().backward()
    optimizer.zero_grad()
    before = model.table.detach().clone()
    optimizer.step()
    assert torch.equal(model.table, before)
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0.0)


def test_a_refused_step_does_not_count():
    g = make_graph()
    models = [LightGCN(g, torch.ones(g.num_nodes, 16), 2) for _ in range(2)]
    optimizers = [PropagatedAdamW(m, [{"params": [m.table]}], 1e-2) for m in models]
    for model in models:
        model(torch.tensor([3, 9, 40])).square().sum().backward()
    models[0].held.grad, grad = models[0].held.grad.half(), models[0].held.grad
    with pytest.raises(RuntimeError, match="grad: expected float32 or float64, got Half"):
        optimizers[0].step()
    models[0].held.grad = grad
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(models[0].table, models[1].table) and optimizers[0].state[models[0].table]["step"] == 1


def test_rows_in_any_order_and_options_that_are_torchs():
    g = make_graph()
    rows = torch.tensor([40, 3, 9, 3])
    for options in ({}, {"maximize": True}, {"amsgrad": True}):
        ours, plain = (LightGCN(g, torch.ones(g.num_nodes, 16, dtype=torch.float64), 2) for _ in range(2))
        mine = PropagatedAdamW(ours, [{"params": [ours.table], **options}], 1e-2)
        torchs = torch.optim.AdamW([{"params": [plain.table], **options}], lr=1e-2, weight_decay=0.0, fused=True)
        for model, optimizer in ((ours, mine), (plain, torchs)):
            model(rows if not options else rows.unique()).square().sum().backward()
            optimizer.step()
        torch.testing.assert_close(ours.table, plain.table, atol=1e-13, rtol=0)


OTHERS = {
    "plain": {},
    "decay, other rates": {"weight_decay": 0.1, "betas": (0.8, 0.99), "eps": 1e-6},
    "a rate that is a tensor": {"lr": torch.tensor(0.02)},
    "amsgrad": {"amsgrad": True},
    "differentiable": {"differentiable": True, "fused": False},
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_tensors_beside_the_table_step_with_torchs_bits(options):
    """Of two types, one of them without a gradient in every other step."""
    g, pairs = make_graph(), []
    for optimizer in (PropagatedAdamW, torch.optim.AdamW):
        model = LightGCN(g, torch.ones(g.num_nodes, 16), 2)
        small = [torch.nn.Parameter(torch.linspace(-1, 1, 6, dtype=t)) for t in (torch.float32, torch.float64)]
        narrow = torch.nn.Parameter(torch.linspace(-1, 1, 33))
        groups = [{"params": [model.table]}, {"params": [narrow], **options}, {"params": small}]
        args = (model, groups, 1e-2) if optimizer is PropagatedAdamW else (groups,)
        keywords = {} if optimizer is PropagatedAdamW else {"lr": 1e-2, "weight_decay": 0.0, "fused": True}
        pairs.append((model, [narrow, *small], optimizer(*args, **keywords)))
    rows = torch.tensor([3, 9, 40])
    for step in range(4):
        for model, others, optimizer in pairs:
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            loss = model(rows).square().sum() + sum((p.double() ** 3).sum() for p in others[step % 2 :])
            loss.backward()
            optimizer.step()
        for ours, torchs in zip(pairs[0][1], pairs[1][1], strict=True):
            assert torch.equal(ours, torchs)
            mine, theirs = pairs[0][2].state[ours], pairs[1][2].state[torchs]
            assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    torch.testing.assert_close(pairs[0][0].table, pairs[1][0].table)


def test_a_scaler_s_word_on_a_step_is_torchs_to_hear():
    g = make_graph()
    model = LightGCN(g, torch.ones(g.num_nodes, 16), 2)
    optimizer = PropagatedAdamW(model, [{"params": [model.table]}], 1e-2)
    model(torch.tensor([3, 9])).square().sum().backward()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(model.table, torch.ones_like(model.table))  # an overflow was found: nothing is stepped


def test_without_its_optimizer_and_in_copies_a_model_is_autograds():
    g = make_graph()
    model, rows = LightGCN(g, torch.ones(g.num_nodes, 16), 2), torch.tensor([3, 9])
    optimizer = PropagatedAdamW(model, [{"params": [model.table]}], 1e-2)
    assert PropagatedAdamW(model, [{"params": [model.table]}], 1e-2).held is optimizer.held is model.held
    twin, also = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (twin, also):
        other(rows).sum().backward()
        assert other.held is None and other.table.grad is not None and model.held.grad is None
    again = copy.deepcopy(optimizer)
    again.zero_grad()
    again.step()
    del optimizer
    gc.collect()
    model(rows).sum().backward()
    assert model.held is None and model.table.grad is not None
    with pytest.raises(ValueError, match="params: expected the model's table"):
        PropagatedAdamW(model, [{"params": [torch.nn.Parameter(torch.ones(2))]}], 1e-2)


def test_compiled_and_transformed_the_model_is_autograds():
    g = make_graph()
    model, rows = LightGCN(g, torch.ones(g.num_nodes, 16), 2), torch.tensor([3, 9])
    optimizer = PropagatedAdamW(model, [{"params": [model.table]}], 1e-2)
    torch.compile(lambda r: model(r).sum(), fullgraph=True, backend="aot_eager")(rows).backward()
    assert model.table.grad is not None and optimizer.held.grad is None


def test_models_that_cannot_hold_are_trained_by_torch():
    g = make_graph()
    table = torch.randn(g.num_nodes, 8)
    narrow, across = LightGCN(g, table, 2, torch.float16), LightGCN(g, torch.randn(8, g.num_nodes).T, 2)
    for model in (GCNStudent(g, table, 1), MLPStudent(g, table, 1), narrow, across, LightGCN(g, table.bfloat16(), 2)):
        table = model.table.detach().clone()
        optimizer = PropagatedAdamW(model, [{"params": list(model.parameters())}], 1e-2)
        model(torch.tensor([1, 2])).square().sum().backward()
        assert optimizer.held is None and model.table.grad is not None
        optimizer.step()
        assert not torch.equal(model.table, table)
    out = LightGCN(g, table, 2)  # and one that nobody asked to
    out(torch.tensor([1])).sum().backward()
    assert out.table.grad is not None


def test_refusals_name_the_argument_and_change_nothing():
    g = make_graph()
    rows, grad, l2, tables = case(g, 16, FEW, torch.float32)
    kept = [t.clone() for t in tables]
    step = {"step": 1, **RATES}
    beyond = torch.tensor([0, 1, 2, 3, 99])
    for error, words, call in [
        (TypeError, "grad: expected", lambda: ops.propagate_adamw_(g, grad.half(), 2, rows, *tables, **step)),
        (TypeError, "exp_avg: expected", lambda: ops.propagate_adamw_(g, grad, 2, rows, tables[0], tables[1].double(), tables[2], **step)),
        (TypeError, "rows: expected", lambda: ops.propagate_adamw_(g, grad, 2, rows.int(), *tables, **step)),
        (ValueError, "grad: expected shape", lambda: ops.propagate_adamw_(g, grad[:2], 2, rows, *tables, **step)),
        (ValueError, "weight: expected shape", lambda: ops.propagate_adamw_(g, grad, 2, rows, tables[0][:9], *tables[1:], **step)),
        (ValueError, "weight: expected a contiguous", lambda: ops.propagate_adamw_(g, grad, 2, rows, torch.randn(16, g.num_nodes).T, *tables[1:], **step)),
        (ValueError, "expected three tables", lambda: ops.propagate_adamw_(g, grad, 2, rows, tables[0], tables[0], tables[2], **step)),
        (ValueError, "l2: expected", lambda: ops.propagate_adamw_(g, grad, 2, rows, *tables, l2=l2[:3], **step)),
        (ValueError, "step: expected", lambda: ops.propagate_adamw_(g, grad, 2, rows, *tables, step=0, lr=1.0)),
        (ValueError, "num_layers", lambda: ops.propagate_adamw_(g, grad, -1, rows, *tables, **step)),
        (ValueError, "no CUDA|take CUDA", lambda: ops.propagate_adamw_(g, grad, 2, rows, *tables, impl="cuda", **step)),
        (RuntimeError, "rows: entry 4 is 99", lambda: ops.propagate_adamw_(g, grad, 2, beyond, *tables, **step)),
        (RuntimeError, "rows: expected node ids in ascending", lambda: ops.propagate_adamw_(g, grad, 2, rows.flip(0), *tables, **step)),
        (RuntimeError, "rows: expected node ids in ascending", lambda: ops.propagate_adamw_(g, grad, 2, rows.flip(0), *tables, impl="reference", **step)),
    ]:  # fmt: skip
        with pytest.raises(error, match=words):
            call()
    assert all(torch.equal(a, b) for a, b in zip(kept, tables, strict=True))


def test_a_column_out_of_range_is_refused():
    g = make_graph()
    rows, grad, l2, tables = case(g, 16, MANY, torch.float32)
    col = g.col.clone()
    col[3] = 10_000
    with pytest.raises(RuntimeError, match="col: entry 3"):
        torch.ops.mmkd.propagate_adamw(
            g.rowptr, col, g.scale, grad, 2, rows, l2, *tables, 1e-2, 0.9, 0.999, 1e-8, 0.0, 1
        )


def test_opcheck():
    g = make_graph(5, 4, 12)
    rows, grad, l2, tables = case(g, 16, 3, torch.float32)
    torch.library.opcheck(
        torch.ops.mmkd.propagate_adamw.default,
        (g.rowptr, g.col, g.scale, grad, 2, rows, l2, *tables, 1e-2, 0.9, 0.999, 1e-8, 0.0, 1),
    )


@pytest.mark.parametrize("torchs", [False, True], ids=["ours", "torch's step"])
def test_hooks_see_a_step_once(torchs):
    g = make_graph()
    torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])  # from the first one on torch's own step calls hooks
    model = LightGCN(g, torch.ones(g.num_nodes, 16), 2)
    optimizer = PropagatedAdamW(model, [{"params": [model.table], "maximize": torchs}], 1e-2)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    everywhere = register_optimizer_step_post_hook(lambda *_: seen.append("everywhere"))
    try:
        for step in (1, 2):
            model(torch.tensor([3, 9, 40])).square().sum().backward()
            before = model.table.detach().clone()
            optimizer.step()
            optimizer.zero_grad()
            assert seen == ["before", "after", "everywhere"] * step and not torch.equal(model.table, before)
    finally:
        everywhere.remove()
    with torch.profiler.profile() as profile:
        model(torch.tensor([3, 9, 40])).square().sum().backward()
        optimizer.step()
    assert any("Optimizer.step#" in event.key for event in profile.key_averages())
