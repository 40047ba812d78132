"""teacher_loss: BPR of the joint embedding, of every modality and of the prompt, with every row of every gradient."""

from __future__ import annotations

import importlib
import math
from itertools import product

import pytest
import torch

from mmkd import ops
from tests.ops.grid import DIMS
from tests.ops.losses import bit_equal_for_threads, compare, each_alone, gradchecks

FLOATS = (torch.float64, torch.float32)
USERS, ITEMS = 13, 17
SETTINGS = [{}, {"weights": (2.0, 0.7, 1.5)}, {"weights": (0.0, 1.0, 0.5)}, {"weights": (1.0, 0.0, 0.0)}]
NAMES = ["ids", "user_features", "item_features", "prompt"]


class Case:
    """A batch over rows of users, then items; items named for both, for one and for none."""

    def __init__(self, dtype=torch.float32, d=24, batch=70, modalities=2, users=USERS, items=ITEMS):
        torch.manual_seed(d + batch + modalities)
        self.users = torch.randint(0, users, (batch,))
        self.pos, self.neg = (torch.randint(0, items, (batch,)) for _ in range(2))
        self.omega = torch.linspace(0.3, 1.0, modalities).to(dtype)
        wide = modalities * d

        def table(rows, columns):
            return (torch.randn(rows, columns) / d**0.25).to(dtype)

        self.leaves = [table(users + items, d), table(users, wide), table(items, wide), table(users + items, d)]

    @property
    def batch(self):
        return self.users, self.pos, self.neg, self.omega

    def both(self, *leaves, impl="cpp", **settings):
        ids, users, items, prompt = leaves or self.leaves
        return ops.teacher_loss(ids, users, items, *(self.batch_as(ids)), prompt, impl=impl, **settings)

    def batch_as(self, like):
        return self.users, self.pos, self.neg, self.omega.to(like.dtype)

    def loss(self, **settings):
        def call(*leaves, impl):
            loss, _ = self.both(*leaves, impl=impl, **settings)
            # so that every leaf has a gradient whatever the weights are
            return loss + sum(t[:0].sum(dtype=loss.dtype) for t in leaves)

        return call


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("d", DIMS[1:])  # one number a row: a unit vector has no gradient but rounding
@pytest.mark.parametrize("settings", SETTINGS, ids=["defaults", "numbers", "no joint", "joint alone"])
def test_grid(d, dtype, settings, cpu_isa, poison_empty):
    case = Case(dtype, d)
    compare(case.loss(**settings), case.leaves, dtype)


@pytest.mark.parametrize("batch", [1, 2, 63, 64, 65, 700])
@pytest.mark.parametrize("modalities", [1, 3])
@pytest.mark.parametrize("rows", [(1, 40), (13, 17), (300, 129)])
def test_sizes(batch, modalities, rows, cpu_isa, poison_empty):
    users, items = rows
    case = Case(batch=batch, modalities=modalities, users=users, items=items)
    compare(case.loss(), case.leaves, torch.float32)


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [*product(("cpp", "reference"), FLOATS), *product(["auto"], (*FLOATS, torch.bfloat16))],  # 16 bits are composed
)
def test_it_is_the_sum_of_the_single_losses(impl, dtype):
    case, weights = Case(dtype), (0.7, 0.2, 1.5)
    leaves = [t.requires_grad_() for t in case.leaves]
    ids, users, items, prompt = leaves
    loss, terms = case.both(*leaves, impl=impl, weights=weights)
    joint = ids
    heads = [torch.cat([u, i]) for u, i in zip(users.chunk(2, 1), items.chunk(2, 1), strict=True)]
    for omega, head in zip(case.omega, heads, strict=True):
        joint = joint + omega * head / head.norm(dim=1, keepdim=True)
    by = [ops.bpr_loss(t[:USERS], t[USERS:], *case.batch[:3]) for t in (joint, *heads, prompt)]
    expected = torch.stack([weights[0] * by[0], weights[1] * (by[1] + by[2]), weights[2] * by[3]])
    wide = dtype != torch.bfloat16
    close = {"rtol": 1e-5 if wide else 0.05, "atol": 1e-6 if wide else 2e-3}
    torch.testing.assert_close(terms, expected.detach(), **close)
    assert not terms.requires_grad
    torch.testing.assert_close(loss, expected.sum(), **close)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected.sum(), leaves), **close)


