"""student_loss: value and gradients are those of propagation, the prompt's state, the losses and L2 one after the other."""

from __future__ import annotations

import importlib

import pytest
import torch

from mmkd import ops
from mmkd.graph import BipartiteGraph
from mmkd.ops.student import StudentGradients, prompt_state
from tests.ops.grid import DIMS
from tests.ops.losses import bit_equal_for_threads, compare, each_alone, gradchecks

FLOATS = (torch.float64, torch.float32)
WEIGHTS = (1.0, 2.0, 3.0, 0.5)  # heavy enough for every part to be seen
NAMES = (
    "graph", "table", "num_layers", "rows", "num_users", "users", "candidates", "nodes", "content", "design", "ids", "omega",
    "prompt_weight", "prompt_bias", "mixed", "asked", "listed", "first_item",
)  # fmt: skip


class Case:
    """A graph, some of its nodes, a batch over them, and EmbKD's nodes with repeats."""

    def __init__(
        self, dtype=torch.float32, d=24, batch=70, k=5, modalities=2, layers=2, users=30, items=41, own=(13, 17), inner=None,
        shuffled=False,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(d + batch + k)
        inner = d if inner is None else inner

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        def ids(bound, *shape):
            return torch.randint(0, bound, shape, generator=generator)

        def some(count, of):
            picked = torch.randperm(of, generator=generator)[:count]
            return picked if shuffled else picked.sort().values

        edges = 5 * users
        self.graph = BipartiteGraph.from_edges(ids(users, edges).numpy(), ids(items, edges).numpy(), users, items)
        nodes, self.layers, self.first_item, self.num_users = users + items, layers, users, own[0]
        own_users, own_items = some(own[0], users), some(own[1], items)
        self.rows = torch.cat([own_users, own_items + users])
        self.users, self.candidates = ids(own[0], batch), ids(own[1], batch, k)
        self.nodes = ids(sum(own), batch // 3 + 1)
        self.listed = own_items[self.candidates]
        pairs = own_users[self.users], self.listed[:, 0] + users, self.listed[:, 1] + users
        self.asked = torch.cat([*pairs, self.rows[self.nodes]])
        self.table = normal(nodes, d) / d**0.25
        self.prompt = normal(inner, inner + 1) / inner**0.5, normal(inner + 1)  # k need not be e - 1
        self.mixed = 0.2 * normal(inner + 1, modalities * d) / d**0.5
        omega = torch.rand(modalities, generator=generator, dtype=torch.float64).to(dtype)
        self.constants = (
            normal(modalities, nodes, d) / d**0.25,
            normal(nodes, inner + 1) / inner**0.5,
            normal(nodes, d),
            omega,
        )
        self.l2 = torch.rand(sum(own), generator=generator, dtype=torch.float64).to(dtype) * (
            torch.arange(sum(own)) % 3 > 0
        )

    @property
    def leaves(self):
        return [self.table, *self.prompt]

    def arguments(self, table, weight, bias, weights=WEIGHTS):
        """Of the op; in float64 where the table is."""
        *constants, mixed = (t.to(weight.dtype) for t in (*self.constants, self.mixed))
        asked = self.asked if weights[3] else self.asked[: 3 * len(self.users)]
        return (
            self.graph, table, self.layers, self.rows, self.num_users, self.users, self.candidates, self.nodes, *constants,
            weight, bias, mixed, asked, self.listed, self.first_item,
        )  # fmt: skip

    def loss(self, **settings):
        settings = {"weights": WEIGHTS, **settings}

        def call(table, weight, bias, impl):
            given = self.arguments(table, weight, bias, settings["weights"])
            return ops.student_loss(*given, impl=impl, l2=self.l2, **settings)[0]

        return call

    def one_by_one(self, table, weight, bias, *, weights=WEIGHTS, gather=None, l2=None, **settings):
        """The ops of the parts."""
        given = dict(zip(NAMES, self.arguments(table, weight, bias, weights), strict=True))
        own = ops.propagate(self.graph, table, self.layers, self.rows, gather=gather)
        state = prompt_state(torch.cat([weight, bias[None]]), given["mixed"], len(given["content"]))
        names = "num_users", "users", "candidates", "nodes", "content", "design", "ids", "omega"
        loss, terms = ops.distill_frozen_loss(
            own, *(given[name] for name in names), state, given["asked"], self.listed, self.first_item, weights=weights,
            **settings,
        )  # fmt: skip
        squares = loss.new_zeros(()) if l2 is None else 0.5 * (l2 * table[self.rows].square().sum(1)).sum()
        return loss + squares, torch.cat([terms * terms.new_tensor(weights), squares.detach()[None]])


SETTINGS = [
    {},
    {"weights": (1.0, 2.0, 3.0, 0.5), "pair_tau": 2.0, "list_tau": 0.5, "gamma": 1.0, "alpha": 0.3, "beta": 2.0},
    {"pair_kind": "positive", "list_weight": "decoupled", "gamma": 2.5, "weights": (0.0, 1.0, 1.0, 1.0)},
]
PARTS = [
    {"weights": w}
    for w in ((1.0, 0.0, 0.0, 0.0), (0.0, 2.0, 0.0, 1.0), (0.0, 0.0, 2.0, 0.0), (0.0, 0.0, 0.0, 2.0), (0.0,) * 4)
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("d", DIMS[1:])
@pytest.mark.parametrize("settings", SETTINGS, ids=["defaults", "numbers", "kinds"])
def test_grid(d, dtype, settings, cpu_isa, poison_empty):
    case = Case(dtype, d)
    compare(case.loss(**settings), case.leaves, dtype)


@pytest.mark.parametrize("batch", [1, 2, 33, 300])
@pytest.mark.parametrize("layers", [0, 1, 2, 3])
@pytest.mark.parametrize("modalities", [1, 3])
@pytest.mark.parametrize("inner", [1, 2, 3, 15, 16, 40])
def test_sizes(batch, layers, modalities, inner, cpu_isa, poison_empty):
    case = Case(batch=batch, layers=layers, modalities=modalities, d=16, inner=inner)
    modality = torch.linspace(0.2, 1.0, modalities)
    compare(case.loss(list_modalities=modality, emb_modalities=2 * modality), case.leaves, torch.float32)


@pytest.mark.parametrize("settings", [*SETTINGS, *PARTS], ids=str)
@pytest.mark.parametrize("with_l2", [False, True])
@pytest.mark.parametrize("impl", ["cpp", "reference", "auto"])
def test_it_is_the_ops_of_its_parts(settings, with_l2, impl, poison_empty):
    case = Case(torch.float64)
    leaves = [t.clone().requires_grad_() for t in case.leaves]
    settings = {"weights": WEIGHTS, "l2": case.l2 if with_l2 else None, **settings}
    loss, terms = ops.student_loss(*case.arguments(*leaves, settings["weights"]), impl=impl, **settings)
    if not settings["weights"][3]:
        case.nodes = case.nodes[:0]
    expected, parts = case.one_by_one(*leaves, **settings)
    torch.testing.assert_close((loss, terms), (expected, parts))
    torch.testing.assert_close(terms.sum(), loss.detach())
    assert not terms.requires_grad
    ours, theirs = (
        torch.autograd.grad(value, leaves, materialize_grads=True, allow_unused=True) for value in (loss, expected)
    )
    torch.testing.assert_close(ours, theirs)
    assert bool(ours[1].any()) == any(settings["weights"][1:])


def test_gradcheck():
    case = Case(torch.float64, d=5, batch=4, k=3, users=6, items=7, own=(4, 5), inner=3)
    gradchecks([case.loss(**settings) for settings in SETTINGS], case.leaves)


def test_each_gradient_alone_and_threads():
    case = Case(d=64, batch=900, k=11, users=700, items=500, own=(400, 450))
    case.l2 = torch.ones(850)
    each_alone(case.loss(), case.leaves)
    bit_equal_for_threads(case.loss(), case.leaves)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_layers_gathered_in_bfloat16(layers):
    case = Case(d=32, layers=layers)
    leaves = [t.clone().requires_grad_() for t in case.leaves]
    seen = [
        torch.autograd.grad(case.loss(gather=torch.bfloat16)(*leaves, impl), leaves) for impl in ("cpp", "reference")
    ]
    torch.testing.assert_close(*seen, rtol=2e-4, atol=2e-5)
    plain = torch.autograd.grad(case.loss()(*leaves, "cpp"), leaves)
    assert not torch.equal(plain[0], seen[0][0])
    with pytest.raises(TypeError, match="table: expected float32 where bfloat16 is gathered"):
        case.loss(gather=torch.bfloat16)(case.table.double(), *case.prompt, "cpp")


def test_rows_in_any_order_and_twice():
    case = Case(torch.float64, shuffled=True)
    case.rows[1] = case.rows[0]  # a user in two places
    leaves = [t.requires_grad_() for t in case.leaves]
    seen = [torch.autograd.grad(case.loss()(*leaves, impl), leaves) for impl in ("cpp", "reference")]
    torch.testing.assert_close(*seen)


def test_a_kept_graph_and_no_gradient():
    case = Case()
    leaves = [t.requires_grad_() for t in case.leaves]
    loss = 0.5 * case.loss()(*leaves, "cpp")
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), first, rtol=0, atol=0)
    with torch.no_grad():
        assert torch.equal(0.5 * case.loss()(*leaves, "cpp"), loss)


@pytest.mark.parametrize("impl", ["cpp", "reference", "auto"])
def test_nothing_to_do(impl, poison_empty):
    case = Case()
    none = torch.empty(0, dtype=torch.int64)
    leaves = [t.requires_grad_() for t in case.leaves]
    given = dict(zip(NAMES, case.arguments(*leaves), strict=True))
    given |= {"rows": none, "num_users": 0, "users": none, "candidates": none.view(0, 3), "nodes": none, "asked": none}
    loss, terms = ops.student_loss(**{**given, "listed": none.view(0, 3)}, impl=impl)
    loss.backward()
    assert loss == 0 and terms.eq(0).all() and all(t.grad.eq(0).all() for t in leaves)


def test_the_gradients_alone_are_those_of_the_loss():
    """What a training loop takes: the gradient of the propagated rows, not yet of the table."""
    case = Case(d=32)
    leaves = [t.requires_grad_() for t in case.leaves]
    names = (
        "pair_tau",
        "pair_kind",
        "alpha",
        "beta",
        "list_tau",
        "list_weight",
        "gamma",
        "list_modalities",
        "emb_modalities",
    )
    settings = dict(zip(names, (1.0, "bernoulli", 1.0, 1.0, 1.0, "coupled", 2.0, None, None), strict=True))
    step = StudentGradients(
        case.graph,
        case.table,
        2,
        case.constants,
        *case.prompt,
        case.mixed,
        case.first_item,
        weights=WEIGHTS,
        **settings,
    )
    batch = case.rows, case.l2, case.num_users, case.users, case.candidates, case.nodes, case.asked, case.listed
    terms, rows, weight, bias = step(*batch)
    loss, expected = ops.student_loss(*case.arguments(*leaves), l2=case.l2, weights=WEIGHTS)
    table = torch.autograd.grad(loss, leaves)
    assert torch.equal(terms, expected) and torch.equal(weight, table[1]) and torch.equal(bias, table[2])
    own = case.table.detach().clone().requires_grad_()
    ops.propagate(case.graph, own, 2, case.rows).backward(rows)
    own.grad.index_add_(0, case.rows, case.l2[:, None] * own.detach()[case.rows])
    torch.testing.assert_close(own.grad, table[0])
    assert [t.numel() for t in step(*batch, need_prompt=False)[2:]] == [0, 0]
    with torch.no_grad():  # the values they have when a step is made
        case.table.mul_(2)
        case.prompt[0].zero_()
    assert not torch.equal(step(*batch)[0], terms)
    broken = case.candidates.clone()
    broken[3, 1] = 17
    with pytest.raises(RuntimeError, match=r"candidates: entry 16 is 17, expected \[0, 17\)"):
        step(*batch[:4], broken, *batch[5:])
    with pytest.raises(RuntimeError, match="l2: expected size 30"):
        step(case.rows, case.l2[1:], *batch[2:])


def test_views_and_inputs_that_are_not_written():
    case = Case()
    given = case.arguments(*case.leaves)
    copies = [t.clone() if isinstance(t, torch.Tensor) else t for t in given]
    strided = [t.T.contiguous().T if isinstance(t, torch.Tensor) and t.dim() == 2 else t for t in given]
    plain, other = ops.student_loss(*given), ops.student_loss(*strided)
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True) if isinstance(a, torch.Tensor))


