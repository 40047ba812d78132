"""distill_frozen_loss: the losses and both gradients are those of frozen_teacher and distill_loss one after the other."""

from __future__ import annotations

import importlib

import pytest
import torch

from mmkd import ops
from tests.ops.grid import DIMS
from tests.ops.losses import bit_equal_for_threads, compare, each_alone, gradchecks

FLOATS = (torch.float64, torch.float32)
USERS, ITEMS = 13, 17  # of the student's compact table: the teacher knows more of both
ALL_USERS, ALL_ITEMS = 30, 41


class Case:
    """A compact table over some of the teacher's nodes, a batch, and EmbKD's nodes: a sample with repeats or all its items."""

    def __init__(self, dtype=torch.float32, d=24, batch=70, k=5, modalities=2, num_nodes=9, every=False):
        generator = torch.Generator().manual_seed(d + batch + k)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        def ids(bound, *shape):
            return torch.randint(0, bound, shape, generator=generator)

        nodes = ALL_USERS + ALL_ITEMS
        own_users, own_items = (torch.randperm(n, generator=generator) for n in (ALL_USERS, ALL_ITEMS))
        own_users, own_items = own_users[:USERS], own_items[:ITEMS]
        rows = torch.cat([own_users, own_items + ALL_USERS])  # of the teacher's nodes
        self.users, self.candidates = ids(USERS, batch), ids(ITEMS, batch, k)
        self.nodes = torch.arange(USERS, USERS + ITEMS) if every else ids(USERS + ITEMS, num_nodes)
        self.listed = own_items[self.candidates]
        pairs = own_users[self.users], self.listed[:, 0] + ALL_USERS, self.listed[:, 1] + ALL_USERS
        self.asked = torch.cat([*pairs, rows[self.nodes]])
        self.table = normal(USERS + ITEMS, d) / d**0.25
        self.state = 0.2 * normal(modalities, d + 1, d) / d**0.5
        omega = torch.rand(modalities, generator=generator, dtype=torch.float64).to(dtype)
        self.constants = normal(modalities, nodes, d) / d**0.25, normal(nodes, d + 1) / d**0.5, normal(nodes, d), omega

    @property
    def leaves(self):
        return [self.table, self.state]

    def arguments(self, table, state, weights=(1.0, 0.1, 0.1, 0.01)):
        """Of the op; in float64 where the table is."""
        constants = (t.to(table.dtype) for t in self.constants)
        asked = self.asked if weights[3] else self.asked[: 3 * len(self.users)]
        return (
            table, USERS, self.users, self.candidates, self.nodes, *constants, state, asked, self.listed, ALL_USERS,
        )  # fmt: skip

    def loss(self, **settings):
        def call(table, state, impl):
            given = self.arguments(table, state, settings.get("weights", (1, 1, 1, 1)))
            return ops.distill_frozen_loss(*given, impl=impl, **settings)[0]

        return call

    def two_ops(self, table, state, *, weights=(1.0, 0.1, 0.1, 0.01), **settings):
        """`frozen_teacher`, then `distill_loss`."""
        *student, nodes, content, design, ids, omega, state, asked, listed, first = self.arguments(
            table, state, weights
        )
        margin, logits, targets = ops.frozen_teacher(content, design, ids, omega, state, asked, listed, first)
        return ops.distill_loss(*student, margin, logits, nodes, targets, weights=weights, **settings)