def test_gradcheck():
    case = Case(torch.float64, d=5, batch=4)
    gradchecks([case.loss(**settings) for settings in SETTINGS], case.leaves)


def test_each_gradient_alone_and_threads():
    case = Case(d=64, batch=900, users=300, items=600)
    each_alone(case.loss(), case.leaves)
    bit_equal_for_threads(case.loss(), case.leaves)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_of_zeros_and_very_short_ones(dtype, cpu_isa):
    """A length below 1e-12 is divided by as 1e-12, and has no direction that a gradient could turn it in."""
    case = Case(dtype, d=20)
    for table in case.leaves[1:3]:
        table[0, :20] = 0
        table[1, 20:] *= 1e-13 / table[1, 20:].norm()
        table[2, :20] *= 3e-12 / table[2, :20].norm()
    compare(case.loss(), case.leaves, dtype)


@pytest.mark.parametrize("place", range(4))
def test_a_nan_reaches_the_loss(place):
    case = Case()
    case.leaves[place][case.pos[0] if place == 2 else case.users[0], 0] = float("nan")
    leaves = [t.requires_grad_() for t in case.leaves]
    loss, _ = case.both(*leaves)
    loss.backward()
    assert torch.isnan(loss) and all(torch.isnan(t.grad).any() for t in (leaves[place], leaves[2 if place < 3 else 3]))


def test_an_item_against_itself_gives_nothing(cpu_isa):
    """Not even what rounding leaves of the two sides, which a row shorter than 1e-12 would make large."""
    case = Case()
    case.neg = case.pos.clone()
    case.leaves[2].mul_(1e-14)
    leaves = [t.requires_grad_() for t in case.leaves]
    loss, terms = case.both(*leaves)
    loss.backward()
    assert terms[0].item() == pytest.approx(math.log(2)) and all(t.grad.eq(0).all() for t in leaves)


@pytest.mark.parametrize("sizes", [(0, 17), (13, 0), (0, 0)])
def test_no_rows_of_a_side(sizes, poison_empty):
    users, items = sizes
    none = torch.empty(0, dtype=torch.int64)
    tables = [torch.randn(n, d, requires_grad=True) for n, d in ((users + items, 8), (users, 16), (items, 16))]
    loss, _ = ops.teacher_loss(*tables, none, none, none, torch.ones(2), weights=(1, 1, 0), impl="cpp")
    loss.backward()
    assert loss == 0 and all(t.grad.eq(0).all() for t in tables)


def test_rows_of_no_numbers():
    case = Case(d=0)
    leaves = [t.requires_grad_() for t in case.leaves]
    loss, terms = case.both(*leaves, weights=(1, 1, 1))
    loss.backward()
    assert terms.tolist() == pytest.approx([math.log(2), 2 * math.log(2), math.log(2)])


def test_weights_of_modalities_of_any_sign():
    case = Case(torch.float64)
    case.omega = torch.tensor([0.0, -1.5])
    compare(case.loss(), case.leaves, torch.float64)


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_a_kept_graph_gives_its_gradients_again(scale):
    case = Case()
    leaves = [t.requires_grad_() for t in case.leaves]
    loss = scale * case.both(*leaves)[0]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    first[0].zero_()  # the caller's own
    again = torch.autograd.grad(loss, leaves, retain_graph=True)
    torch.testing.assert_close(again, tuple(kept), rtol=0, atol=0)


@pytest.mark.parametrize("impl", ["cpp", "reference", "auto"])
def test_nothing_to_do(impl, poison_empty):
    case = Case(batch=0)
    leaves = [t.requires_grad_() for t in case.leaves]
    loss, terms = case.both(*leaves, impl=impl)
    loss.backward()
    assert loss == 0 and terms.eq(0).all() and leaves[0].grad.eq(0).all()
    loss, terms = Case().both(*leaves, impl=impl, weights=(0, 0, 0))
    assert loss == 0 and terms.shape == (3,)