def test_opcheck_compile_second_derivatives_and_transforms():
    case = Case(d=16, batch=9, k=3)
    leaves = [t.requires_grad_() for t in case.leaves]
    graph, table, layers, rows, *tensors, first = case.arguments(*leaves)
    given = graph.rowptr, graph.col, graph.scale_as(table.dtype), table, layers, rows, False, case.l2
    modalities = torch.ones(2) / 2, torch.ones(2)
    numbers = 1.0, 0.1, 0.1, 0.01, 1.0, True, 1.0, 1.0, 1.0, True, 2.0
    op = torch.ops.mmkd.student.default
    torch.library.opcheck(op, (*given, *tensors, first, *modalities, *numbers, True, True))
    with torch.no_grad():
        torch.library.opcheck(op, (*given, *tensors, first, *modalities, *numbers, False, False))
    whole = torch.compile(lambda *own: case.loss()(*own, "cpp"), fullgraph=True, backend="aot_eager")
    ours, plain = 3 * whole(*leaves), 3 * case.loss()(*leaves, "cpp")
    torch.testing.assert_close(torch.autograd.grad(ours, leaves), torch.autograd.grad(plain, leaves))
    with pytest.raises(RuntimeError, match=r"student: second derivatives are not supported"):
        torch.autograd.grad(case.loss()(*leaves, "cpp"), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=r"student: transforms of torch.func are not supported"):
        torch.func.grad(lambda t: case.loss()(t, *case.prompt, "cpp"))(case.table)