SETTINGS = [
    {},
    {"weights": (1.0, 2.0, 3.0, 0.5), "pair_tau": 2.0, "list_tau": 0.5, "gamma": 1.0, "alpha": 0.3, "beta": 2.0},
    {"pair_kind": "positive", "list_weight": "decoupled", "gamma": 2.5, "weights": (0.0, 1.0, 1.0, 1.0)},
]
ALONE = [{"weights": tuple(2.0 * (i == only) for i in range(4))} for only in range(4)]
PAIRS = [
    {"weights": w} for w in ((1.0, 1.0, 0.0, 0.0), (0.0, 1.0, 0.0, 1.0), (0.0, 0.0, 1.0, 1.0), (1.0, 0.0, 1.0, 0.0))
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("d", DIMS[1:])
@pytest.mark.parametrize("settings", SETTINGS, ids=["defaults", "numbers", "kinds"])
@pytest.mark.parametrize("every", [False, True], ids=["sample", "every"])
def test_grid(d, dtype, settings, every, cpu_isa, poison_empty):
    case = Case(dtype, d, every=every)
    compare(case.loss(**settings), case.leaves, dtype)


@pytest.mark.parametrize("batch", [1, 2, 31, 33, 64, 65, 700])
@pytest.mark.parametrize("k", [2, 3, 33])
@pytest.mark.parametrize("modalities", [1, 3])
def test_sizes(batch, k, modalities, cpu_isa, poison_empty):
    case = Case(batch=batch, k=k, modalities=modalities, num_nodes=2 * batch + 1)
    modality = torch.linspace(0.2, 1.0, modalities)
    compare(case.loss(list_modalities=modality, emb_modalities=2 * modality), case.leaves, torch.float32)


@pytest.mark.parametrize("settings", [*SETTINGS, *ALONE, *PAIRS, {"weights": (0.0, 0.0, 0.0, 0.0)}], ids=str)
@pytest.mark.parametrize("impl", ["cpp", "reference", "auto"])
def test_it_is_the_two_ops(settings, impl, poison_empty):
    case = Case(torch.float64, every=True)
    table, state = (t.clone().requires_grad_() for t in case.leaves)
    weights = settings.get("weights", (1.0, 0.1, 0.1, 0.01))
    given = case.arguments(table, state, weights)
    loss, terms = ops.distill_frozen_loss(*given, impl=impl, **{**settings, "weights": weights})
    if not weights[3]:
        case.nodes = case.nodes[:0]
    expected, parts = case.two_ops(table, state, **{**settings, "weights": weights})
    torch.testing.assert_close((loss, terms), (expected, parts))
    assert not terms.requires_grad
    ours, theirs = (
        torch.autograd.grad(value, (table, state), materialize_grads=True, allow_unused=True)
        for value in (loss, expected)
    )
    torch.testing.assert_close(ours, theirs)
    assert bool(ours[1].any()) == any(weights[1:])


def test_gradcheck():
    case = Case(torch.float64, d=5, batch=4, k=3, num_nodes=4)
    gradchecks([case.loss(**settings) for settings in SETTINGS], case.leaves)


@pytest.mark.parametrize("every", [False, True])
def test_each_gradient_alone_and_threads(every):
    case = Case(d=64, batch=900, k=11, every=every, num_nodes=1500)
    each_alone(case.loss(), case.leaves)
    bit_equal_for_threads(case.loss(), case.leaves)


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
    table, state = (t.requires_grad_() for t in case.leaves)
    loss, terms = ops.distill_frozen_loss(
        table, USERS, none, none.view(0, 3), none, *case.constants, state, none, none.view(0, 3), ALL_USERS, impl=impl
    )
    loss.backward()
    assert loss == 0 and terms.eq(0).all() and table.grad.eq(0).all() and state.grad.eq(0).all()


def test_more_modalities_than_embkd_takes():
    case = Case(modalities=17)
    with pytest.raises(RuntimeError, match="content: expected at most 16 modalities where EmbKD has a weight, got 17"):
        case.loss()(*case.leaves, "cpp")
    leaves = [t.requires_grad_() for t in case.leaves]
    by = {"weights": (1.0, 1.0, 1.0, 0.0)}
    seen = [torch.autograd.grad(case.loss(**by)(*leaves, impl), leaves) for impl in ("cpp", "reference")]
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-5)


def test_a_teacher_that_is_not_asked_may_be_anything():
    case = Case()
    broken = torch.full_like(case.state, float("nan"))
    values = [
        case.loss(weights=(1.0, 0.0, 0.0, 0.0))(case.table, broken, impl) for impl in ("cpp", "reference", "auto")
    ]
    assert torch.isfinite(values[0])
    torch.testing.assert_close(values[1:], values[:1] * 2)


def test_zero_rows_of_the_teacher_have_no_direction():
    case = Case()
    content, design, *_ = case.constants
    content[:, case.asked[0]] = 0
    design[case.asked[0]] = 0
    leaves = [t.requires_grad_() for t in case.leaves]
    for impl in ("cpp", "reference"):
        grads = torch.autograd.grad(case.loss()(*leaves, impl), leaves)
        assert all(torch.isfinite(g).all() for g in grads)


def test_views_and_inputs_that_are_not_written():
    case = Case()
    given = case.arguments(*case.leaves)
    copies = [t.clone() if isinstance(t, torch.Tensor) else t for t in given]
    strided = [t.T.contiguous().T if isinstance(t, torch.Tensor) and t.dim() == 2 else t for t in given]
    plain, other = ops.distill_frozen_loss(*given), ops.distill_frozen_loss(*strided)
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True) if isinstance(a, torch.Tensor))


def test_opcheck_compile_second_derivatives_and_transforms():
    case = Case(d=8, batch=9, k=3)
    leaves = [t.requires_grad_() for t in case.leaves]
    *tensors, first = case.arguments(*leaves)
    modalities = torch.ones(2) / 2, torch.ones(2)
    numbers = 1.0, 0.1, 0.1, 0.01, 1.0, True, 1.0, 1.0, 1.0, True, 2.0
    torch.library.opcheck(torch.ops.mmkd.distill_frozen.default, (*tensors, first, *modalities, *numbers, True, True))
    whole = torch.compile(lambda *own: case.loss()(*own, "cpp"), fullgraph=True, backend="aot_eager")
    ours, plain = 3 * whole(*leaves), 3 * case.loss()(*leaves, "cpp")
    torch.testing.assert_close(torch.autograd.grad(ours, leaves), torch.autograd.grad(plain, leaves))
    with pytest.raises(RuntimeError, match=r"distill_frozen: second derivatives are not supported"):
        torch.autograd.grad(case.loss()(*leaves, "cpp"), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=r"distill_frozen: transforms of torch.func are not supported"):
        torch.func.grad(lambda t: case.loss()(t, case.state, "cpp"))(case.table)


