"""distill_loss: all losses at once are the losses one by one, with one gradient for the table."""

from __future__ import annotations

import importlib
from itertools import product

import pytest
import torch

from mmkd import ops
from tests.ops.grid import DIMS
from tests.ops.losses import bit_equal_for_threads, compare, each_alone, gradchecks

FLOATS = (torch.float64, torch.float32)
USERS, ITEMS = 13, 17


class Case:
    """A batch over a table of users, then items; nodes for EmbKD with repeats, and, `every`, all items in order."""

    def __init__(self, dtype=torch.float32, d=24, batch=70, k=5, modalities=2, num_nodes=9, every=False):
        torch.manual_seed(d + batch + k)
        self.users = torch.randint(0, USERS, (batch,))
        self.candidates = torch.randint(0, ITEMS, (batch, k))
        self.nodes = torch.arange(USERS, USERS + ITEMS) if every else torch.randint(0, USERS + ITEMS, (num_nodes,))
        self.table = (torch.randn(USERS + ITEMS, d) / d**0.25).to(dtype)
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        self.margin = torch.randn(batch, dtype=acc)
        self.logits = torch.randn(modalities, batch, k, dtype=acc)
        self.targets = torch.randn(modalities, len(self.nodes), d).to(dtype)

    @property
    def leaves(self):
        return [self.table, self.margin, self.logits, self.targets]

    def loss(self, **settings):
        def call(table, margin, logits, targets, impl):
            return ops.distill_loss(
                table, USERS, self.users, self.candidates, margin, logits, self.nodes, targets, impl=impl, **settings
            )[0]

        return call


SETTINGS = [
    {},
    {"weights": (1.0, 2.0, 3.0, 0.5), "pair_tau": 2.0, "list_tau": 0.5, "gamma": 1.0, "alpha": 0.3, "beta": 2.0},
    {"pair_kind": "positive", "list_weight": "decoupled", "gamma": 2.5, "weights": (0.0, 1.0, 1.0, 1.0)},
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("d", DIMS[1:])
@pytest.mark.parametrize("settings", SETTINGS, ids=["defaults", "numbers", "kinds"])
@pytest.mark.parametrize("every", [False, True], ids=["sample", "every"])
def test_grid(d, dtype, settings, every, cpu_isa, poison_empty):
    case = Case(dtype, d, every=every)
    compare(case.loss(**settings), case.leaves, dtype)


@pytest.mark.parametrize("batch", [1, 2, 63, 64, 65, 700])
@pytest.mark.parametrize("k", [2, 3, 33])
@pytest.mark.parametrize("modalities", [1, 3])
def test_sizes(batch, k, modalities, cpu_isa, poison_empty):
    case = Case(batch=batch, k=k, modalities=modalities, num_nodes=2 * batch + 1)
    modality = torch.linspace(0.2, 1.0, modalities)
    compare(case.loss(list_modalities=modality, emb_modalities=2 * modality), case.leaves, torch.float32)


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [*product(("cpp", "reference"), FLOATS), *product(["auto"], (*FLOATS, torch.bfloat16))],  # 16 bits are composed
)
def test_it_is_the_sum_of_the_single_losses(impl, dtype):
    case, weights = Case(dtype, every=True), (0.7, 0.2, 1.5, 0.3)
    table, margin, logits, targets = (t.clone().requires_grad_() for t in case.leaves)
    loss, terms = ops.distill_loss(
        table, USERS, case.users, case.candidates, margin, logits, case.nodes, targets, weights=weights, impl=impl
    )
    alone = table[:USERS], table[USERS:], case.users
    bpr, pair = ops.bpr_pair_kd_loss(*alone, case.candidates[:, 0], case.candidates[:, 1], margin)
    by_list = ops.list_kd_loss(*alone, case.candidates, logits)
    emb = ops.emb_kd_loss(table[case.nodes], targets)
    expected = torch.stack([bpr, pair, by_list, emb])
    torch.testing.assert_close(terms, expected.detach())
    assert not terms.requires_grad
    total = (torch.tensor(weights, dtype=expected.dtype) * expected).sum()
    torch.testing.assert_close(loss, total)
    leaves = (table, margin, logits, targets)
    wide = dtype != torch.bfloat16
    torch.testing.assert_close(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(total, leaves),
        rtol=1e-5 if wide else 0.05, atol=1e-6 if wide else 1e-3,
    )  # fmt: skip