def test_rows_nobody_names_get_zeros(poison_empty):
    case = Case(batch=3)
    leaves = [t.requires_grad_() for t in case.leaves]
    grads = torch.autograd.grad(case.both(*leaves)[0], leaves)
    users, items = case.users.unique(), torch.cat([case.pos, case.neg]).unique()
    for grad, named in zip(
        grads, (torch.cat([users, items + USERS]), users, items, torch.cat([users, items + USERS])), strict=True
    ):
        others = torch.ones(len(grad), dtype=torch.bool).index_fill_(0, named, False)
        assert grad[others].eq(0).all() and grad[named].ne(0).any(1).all()


@pytest.mark.parametrize("impl", ["cpp", "reference", "auto"])
def test_without_a_prompt(impl):
    case = Case(torch.float64)
    leaves = [t.requires_grad_() for t in case.leaves]
    weights = (1.0, 0.5, 0.0)
    own = case.leaves[:3]
    loss, terms = ops.teacher_loss(*own, *case.batch, weights=weights, impl=impl)
    expected, _ = case.both(*leaves, impl="reference", weights=weights)
    torch.testing.assert_close(loss, expected)
    assert terms[2] == 0
    torch.testing.assert_close(torch.autograd.grad(loss, own), torch.autograd.grad(expected, own))
    with pytest.raises(ValueError, match="prompt: expected a tensor, got None"):
        ops.teacher_loss(*own, *case.batch, impl=impl)


def test_views():
    case = Case()
    plain = case.both()
    strided = [t.T.contiguous().T for t in case.leaves]
    for a, b in zip(plain, case.both(*strided), strict=True):
        assert torch.equal(a, b)


def test_opcheck_compile_and_no_gradient():
    case = Case(d=8, batch=9)
    leaves = [t.requires_grad_() for t in case.leaves]
    arguments = (*leaves, *case.batch, 1.0, 0.1, 0.1, True, True, True, True)
    torch.library.opcheck(torch.ops.mmkd.teacher.default, arguments)
    whole = torch.compile(lambda *own: case.both(*own)[0], fullgraph=True, backend="aot_eager")
    for scale in (1.0, 3.0):
        ours, plain = scale * whole(*leaves), scale * case.both(*leaves)[0]
        torch.testing.assert_close(torch.autograd.grad(ours, leaves), torch.autograd.grad(plain, leaves))
    with torch.no_grad():
        assert not case.both(*leaves)[0].requires_grad


def test_what_has_no_gradient_says_so():
    case = Case()
    leaves = [t.requires_grad_() for t in case.leaves]
    with pytest.raises(RuntimeError, match=r"teacher: second derivatives are not supported"):
        torch.autograd.grad(case.both(*leaves)[0], leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=r"teacher: transforms of torch.func are not supported"):
        torch.func.grad(lambda t: case.both(t, *case.leaves[1:])[0])(case.leaves[0].detach())
    with pytest.raises(ValueError, match="omega: is a constant"):
        ops.teacher_loss(*case.leaves[:3], *case.batch[:3], case.omega.requires_grad_(), case.leaves[3])


def test_what_has_no_weight_is_not_looked_at():
    case = Case()
    case.leaves[3].fill_(float("nan"))
    case.leaves[0].fill_(float("nan"))
    for impl in ("cpp", "reference", "auto"):
        own = [t.clone().requires_grad_() for t in case.leaves]
        loss, terms = case.both(*own, impl=impl, weights=(0, 1, 0))
        grads = torch.autograd.grad(loss, own[1:3])
        assert torch.isfinite(loss) and torch.isfinite(terms).all() and all(torch.isfinite(g).all() for g in grads)


def test_indices_out_of_range_are_named(cpu_isa):
    case = Case()
    for name, at, bad in (
        ("users", 1, USERS),
        ("users", 69, -1),
        ("pos", 1, ITEMS),
        ("pos", 64, -1),
        ("neg", 0, 2**62),
    ):
        broken = {n: getattr(case, n) for n in ("users", "pos", "neg")}
        broken[name] = broken[name].index_fill(0, torch.tensor(at), bad)
        for leaves in (case.leaves, [t.clone().requires_grad_() for t in case.leaves]):
            with pytest.raises(RuntimeError, match=rf"{name}: entry {at} is {bad}, expected \[0, "):
                ops.teacher_loss(*leaves[:3], *broken.values(), case.omega, leaves[3], impl="cpp")


