"""bpr_kd, list_kd, list_scores, emb_kd: the CUDA kernels' own source against the float64 reference."""

from __future__ import annotations

import pytest
import simt
import torch
from budget import DTYPES, within
from torch._subclasses.fake_tensor import FakeTensorMode

from mmkd import losses, ops

DIMS = [1, 7, 32, 64, 65, 128]


def double(t):
    return t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t


def compare(fn, leaves, dtype, schedules, exact, seeds=(1, 2)):
    """Values and gradients of fn(impl, *leaves): ours against the truth, within eager's error; bit-equal if `exact`."""

    def run(impl, tensors):
        for t in tensors:
            t.grad = None
        out = fn(impl, *tensors)
        out = out if isinstance(out, tuple) else (out,)
        total = sum((o * torch.linspace(0.5, 1.5, o.numel(), dtype=o.dtype).view_as(o)).sum() for o in out)
        total.backward()
        return [o.detach() for o in out] + [t.grad for t in tensors if t.requires_grad]

    truth = run("reference", [double(t) for t in leaves])
    eager = run("reference", [t.detach().clone().requires_grad_(t.requires_grad) for t in leaves])
    results = schedules(lambda: run("cuda", leaves), seeds=seeds)
    for mine in results:
        for m, e, t in zip(mine, eager, truth, strict=True):
            assert m.dtype == e.dtype
            within(m, e, t, dtype)
    if exact:
        assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))
    return results[0]


def tables(d, dtype, users=9, items=13, grads=(True, True)):
    g = torch.Generator().manual_seed(d)
    made = [torch.randn(n, d, generator=g, dtype=torch.float64) * d**-0.25 for n in (users, items)]
    return [t.to(dtype).requires_grad_(need) for t, need in zip(made, grads, strict=True)]