def test_indices_out_of_range_are_named(cpu_isa):
    case = Case()
    for name, at, bad in (
        ("rows", 2, 71), ("rows", 0, -1), ("users", 69, 13), ("candidates", 1, -1), ("nodes", 8, 2**62), ("asked", 0, -1),
        ("listed", 3, 41),
    ):  # fmt: skip
        given = dict(zip(NAMES, case.arguments(*case.leaves), strict=True))
        given[name] = given[name].clone()
        given[name].view(-1)[at] = bad
        with pytest.raises(RuntimeError, match=rf"{name}: entry {at} is {bad}, expected \[0, "):
            ops.student_loss(**given, impl="cpp")


def test_errors_name_the_argument():
    case = Case()
    given = dict(zip(NAMES, case.arguments(*case.leaves), strict=True))
    weight, bias = case.prompt
    cases = [
        (ValueError, r"table: expected shape \(71, 24\)", {"table": case.table[1:]}),
        (TypeError, "table: expected a tensor of", {"table": case.table.long()}),
        (ValueError, "num_layers: expected an int >= 0", {"num_layers": -1}),
        (TypeError, "rows: expected a tensor of int64", {"rows": case.rows.int()}),
        (ValueError, "num_users: expected 0 to 30, the rows of rows", {"num_users": 31}),
        (ValueError, r"prompt_bias: expected shape \(25,\)", {"prompt_bias": bias[1:]}),
        (TypeError, "prompt_weight: expected a tensor of float32", {"prompt_weight": weight.double()}),
        (ValueError, r"mixed: expected shape \(25, 48\)", {"mixed": case.mixed[:, :24]}),
        (ValueError, "mixed: is a constant", {"mixed": case.mixed.clone().requires_grad_()}),
        (ValueError, r"design: expected shape \(71, 25\)", {"design": case.constants[1][:, 1:]}),
        (ValueError, r"l2: expected shape \(30,\)", {"l2": case.l2[1:]}),
        (ValueError, "l2: is a constant", {"l2": case.l2.clone().requires_grad_()}),
        (ValueError, "nodes: expected a tensor, got None", {"nodes": None}),
        (ValueError, r"asked: expected shape \(234,\)", {"asked": case.asked[:-1]}),
        (ValueError, r"listed: expected shape \(70, 5\)", {"listed": case.listed[:, :4]}),
        (ValueError, "weights: expected four numbers", {"weights": (1.0, -1.0, 0.0, 0.0)}),
        (ValueError, "pair_kind: expected one of", {"pair_kind": "both"}),
        (ValueError, r"emb_modalities: expected shape \(2,\)", {"emb_modalities": torch.ones(3)}),
        (ValueError, "gather: expected torch.bfloat16 or None", {"gather": torch.float16}),
        (ValueError, "users: expected on cpu", {"users": case.users.to("meta")}),
        (ValueError, "prompt_bias: expected on cpu", {"prompt_bias": bias.to("meta")}),
        (TypeError, "table: expected torch.float32, as content", {"table": case.table.double(), "impl": "cpp"}),
    ]  # fmt: skip
    for kind, message, changed in cases:
        with pytest.raises(kind, match=message):
            ops.student_loss(**{**given, **changed})