def test_indices_out_of_range_are_named(cpu_isa):
    case = Case()
    for name, at, bad in (
        ("users", 69, USERS), ("candidates", 1, -1), ("nodes", 8, 2**62), ("asked", 0, -1), ("asked", 5, ALL_USERS + ALL_ITEMS),
        ("listed", 3, ALL_ITEMS),
    ):  # fmt: skip
        given = dict(zip(NAMES, case.arguments(*case.leaves), strict=True))
        given[name] = given[name].clone()
        given[name].view(-1)[at] = bad
        for table in (case.table, case.table.clone().requires_grad_()):
            with pytest.raises(RuntimeError, match=rf"{name}: entry {at} is {bad}, expected \[0, "):
                ops.distill_frozen_loss(**{**given, "table": table}, impl="cpp")


NAMES = (
    "table", "num_users", "users", "candidates", "nodes", "content", "design", "ids", "omega", "state", "asked", "listed",
    "first_item",
)  # fmt: skip


def test_errors_name_the_argument():
    case = Case()
    given = dict(zip(NAMES, case.arguments(*case.leaves), strict=True))
    cases = [
        (ValueError, "nodes: expected a tensor, got None", {"nodes": None}),
        (TypeError, "nodes: expected", {"nodes": case.nodes.int()}),
        (ValueError, r"asked: expected shape \(219,\)", {"asked": case.asked[:-1]}),
        (ValueError, r"asked: expected shape \(210,\)", {"weights": (1.0, 1.0, 1.0, 0.0)}),
        (ValueError, r"listed: expected shape \(70, 5\)", {"listed": case.listed[:, :4]}),
        (ValueError, "candidates: expected shape", {"candidates": case.candidates[1:]}),
        (ValueError, "num_users: expected 0 to 30", {"num_users": 31}),
        (ValueError, "weights: expected four numbers", {"weights": (1.0, -1.0, 0.0, 0.0)}),
        (ValueError, "list_tau: expected > 0", {"list_tau": 0.0}),
        (ValueError, "pair_kind: expected one of", {"pair_kind": "both"}),
        (ValueError, r"emb_modalities: expected shape \(2,\)", {"emb_modalities": torch.ones(3)}),
        (ValueError, "content: is a constant", {"content": case.constants[0].clone().requires_grad_()}),
        (TypeError, "table: expected torch.float32, as content", {"table": case.table.double(), "impl": "cpp"}),
        (ValueError, r"table: expected shape \(30, 24\)", {"table": case.table[:, :8]}),
        (ValueError, "first_item: expected 0 to 71", {"first_item": -1}),
        (TypeError, "first_item: expected an int", {"first_item": 30.0}),
        (TypeError, "state: expected", {"state": None}),
        (TypeError, "list_modalities: expected", {"list_modalities": [1.0, 2.0]}),
        (ValueError, "users: expected on cpu", {"users": case.users.to("meta")}),
        (ValueError, "candidates: expected on cpu", {"candidates": case.candidates.to("meta")}),
    ]  # fmt: skip
    for kind, message, changed in cases:
        with pytest.raises(kind, match=message):
            ops.distill_frozen_loss(**{**given, **changed})


@pytest.mark.parametrize("settings", [*SETTINGS, *ALONE], ids=str)
def test_what_the_kernel_does_not_take_is_composed(settings, monkeypatch):
    case = Case()
    leaves = [t.requires_grad_() for t in case.leaves]
    weights = settings.get("weights", (1.0, 0.1, 0.1, 0.01))
    given = case.arguments(*leaves, weights)
    fused = ops.distill_frozen_loss(*given, **{**settings, "weights": weights})
    half = case.table.detach().bfloat16().requires_grad_()
    rough = ops.distill_frozen_loss(half, *given[1:], **{**settings, "weights": weights})
    torch.testing.assert_close(rough, fused, rtol=0.05, atol=0.05)
    rough[0].backward()
    case.state.grad = None
    fused[0].backward()
    assert (half.grad - case.table.grad).norm() < 0.05 * case.table.grad.norm()
    with pytest.raises(TypeError, match=r"table: expected torch.float32, as content, for impl='reference'"):
        ops.distill_frozen_loss(half, *given[1:], weights=weights, impl="reference")
    door, calls = importlib.import_module("mmkd.ops.distill_frozen"), []  # off the CPU
    monkeypatch.setattr(
        door, "_fused",
        lambda which, student, teacher, by, given, modalities: calls.append(which)
        or door.composed(student, teacher, by, given, *modalities),
    )  # fmt: skip
    table, state = (t.detach().clone().requires_grad_() for t in leaves)
    loss, terms = ops.distill_frozen_loss(*case.arguments(table, state, weights), **{**settings, "weights": weights})
    loss.backward()
    torch.testing.assert_close((loss, terms), fused)
    torch.testing.assert_close(table.grad, case.table.grad)
    torch.testing.assert_close(state.grad, case.state.grad)
    assert calls == ["cpp"]