def accumulator(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", DIMS)
@pytest.mark.parametrize("kind", ["bernoulli", "positive"])
def case_bpr_pair_kd(dtype, d, kind, schedules, deterministic):
    batch = 21
    users = torch.randint(0, 9, (batch,))
    pos, neg = torch.randint(0, 13, (batch,)), torch.randint(0, 13, (batch,))
    teacher = torch.randn(batch, dtype=accumulator(dtype), requires_grad=True)
    leaves = [*tables(d, dtype), teacher]
    compare(
        lambda impl, u, i, t: ops.bpr_pair_kd_loss(u, i, users, pos, neg, t, tau=2.0, kind=kind, impl=impl),
        leaves, dtype, schedules, deterministic,
    )  # fmt: skip


@pytest.mark.parametrize("grads", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def case_bpr_each_gradient_alone(grads, schedules, deterministic):
    users, pos, neg = torch.randint(0, 9, (40,)), torch.randint(0, 13, (40,)), torch.zeros(40, dtype=torch.int64)
    leaves = [*tables(64, torch.float32, grads=grads[:2]), torch.randn(40, requires_grad=grads[2])]
    compare(
        lambda impl, u, i, t: ops.bpr_pair_kd_loss(u, i, users, pos, neg, t, impl=impl),
        leaves, torch.float32, schedules, deterministic,
    )  # fmt: skip


def case_bpr_without_teacher_and_large_batches(schedules):
    users, pos, neg = torch.randint(0, 9, (5000,)), torch.randint(0, 13, (5000,)), torch.randint(0, 13, (5000,))
    compare(
        lambda impl, u, i: ops.bpr_loss(u, i, users, pos, neg, impl=impl),
        tables(4, torch.float32), torch.float32, schedules, False, seeds=(1,),
    )  # fmt: skip


def case_bpr_extreme_margins(schedules):
    margin = torch.tensor([1e4, -1e4, 0.0, 3.0], requires_grad=True)
    teacher = torch.tensor([-1e4, 1e4, 1e4, -3.0], requires_grad=True)
    compare(
        lambda impl, m, t: ops.bpr_kd_from_scores(m, t, impl=impl), [margin, teacher], torch.float32, schedules, True
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", DIMS)
@pytest.mark.parametrize("k", [2, 11])
def case_list_kd(dtype, d, k, schedules, deterministic):
    batch, modalities = 10, 2
    users, candidates = torch.randint(0, 9, (batch,)), torch.randint(0, 13, (batch, k))
    teacher = torch.randn(modalities, batch, k, dtype=accumulator(dtype), requires_grad=True)
    weights = torch.tensor([0.25, 0.75], dtype=accumulator(dtype))
    leaves = [*tables(d, dtype), teacher]

    def loss(impl, u, i, t):
        return ops.list_kd_loss(
            u, i, users, candidates, t, alpha=0.7, beta=1.3, tau=2.0, weight="coupled" if d % 2 else "decoupled",
            modality_weights=weights, impl=impl,
        )  # fmt: skip

    compare(loss, leaves, dtype, schedules, deterministic)


@pytest.mark.parametrize("k", [33, 100, 3000], ids=lambda k: f"K={k}")
def case_list_kd_of_long_lists(k, schedules, deterministic):
    """More candidates than lanes, and (3000) more than fit in shared memory."""
    users, candidates = torch.randint(0, 9, (5,)), torch.randint(0, 13, (5, k))
    teacher = torch.randn(5, k, requires_grad=True)
    compare(
        lambda impl, u, i, t: ops.list_kd_loss(u, i, users, candidates, t, impl=impl),
        [*tables(8, torch.float32), teacher], torch.float32, schedules, deterministic, seeds=(1, 2) if k < 3000 else (1,),
    )  # fmt: skip


@pytest.mark.parametrize("grads", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def case_list_kd_each_gradient_alone(grads, schedules, deterministic):
    users, candidates = torch.randint(0, 9, (6,)), torch.randint(0, 13, (6, 5))
    leaves = [*tables(64, torch.float32, grads=grads[:2]), torch.randn(6, 5, requires_grad=grads[2])]
    compare(
        lambda impl, u, i, t: ops.list_kd_loss(u, i, users, candidates, t, impl=impl),
        leaves, torch.float32, schedules, deterministic,
    )  # fmt: skip


def case_list_kd_extreme_logits(schedules):
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [0.0, 0.0, -1e4]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [1e4, -1e4, 1e4], [5.0, 0.0, 1e4]], requires_grad=True)
    compare(
        lambda impl, s, t: ops.list_kd_from_scores(s, t, impl=impl), [student, teacher], torch.float32, schedules, True
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", DIMS)
def case_list_scores(dtype, d, schedules, deterministic):
    users, candidates = torch.randint(0, 9, (6,)), torch.randint(0, 13, (6, 11))
    compare(
        lambda impl, u, i: ops.list_scores(u, i, users, candidates, impl=impl),
        tables(d, dtype), dtype, schedules, deterministic,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [d for d in DIMS if d > 1])  # at d = 1 every cosine is +-1 and the gradient is rounding
@pytest.mark.parametrize("gamma", [1.0, 2.0, 2.5])
def case_emb_kd(dtype, d, gamma, schedules):
    n, modalities = 19, 2
    student = torch.randn(n, d, dtype=torch.float64).to(dtype)
    teachers = torch.randn(modalities, n, d, dtype=torch.float64).to(dtype)
    student[3] = 0
    teachers[1, 5] = 0
    teachers[0, 7] = student[7]
    if gamma == 1.0:  # cos = +-1 to rounding: the slope's sign at the clamp is rounding's too
        student, teachers = student.abs() + 1, -teachers.abs() - 1
    weights = torch.tensor([0.5, 3.0]) if gamma == 2.0 else None
    compare(
        lambda impl, s, t: ops.emb_kd_loss(s, t, gamma=gamma, modality_weights=weights, impl=impl),
        [student.requires_grad_(), teachers.requires_grad_()], dtype, schedules, True,
    )  # fmt: skip


def batch_of_all(dtype, d, batch=21, k=5, nodes=17, users=9, items=13):
    """A table of users and items, and what is asked of it."""
    g = torch.Generator().manual_seed(d + k)
    acc = accumulator(dtype)

    def random(*shape, kind=acc):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(kind).requires_grad_()

    index = (
        torch.randint(0, users, (batch,), generator=g), torch.randint(0, items, (batch, k), generator=g),
        torch.randint(0, users + items, (nodes,), generator=g),
    )  # fmt: skip
    table = (torch.randn(users + items, d, generator=g, dtype=torch.float64) * d**-0.25).to(dtype).requires_grad_()
    return index, [table, random(batch), random(2, batch, k), random(2, nodes, d, kind=dtype)]


def all_losses(index, **settings):
    users, candidates, nodes = index

    def loss(impl, table, margin, logits, targets):
        return ops.distill_loss(table, 9, users, candidates, margin, logits, nodes, targets, impl=impl, **settings)[0]

    return loss


ALL = {
    "defaults": {},
    "numbers": {
        "weights": (1.0, 2.0, 3.0, 0.5),
        "pair_tau": 2.0,
        "list_tau": 0.5,
        "gamma": 1.5,
        "alpha": 0.3,
        "beta": 2.0,
    },
    "kinds": {"pair_kind": "positive", "list_weight": "decoupled", "gamma": 2.5, "weights": (0.0, 1.0, 1.0, 1.0)},
    **{f"only {i}": {"weights": tuple(2.0 * (i == j) for j in range(4))} for i in range(4)},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [d for d in DIMS if d > 1])
@pytest.mark.parametrize("settings", ["defaults", "numbers", "kinds"])
def case_distill(dtype, d, settings, schedules):
    index, leaves = batch_of_all(dtype, d)
    compare(all_losses(index, **ALL[settings]), leaves, dtype, schedules, False, seeds=(1, 2))


@pytest.mark.parametrize("settings", [name for name in ALL if name.startswith("only")])
def case_distill_each_loss_alone(settings, schedules):
    index, leaves = batch_of_all(torch.float32, 64)
    only = int(settings[-1])
    for place, needed in enumerate((True, only == 1, only == 2, only == 3)):
        leaves[place].requires_grad_(needed)
    compare(all_losses(index, **ALL[settings]), leaves, torch.float32, schedules, False)


@pytest.mark.parametrize("place", range(4))
def case_distill_each_gradient_alone(place, schedules):
    index, leaves = batch_of_all(torch.float32, 64)
    for i, t in enumerate(leaves):
        t.requires_grad_(i == place)
    compare(all_losses(index), leaves, torch.float32, schedules, place > 0)


@pytest.mark.parametrize(("batch", "k", "nodes"), [(1, 2, 1), (5000, 2, 3), (3, 2000, 200), (3, 40, 0), (0, 3, 4)])
def case_distill_sizes(batch, k, nodes, schedules):
    """More samples than a grid has warps, and lists that do not fit on the chip."""
    index, leaves = batch_of_all(torch.float32, 8, batch, k, nodes)
    for t in leaves:
        t.requires_grad_(t.numel() > 0)
    compare(all_losses(index, weights=(1.0, 1.0, 1.0, 1.0)), leaves, torch.float32, schedules, False, seeds=(1,))


def case_distill_of_more_nodes_than_a_grid_has_room_for(schedules):
    index, leaves = batch_of_all(torch.float32, 128, batch=3, nodes=5000)
    compare(all_losses(index, weights=(1.0, 1.0, 1.0, 1.0)), leaves, torch.float32, schedules, False, seeds=(1,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("need", [(1, 0, 0, 0), (0, 0, 1, 0), (0, 1, 0, 1)], ids=str)
def case_distill_fakes_what_it_gives(dtype, need):
    (users, candidates, nodes), leaves = batch_of_all(dtype, 8)
    table, margin, logits, targets = (t.detach() for t in leaves)
    ones = torch.ones(2, dtype=accumulator(dtype))
    tensors = table, 9, users, candidates, margin, logits, nodes, targets, ones, ones
    settings = 1.0, 0.1, 0.1, 0.01, 1.0, True, 1.0, 1.0, 1.0, True, 2.0
    arguments = (*tensors, *settings, *map(bool, need))
    real = simt.ops.distill(*arguments)
    with FakeTensorMode() as mode:
        fake = simt.ops.distill(*(mode.from_tensor(a) if torch.is_tensor(a) else a for a in arguments))
    assert [(t.shape, t.dtype) for t in fake] == [(t.shape, t.dtype) for t in real]


def case_distill_of_strided_tensors_and_of_a_table_off_16_bytes(schedules):
    index, (_, margin, logits, targets) = batch_of_all(torch.float32, 64)
    base = torch.randn(22 * 64 + 1)
    leaves = [base[1:].view(22, 64).requires_grad_(), margin, logits, targets]
    compare(all_losses(index), leaves, torch.float32, schedules, False, seeds=(1,))
    wide = torch.randn(22, 128)[:, ::2].requires_grad_()
    compare(all_losses(index), [wide, *leaves[1:]], torch.float32, schedules, False, seeds=(1,))


def case_distill_without_a_gradient_and_again(schedules):
    index, leaves = batch_of_all(torch.float32, 64)
    loss = all_losses(index)
    total = 3 * loss("cuda", *leaves)
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    again = torch.autograd.grad(total, leaves)
    torch.testing.assert_close(first, again)
    with torch.no_grad():
        torch.testing.assert_close(3 * loss("cuda", *leaves), total.detach())


def case_distill_in_a_fixed_order_is_composed(deterministic):
    index, leaves = batch_of_all(torch.float32, 64, batch=60)
    runs = []
    for _ in range(3):
        if not simt.ON_GPU:
            simt.ops.set_schedule(len(runs))
        total = all_losses(index)("cuda", *leaves)
        runs.append([total.detach(), *torch.autograd.grad(total, leaves)])
    if deterministic:
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
    torch.testing.assert_close(runs[0], runs[1])


def case_distill_of_nothing(schedules):
    index, leaves = batch_of_all(torch.float32, 8, 0, 3, 0)
    loss = all_losses(index)("cuda", *leaves)
    loss.backward()
    assert loss == 0 and not leaves[0].grad.any()
    for place in range(1, 4):  # gradients of nothing at all
        index, leaves = batch_of_all(torch.float32, 8, 0, 3, 0)
        for i, t in enumerate(leaves):
            t.requires_grad_(i == place)
        (2 * all_losses(index)("cuda", *leaves)).backward()
        assert leaves[place].grad.shape == leaves[place].shape


@pytest.mark.parametrize(("place", "bad"), [(0, 9), (0, -1), (1, 13), (1, -1), (2, 22), (2, -1)])
def case_out_of_range_stops_distill(place, bad):
    index, leaves = batch_of_all(torch.float32, 64)
    index[place].view(-1)[-1] = bad
    with pytest.raises(RuntimeError, match="a check in the kernel failed"):
        all_losses(index)("cuda", *leaves)


def teacher(d, *, modalities=2, batch=11, width=5, further=7, dtype=torch.float64, e=None, users=30, items=23):
    """What `frozen_teacher` takes, a zero row of `F` among those asked for."""
    g, nodes, e = torch.Generator().manual_seed(d), users + items, d + 1 if e is None else e

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    content, design = normal(modalities, nodes, d), normal(nodes, e)
    content[:, 0] = design[0] = 0
    asked = torch.cat([
        torch.randint(0, users, (batch,), generator=g), torch.randint(users, nodes, (2 * batch,), generator=g),
        torch.randint(0, nodes, (further,), generator=g),
    ])  # fmt: skip
    asked[:1] = 0
    omega = torch.rand(modalities, generator=g, dtype=torch.float64).to(dtype)
    lists = torch.randint(0, items, (batch, width), generator=g)
    return [
        content,
        design,
        normal(nodes, d),
        omega,
        (0.1 * normal(modalities, e, d)).requires_grad_(),
        asked,
        lists,
        users,
    ]


def ask(given, parts=(0, 1, 2)):
    """The outputs `parts` as a function of the state, and the others not looked at."""

    def outputs(impl, state):
        kind = state.dtype
        tables = [t.to(kind) if t.is_floating_point() else t for t in given[:4]]
        out = ops.frozen_teacher(*tables, state, *given[5:], impl=impl)
        return tuple(out[p] for p in parts)

    return outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("d", [1, 3, 32, 64, 65, 100])
@pytest.mark.parametrize(
    "sizes", [{}, {"modalities": 1, "width": 1}, {"modalities": 3, "batch": 40, "further": 0, "width": 33}], ids=str
)
def case_frozen_teacher(dtype, d, sizes, schedules):
    given = teacher(d, dtype=dtype, **sizes)
    compare(ask(given), [given[4]], dtype, schedules, True)


@pytest.mark.parametrize("parts", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def case_frozen_teacher_of_each_output(parts, schedules):
    given = teacher(64, dtype=torch.float32)
    compare(ask(given, parts), [given[4]], torch.float32, schedules, True)


@pytest.mark.parametrize(
    ("d", "e", "dtype", "fits"),
    [(150, 100, torch.float32, True), (150, 151, torch.float32, True), (156, 157, torch.float32, False), (104, 109, torch.float64, False)],
)  # fmt: skip
def case_frozen_teacher_up_to_what_fits_on_the_chip(d, e, dtype, fits, schedules):
    given = teacher(d, e=e, dtype=dtype, batch=3, further=2)
    compare(ask(given), [given[4]], dtype, schedules, fits, seeds=(1, 2))
    arguments = [t.detach() if torch.is_tensor(t) else t for t in given]
    if not simt.ON_GPU:
        if fits:
            simt.ops.frozen_teacher(*arguments)
        else:
            with pytest.raises(RuntimeError, match="does not fit a block's shared memory"):
                simt.ops.frozen_teacher(*arguments)


@pytest.mark.parametrize(("batch", "further"), [(0, 0), (0, 5), (9, 0), (1, 1), (400, 300)])
@pytest.mark.parametrize("width", [0, 2])
def case_frozen_teacher_sizes(batch, further, width, schedules):
    given = teacher(16, batch=batch, further=further, width=width, dtype=torch.float32)
    out = ask(given)("cuda", given[4])
    truth = ask(given)("reference", given[4].detach().double())
    for mine, right in zip(out, truth, strict=True):
        assert mine.shape == right.shape
        torch.testing.assert_close(mine.double(), right, rtol=1e-4, atol=1e-4)
    (grad,) = torch.autograd.grad(sum(o.sum() for o in out), given[4])
    assert torch.isfinite(grad).all() and bool(grad.any()) == (batch + further > 0)


def case_frozen_teacher_gradcheck():
    given = teacher(3, batch=4, width=3, further=5)
    given[5][0] = 1  # a row of length 0 has no derivative
    for part in range(3):
        torch.autograd.gradcheck(lambda state, part=part: ask(given, (part,))("cuda", state)[0], (given[4],))


@pytest.mark.parametrize(("place", "bad"), [(5, 53), (5, -1), (6, 23), (6, -1)])
def case_out_of_range_stops_frozen_teacher(place, bad):
    given = teacher(16, dtype=torch.float32)
    given[place].view(-1)[-1] = bad
    with pytest.raises(RuntimeError, match="a check in the kernel failed"):
        ops.frozen_teacher(*given)


def case_empty_batches(deterministic):
    u, i = tables(8, torch.float32)
    none, no_lists = torch.empty(0, dtype=torch.int64), torch.empty(0, 4, dtype=torch.int64)
    out = [
        ops.bpr_loss(u, i, none, none, none),
        ops.list_kd_loss(u, i, none, no_lists, torch.empty(2, 0, 4)),
        ops.list_scores(u, i, none, no_lists).sum(),
        ops.emb_kd_loss(u[:0], i[:0]),
    ]
    sum(out).backward()
    assert [o.item() for o in out] == [0, 0, 0, 0]
    assert not u.grad.any() and not i.grad.any()


def case_no_modalities_no_loss(deterministic):
    u, i = tables(8, torch.float32)
    users, lists = torch.tensor([0, 8]), torch.tensor([[0, 1], [12, 3]])
    loss = ops.list_kd_loss(u, i, users, lists, torch.empty(0, 2, 2)) + ops.emb_kd_loss(u, torch.empty(0, *u.shape))
    loss.backward()
    assert loss.item() == 0 and not u.grad.any() and not i.grad.any()


def case_expanded_and_strided_inputs(schedules):
    """What is not dense is copied at the door; a row view that begins off a 16-byte boundary takes the narrow path."""
    base_u, base_i = torch.randn(9, 129), torch.randn(13 * 64 + 1)
    u = base_u[:, 1::2].requires_grad_()
    i = base_i[1:].view(13, 64).requires_grad_()
    users, candidates = torch.tensor([3]).expand(6), torch.randint(0, 13, (6, 22))[:, ::2]
    teacher = torch.randn(1, 1, 11).expand(2, 6, 11).clone().requires_grad_()
    compare(
        lambda impl, a, b, t: ops.list_kd_loss(a, b, users, candidates, t, impl=impl),
        [u, i, teacher], torch.float32, schedules, False, seeds=(1,),
    )  # fmt: skip
    compare(
        lambda impl, a, b: ops.bpr_loss(a, b, users, candidates[:, 0], candidates[:, 1], impl=impl),
        [u, i], torch.float32, schedules, False, seeds=(1,),
    )  # fmt: skip


def case_under_autocast_the_tables_keep_their_type():
    u, i = tables(64, torch.float32)
    users, items = torch.randint(0, 9, (6,)), torch.randint(0, 13, (6,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ops.bpr_loss(u, i, users, items, items)
    loss.backward()
    assert loss.dtype == u.grad.dtype == torch.float32


def case_modules_and_gradcheck(deterministic):
    x, t = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.autograd.gradcheck(losses.PairKDLoss(tau=2.0), (x, t))
    s, z = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.autograd.gradcheck(losses.ListKDLoss(), (s, z))
    e, f = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.autograd.gradcheck(losses.EmbKDLoss(), (e, f))
    u, i = tables(3, torch.float64)
    users, lists = torch.tensor([0, 1, 1]), torch.tensor([[0, 1], [2, 2], [1, 0]])
    torch.autograd.gradcheck(lambda a, b: ops.list_kd_loss(a, b, users, lists, z[:, :2]), (u, i))
    torch.autograd.gradcheck(lambda a, b: ops.bpr_loss(a, b, users, lists[:, 0], lists[:, 1]), (u, i))


@pytest.mark.parametrize("bad", [-1, 13])
def case_out_of_range_stops_the_kernel(bad):
    u, i = tables(64, torch.float32)
    users, items = torch.tensor([0, 1]), torch.tensor([0, bad])
    with pytest.raises(RuntimeError, match="a check in the kernel failed"):
        ops.bpr_loss(u, i, users, items, items)
    with pytest.raises(RuntimeError, match="a check in the kernel failed"):
        ops.list_scores(u, i, users, items[:, None])


def case_the_flag_of_torch_is_read(deterministic):
    assert simt.ops.deterministic() == deterministic