@pytest.mark.parametrize("settings", [*SETTINGS, *PARTS[:-1]], ids=str)
def test_what_the_kernel_does_not_take_is_composed(settings, monkeypatch):
    case = Case()
    leaves = [t.requires_grad_() for t in case.leaves]
    settings = {"weights": WEIGHTS, "l2": case.l2, **settings}
    given = case.arguments(*leaves, settings["weights"])
    fused = ops.student_loss(*given, **settings)
    wide = case.table.detach().double().requires_grad_()  # a table of another type than the constants
    other = ops.student_loss(given[0], wide, *given[2:], **settings)
    torch.testing.assert_close(other[1].float(), fused[1], rtol=1e-4, atol=1e-5)
    other[0].backward()
    ours = torch.autograd.grad(fused[0], leaves)
    torch.testing.assert_close(wide.grad.float(), ours[0], rtol=1e-4, atol=1e-5)
    door, calls = importlib.import_module("mmkd.ops.student"), []  # off the CPU
    monkeypatch.setattr(
        door, "_fused", lambda which, *args: calls.append(which) or door.composed(*args[:-1], *args[-1])
    )
    again = ops.student_loss(*given, **settings)
    torch.testing.assert_close(again, fused)
    torch.testing.assert_close(torch.autograd.grad(again[0], leaves), ours)
    assert calls == ["cpp"]


def test_a_composed_loss_under_autocast():
    case = Case()
    leaves = [t.requires_grad_() for t in case.leaves]
    wide = case.table.detach().double().requires_grad_()
    given = case.arguments(*leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = ops.student_loss(given[0], wide, *given[2:], weights=WEIGHTS, l2=case.l2.double())
    loss.backward()
    plain = torch.autograd.grad(case.loss()(*leaves, "cpp"), leaves)
    assert (wide.grad.float() - plain[0]).norm() < 0.05 * plain[0].norm()


def test_a_teacher_without_modalities_is_refused():
    case = Case()
    given = dict(zip(NAMES, case.arguments(*case.leaves), strict=True))
    given |= {"content": case.constants[0][:0], "omega": case.constants[3][:0], "mixed": case.mixed[:, :0]}
    with pytest.raises(ValueError, match="content: expected at least one modality"):
        ops.student_loss(**given)