@pytest.mark.parametrize("only", range(4))
@pytest.mark.parametrize("impl", ["cpp", "reference", "auto"])
def test_each_part_alone_needs_only_its_own(only, impl):
    case = Case(torch.float64)
    weights = tuple(2.0 * (i == only) for i in range(4))
    given = {
        "teacher_margin": case.margin, "teacher_logits": case.logits, "nodes": case.nodes, "targets": case.targets,
    }  # fmt: skip
    own = {1: ["teacher_margin"], 2: ["teacher_logits"], 3: ["nodes", "targets"]}.get(only, [])
    some = {name: given[name] for name in own}

    def loss(**extra):
        table = case.table.clone().requires_grad_()
        loss, terms = ops.distill_loss(
            table, USERS, case.users, case.candidates, weights=weights, impl=impl, **some, **extra
        )
        assert all(t == 0 for i, t in enumerate(terms) if i != only)
        return loss, torch.autograd.grad(loss, table)[0]

    truth = case.loss(weights=weights)
    table = case.table.clone().requires_grad_()
    expected = truth(table, case.margin, case.logits, case.targets, "reference")
    value, grad = loss()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, table)[0])
    if own:
        with pytest.raises(ValueError, match=f"{own[0]}: expected a tensor, got None"):
            ops.distill_loss(case.table, USERS, case.users, case.candidates, weights=weights, impl=impl)


def test_gradcheck():
    case = Case(torch.float64, d=5, batch=4, k=3, num_nodes=4)
    gradchecks([case.loss(**settings) for settings in SETTINGS], case.leaves)


@pytest.mark.parametrize("every", [False, True])
def test_each_gradient_alone_and_threads(every):
    case = Case(d=64, batch=900, k=11, every=every, num_nodes=300)
    each_alone(case.loss(), case.leaves)
    bit_equal_for_threads(case.loss(), case.leaves)


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_a_kept_graph_gives_its_gradients_again(scale):
    case = Case()
    leaves = [t.requires_grad_() for t in case.leaves]
    loss = scale * case.loss()(*leaves, "cpp")
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    first[0].zero_()  # the caller's own
    again = torch.autograd.grad(loss, leaves, retain_graph=True)
    torch.testing.assert_close(again, tuple(kept), rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves[0])[0], kept[0], rtol=0, atol=0)


def test_a_large_table_written_past_the_caches():
    torch.manual_seed(0)
    table = torch.randn(40_000, 64, requires_grad=True)
    users, candidates = torch.randint(0, 20_000, (300,)), torch.randint(0, 20_000, (300, 4))
    nodes = torch.randint(0, 40_000, (500,))
    arguments = users, candidates, torch.randn(300), torch.randn(1, 300, 4), nodes, torch.randn(1, 500, 64)
    ours, theirs = (
        torch.autograd.grad(ops.distill_loss(table, 20_000, *arguments, impl=impl)[0], table)[0]
        for impl in ("cpp", "reference")
    )
    torch.testing.assert_close(ours, theirs)
    touched = torch.cat([users, candidates.flatten() + 20_000, nodes]).unique()
    assert ours[touched].ne(0).any(1).all() and ours.ne(0).any(1).sum() == len(touched)


@pytest.mark.parametrize("impl", ["cpp", "reference", "auto"])
def test_nothing_to_do(impl, poison_empty):
    table = torch.randn(USERS + ITEMS, 8, requires_grad=True)
    none = torch.empty(0, dtype=torch.int64)
    empty = none, torch.empty(0, 3, dtype=torch.int64), torch.empty(0), torch.empty(2, 0, 3), none, torch.empty(2, 0, 8)
    loss, terms = ops.distill_loss(table, USERS, *empty, impl=impl)
    loss.backward()
    assert loss == 0 and terms.eq(0).all() and table.grad.eq(0).all()
    loss, terms = ops.distill_loss(table, USERS, *empty[:2], weights=(0, 0, 0, 0), impl=impl)
    assert loss == 0 and terms.shape == (4,)
    for place in (2, 3, 5):  # a gradient of nothing, scaled
        wanted = empty[place].clone().requires_grad_()
        loss, _ = ops.distill_loss(table.detach(), USERS, *empty[:place], wanted, *empty[place + 1 :], impl=impl)
        if impl != "reference" or loss.requires_grad:
            (2 * loss).backward()
            assert wanted.grad is None or wanted.grad.shape == wanted.shape