def test_errors_name_the_argument():
    case = Case()
    given = dict(zip(NAMES, case.leaves, strict=True)) | dict(
        zip(("users", "pos", "neg", "omega"), case.batch, strict=True)
    )

    def call(**changed):
        return ops.teacher_loss(**{**given, **changed})

    cases = [
        (TypeError, "ids: expected", {"ids": given["ids"].int()}),
        (ValueError, "ids: expected 30 rows", {"ids": given["ids"][1:]}),
        (ValueError, r"user_features: expected shape \(13, 48\)", {"user_features": given["user_features"][:, 1:]}),
        (TypeError, "item_features: expected", {"item_features": given["item_features"].double()}),
        (ValueError, "prompt: expected shape", {"prompt": given["prompt"][1:]}),
        (TypeError, "prompt: expected", {"prompt": given["prompt"].half()}),
        (ValueError, "omega: expected at least one modality", {"omega": case.omega[:0]}),
        (TypeError, "omega: expected", {"omega": case.omega.double()}),
        (TypeError, "users: expected", {"users": case.users.int()}),
        (ValueError, "pos: expected shape", {"pos": case.pos[1:]}),
        (TypeError, "neg: expected", {"neg": None}),
        (ValueError, "weights: expected three numbers", {"weights": (1.0, 1.0)}),
        (ValueError, "weights: expected three numbers", {"weights": (1.0, -1.0, 0.0)}),
        (ValueError, "weights: expected three numbers", {"weights": (1.0, float("nan"), 0.0)}),
        (ValueError, "weights: expected three numbers", {"weights": None}),
(ValueError, "user_features: expected on meta", {"ids": given["ids"].to("meta")}),
        (TypeError, "ids: expected float32 or float64 for impl='cpp'", {n: t.half() for n, t in given.items() if t.is_floating_point()} | {"impl": "cpp"}),
    ]  # fmt: skip
    for kind, message, changed in cases:
        with pytest.raises(kind, match=message):
            call(**changed)


def test_the_kernel_checks_for_itself(poison_empty):
    case = Case()
    tables, settings = case.leaves, (1.0, 0.1, 0.1, False, False, False, False)

    def refused(message, *changed):
        arguments = [*tables, *case.batch, *settings]
        for place, value in changed:
            arguments[place] = value
        with pytest.raises(RuntimeError, match=message):
            torch.ops.mmkd.teacher(*arguments)

    filled = torch.ops.mmkd.teacher(*tables, *case.batch, 1.0, 0.1, 0.0, True, True, True, True)[-1]
    assert filled.shape == tables[3].shape and filled.eq(0).all()  # of a loss without weight
    refused("ids: expected float32 or float64", (0, tables[0].half()))
    refused("ids: expected 30 rows", (0, tables[0][1:]))
    refused("user_features: expected size 48", (1, tables[1][:, 1:].contiguous()))
    refused("item_features: expected a contiguous tensor", (2, tables[2].T.contiguous().T))
    refused("prompt: expected a tensor", (3, None))
    refused("neg: expected size 70", (6, case.neg[1:]))
    refused("omega: expected dtype", (7, case.omega.double()))


@pytest.mark.parametrize("settings", [*SETTINGS, {"weights": (0.0, 0.0, 2.0)}, {"weights": (0.0, 0.0, 0.0)}])
def test_off_the_cpu_it_is_composed(settings, monkeypatch):
    case = Case(torch.float64)
    fused, truth = case.loss(**settings), case.loss(**settings)

    def run(impl, loss):
        own = [t.clone().requires_grad_() for t in case.leaves]
        value = loss(*own, impl=impl)
        value.backward()
        return [value.detach(), *(t.grad for t in own)]

    ours, theirs = run("cpp", fused), run("reference", truth)
    door = importlib.import_module("mmkd.ops.teacher")
    calls = []
    monkeypatch.setattr(door, "_fused", lambda which, *arguments: calls.append(which) or door.composed(*arguments))
    torch.testing.assert_close(run("cpp", fused), ours)
    assert calls == ["cpp"]
    torch.testing.assert_close(theirs, ours)