def test_views_and_one_modality_without_its_axis():
    case = Case(modalities=1)
    plain = ops.distill_loss(
        case.table, USERS, case.users, case.candidates, case.margin, case.logits, case.nodes, case.targets
    )
    strided = ops.distill_loss(
        case.table.T.contiguous().T, USERS, case.users, case.candidates.T.contiguous().T, case.margin,
        case.logits[0].T.contiguous().T, case.nodes, case.targets[0],
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(plain, strided, strict=True))


def test_opcheck_compile_and_no_gradient():
    case = Case(d=8, batch=9, k=3)
    leaves = [t.requires_grad_() for t in case.leaves]
    table, margin, logits, targets = leaves
    ones = torch.ones(2)
    arguments = (
        table, USERS, case.users, case.candidates, margin, logits, case.nodes, targets, ones / 2, ones, 1.0, 0.1, 0.1,
        0.01, 1.0, True, 1.0, 1.0, 1.0, True, 2.0, True, True, True, True,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.mmkd.distill.default, arguments)
    whole = torch.compile(lambda *own: case.loss()(*own, "cpp"), fullgraph=True, backend="aot_eager")
    for scale in (1.0, 3.0):
        ours, plain = scale * whole(*leaves), scale * case.loss()(*leaves, "cpp")
        torch.testing.assert_close(torch.autograd.grad(ours, leaves), torch.autograd.grad(plain, leaves))
    with torch.no_grad():
        assert not case.loss()(*leaves, "cpp").requires_grad


def test_second_derivatives_raise():
    case = Case()
    leaves = [t.requires_grad_() for t in case.leaves]
    with pytest.raises(RuntimeError, match=r"distill: second derivatives are not supported"):
        torch.autograd.grad(case.loss()(*leaves, "cpp"), leaves, create_graph=True)


def test_transforms_are_refused():
    case = Case()
    with pytest.raises(RuntimeError, match=r"distill: transforms of torch.func are not supported"):
        torch.func.grad(lambda t: case.loss()(t, *case.leaves[1:], "cpp"))(case.table)


def test_what_has_no_weight_is_not_looked_at():
    case = Case()
    with torch.no_grad():
        case.table[0] = float("inf")
    for impl in ("cpp", "reference"):
        table = case.table.clone().requires_grad_()
        nodes = case.nodes.clamp_min(1)
        loss, terms = ops.distill_loss(
            table,
            USERS,
            case.users,
            case.candidates,
            nodes=nodes,
            targets=case.targets,
            weights=(0, 0, 0, 1),
            impl=impl,
        )
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(terms).all() and torch.isfinite(table.grad).all()


def test_indices_out_of_range_are_named(cpu_isa):
    case = Case()
    for name, at, bad in (
        ("users", 1, USERS), ("users", 69, -1), ("candidates", 1, ITEMS), ("candidates", 1, -1), ("nodes", 1, USERS + ITEMS),
        ("nodes", 1, -1), ("nodes", 8, 2**62),
    ):  # fmt: skip
        broken = {n: getattr(case, n) for n in ("users", "candidates", "nodes")}
        index = broken[name].clone()
        index.view(-1)[at] = bad
        broken[name] = index
        for table in (case.table, case.table.clone().requires_grad_()):
            with pytest.raises(RuntimeError, match=rf"{name}: entry {at} is {bad}, expected \[0, "):
                ops.distill_loss(
                    table, USERS, broken["users"], broken["candidates"], case.margin, case.logits, broken["nodes"],
                    case.targets, impl="cpp",
                )  # fmt: skip


def test_only_what_was_looked_at_is_named():
    case = Case()
    with pytest.raises(RuntimeError, match="nodes: entry 0 is 99"):
        ops.distill_loss(
            case.table, USERS, case.users + USERS, case.candidates, nodes=torch.full((9,), 99), targets=case.targets,
            weights=(0, 0, 0, 1), impl="cpp",
        )  # fmt: skip


def test_errors_name_the_argument():
    case = Case()

    def call(**changed):
        arguments = {
            "table": case.table, "num_users": USERS, "users": case.users, "candidates": case.candidates,
            "teacher_margin": case.margin, "teacher_logits": case.logits, "nodes": case.nodes, "targets": case.targets,
        }  # fmt: skip
        return ops.distill_loss(**{**arguments, **changed})

    cases = [
        (TypeError, "table: expected", {"table": case.table.int()}),
        (ValueError, "num_users: expected 0 to 30", {"num_users": 31}),
        (TypeError, "num_users: expected an int", {"num_users": 12.5}),
        (TypeError, "num_users: expected an int", {"num_users": None}),
        (ValueError, "weights: expected four numbers", {"weights": None}),
        (ValueError, "weights: expected four numbers", {"weights": ("a", 1.0, 1.0, 1.0)}),
        (TypeError, "users: expected", {"users": case.users.int()}),
        (ValueError, "candidates: expected shape", {"candidates": case.candidates[1:]}),
        (ValueError, "candidates: expected K >= 2", {"candidates": case.candidates[:, :1]}),
        (ValueError, "teacher_margin: expected shape", {"teacher_margin": case.margin[1:]}),
        (ValueError, "teacher_logits: expected shape", {"teacher_logits": case.logits[..., 1:]}),
        (ValueError, "targets: expected shape", {"targets": case.targets[:, 1:]}),
        (TypeError, "targets: expected", {"targets": case.targets.double()}),
        (TypeError, "nodes: expected", {"nodes": case.nodes.int()}),
        (ValueError, "weights: expected four numbers", {"weights": (1.0, 1.0)}),
        (ValueError, "weights: expected four numbers", {"weights": (1.0, 1.0, -1.0, 0.0)}),
        (ValueError, "weights: expected four numbers", {"weights": (1.0, 1.0, float("nan"), 0.0)}),
        (ValueError, "pair_tau: expected > 0", {"pair_tau": 0.0}),
        (ValueError, "list_tau: expected > 0", {"list_tau": float("nan")}),
        (ValueError, "alpha: expected >= 0", {"alpha": -1.0}),
        (ValueError, "gamma: expected >= 1", {"gamma": 0.5}),
        (ValueError, "pair_kind: expected one of", {"pair_kind": "both"}),
        (ValueError, "list_weight: expected one of", {"list_weight": "none"}),
        (ValueError, r"list_modalities: expected shape \(2,\)", {"list_modalities": torch.ones(3)}),
        (ValueError, "emb_modalities: is a constant", {"emb_modalities": torch.ones(2, requires_grad=True)}),
        (TypeError, "table: expected float32 or float64 for impl='cpp'", {"table": case.table.half(), "targets": case.targets.half(), "impl": "cpp"}),
        (RuntimeError, "targets: expected at most 16", {"targets": torch.ones(17, 9, 24), "impl": "cpp"}),
    ]  # fmt: skip
    for kind, message, changed in cases:
        with pytest.raises(kind, match=message):
            call(**changed)


COMPOSED = [*SETTINGS, *({"weights": tuple(2.0 * (i == only) for i in range(4))} for only in range(4))]


@pytest.mark.parametrize("settings", [*COMPOSED, {"weights": (0.0, 0.0, 0.0, 0.0)}])
def test_off_the_cpu_it_is_composed_of_the_single_ops(settings, monkeypatch):
    case = Case(torch.float64)
    leaves = [t.requires_grad_() for t in case.leaves]

    def run(impl):
        own = [t.detach().clone().requires_grad_() for t in leaves]
        loss = case.loss(**settings)(*own, impl)
        loss.backward()
        return [loss.detach(), own[0].grad, *(torch.zeros_like(t) if t.grad is None else t.grad for t in own[1:])]

    fused, truth = run("cpp"), run("reference")
    door = importlib.import_module("mmkd.ops.distill")
    calls = []
    monkeypatch.setattr(door, "_fused", lambda which, *arguments: calls.append(which) or door.composed(*arguments))
    torch.testing.assert_close(run("cpp"), fused)
    assert calls == ["cpp"]
    torch.testing.assert_close(truth, fused)


@pytest.mark.parametrize("settings", SETTINGS)
def test_16_bits_are_composed(settings):
    case = Case(torch.float64)
    leaves = [t.requires_grad_() for t in case.leaves]
    fused = case.loss(**settings)(*leaves, "cpp")
    half = [t.detach().bfloat16().requires_grad_() for t in leaves]
    rough = case.loss(**settings)(*half, "auto")
    torch.testing.assert_close(rough.double(), fused, rtol=0.05, atol=0.05)
    ours, theirs = torch.autograd.grad(rough, half), torch.autograd.grad(fused, leaves)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one - other).norm() < 0.05 * other.norm()
