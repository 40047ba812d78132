"""list_scores, list_kd_loss and its form on scores."""

from __future__ import annotations

import pytest
import torch

from mmkd import ops
from tests.ops.grid import DIMS, DTYPES
from tests.ops.losses import bit_equal_for_threads, compare, each_alone, tables

USERS = torch.tensor([0, 3, 3, 12, 5])


def candidates_of(k, batch=5, num_items=17):
    return torch.randint(0, num_items, (batch, k), generator=torch.Generator().manual_seed(k))


def kd(candidates, users=USERS, **options):
    def loss(user_emb, item_emb, teacher, impl):
        return ops.list_kd_loss(user_emb, item_emb, users, candidates, teacher, impl=impl, **options)

    return loss


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", DIMS)
@pytest.mark.parametrize("k", [2, 3, 11, 40])
def test_grid(d, dtype, k, cpu_isa, poison_empty):
    candidates = candidates_of(k)
    teacher = torch.randn(3, 5, k).to(dtype)
    compare(kd(candidates, tau=0.8, alpha=1.5, beta=0.5), [*tables(dtype, d), teacher], dtype)


@pytest.mark.parametrize("weight", ["coupled", "decoupled"])
def test_options(weight, cpu_isa):
    weights = torch.tensor([0.9, 0.05, 0.0])
    loss = kd(candidates_of(7), weight=weight, modality_weights=weights, alpha=0.3, beta=2.0, tau=1.7)
    compare(loss, [*tables(torch.float32, 16), torch.randn(3, 5, 7)], torch.float32)
    compare(kd(candidates_of(7), weight=weight), [*tables(torch.float32, 16), torch.randn(5, 7)], torch.float32)


@pytest.mark.parametrize("impl", ["cpp", "reference"])
@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_equals_the_ordinary_kl_when_nothing_is_reweighted(impl, tau):
    """Paper Eq. 16: alpha = beta = 1, coupled."""
    student, teacher = torch.randn(2, 50, 11, dtype=torch.float64) * 4
    ours = ops.list_kd_from_scores(student, teacher, tau=tau, impl=impl)
    log_s, log_t = (student / tau).log_softmax(-1), (teacher / tau).log_softmax(-1)
    truth = tau**2 * torch.nn.functional.kl_div(log_s, log_t, log_target=True, reduction="batchmean")
    assert (ours - truth).abs() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_logits_of_ten_thousand(dtype, cpu_isa):
    rows = [[1e4, -1e4, -1e4, 0], [-1e4, 1e4, 1e4, 0], [1e4, 1e4, 1e4, 1e4], [-1e4] * 4, [0, 1e4, -1e4, 5e3]]
    student = torch.tensor(rows, dtype=dtype)
    teacher = student.flip(0).clone()
    grads = []
    for impl, kind in (("cpp", dtype), ("reference", torch.float64)):
        leaves = [student.to(kind).clone().requires_grad_(), teacher.to(kind).clone().requires_grad_()]
        loss = ops.list_kd_from_scores(*leaves, impl=impl)
        loss.backward()
        assert torch.isfinite(loss) and all(torch.isfinite(t.grad).all() for t in leaves)
        grads.append([loss.detach(), *(t.grad for t in leaves)])
    for ours, truth in zip(*grads, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)


def test_two_candidates_have_no_order_to_learn():
    student, teacher = torch.randn(2, 6, 2, dtype=torch.float64)
    torch.testing.assert_close(
        ops.list_kd_from_scores(student, teacher, beta=0.0), ops.list_kd_from_scores(student, teacher, beta=9.0)
    )


def test_never_negative_and_zero_for_equal_logits():
    student = torch.randn(40, 9)
    assert ops.list_kd_from_scores(student, student).abs() < 1e-6
    assert ops.list_kd_from_scores(student, torch.randn(2, 40, 9)) > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", DIMS)
def test_list_scores_grid(d, dtype, cpu_isa, poison_empty):
    candidates, weight = candidates_of(6), torch.randn(5, 6)

    def loss(user_emb, item_emb, impl):
        scores = ops.list_scores(user_emb, item_emb, USERS, candidates, impl=impl)
        assert scores.dtype == (torch.float64 if user_emb.dtype == torch.float64 else torch.float32)
        return (scores * weight.to(scores.dtype)).sum()

    compare(loss, list(tables(dtype, d)), dtype)


def test_gradcheck():
    candidates = candidates_of(4)
    leaves = [t.requires_grad_() for t in (*tables(torch.float64, 3), torch.randn(2, 5, 4, dtype=torch.float64))]
    for weight in ("coupled", "decoupled"):
        loss = kd(candidates, weight=weight, alpha=0.7, beta=1.4, tau=1.2)
        assert torch.autograd.gradcheck(lambda u, i, t, f=loss: f(u, i, t, impl="cpp"), leaves)
        scores = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        assert torch.autograd.gradcheck(lambda s, t, w=weight: ops.list_kd_from_scores(s, t, weight=w), scores)
    assert torch.autograd.gradcheck(lambda u, i: ops.list_scores(u, i, USERS, candidates), leaves[:2])


def test_each_gradient_alone_and_threads():
    each_alone(kd(candidates_of(11)), [*tables(torch.float32, 64), torch.randn(2, 5, 11)])
    users, candidates = torch.randint(0, 300, (700,)), torch.randint(0, 400, (700, 11))
    leaves = [*tables(torch.float32, 64, 300, 400), torch.randn(2, 700, 11)]
    bit_equal_for_threads(kd(candidates, users), leaves)


def test_an_empty_batch(poison_empty):
    for impl in ("cpp", "reference"):
        leaves = [t.requires_grad_() for t in (*tables(torch.float32, 8), torch.empty(2, 0, 4))]
        empty = torch.empty(0, dtype=torch.int64)
        loss = kd(torch.empty(0, 4, dtype=torch.int64), empty)(*leaves, impl=impl)
        loss.backward()
        assert loss == 0 and all(t.grad is None or t.grad.eq(0).all() for t in leaves)


def test_views_and_expanded_inputs():
    user_emb, item_emb = torch.randn(8, 13).T, torch.randn(17, 16)[:, ::2]
    candidates, teacher = candidates_of(10)[:, ::2], torch.randn(5, 1, 5).expand(5, 2, 5).transpose(0, 1)
    ours = ops.list_kd_loss(user_emb, item_emb, USERS, candidates, teacher)
    torch.testing.assert_close(ours, ops.list_kd_loss(user_emb, item_emb, USERS, candidates, teacher, impl="reference"))


def test_opcheck_compile_and_autocast():
    user_emb, item_emb = (t.requires_grad_() for t in tables(torch.float32, 8))
    teacher, candidates, w = torch.randn(2, 5, 4, requires_grad=True), candidates_of(4), torch.tensor([0.5, 0.5])
    mm = torch.ops.mmkd
    torch.library.opcheck(mm.list_scores.default, (user_emb, item_emb, USERS, candidates))
    torch.library.opcheck(mm.list_kd.default, (user_emb, item_emb, USERS, candidates, teacher, w, 1.0, 1.0, 1.0, True))
    student = torch.randn(5, 4, requires_grad=True)
    torch.library.opcheck(mm.list_kd_scores.default, (student, teacher, w, 1.0, 0.5, 2.0, False))

    def step(u, i, t):
        return ops.list_kd_loss(u, i, USERS, candidates, t) + ops.list_scores(u, i, USERS, candidates).sum()

    leaves = (user_emb, item_emb, teacher)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(torch.autograd.grad(compiled, leaves), torch.autograd.grad(step(*leaves), leaves))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.list_kd_loss(user_emb, item_emb, USERS, candidates, teacher).dtype == torch.float32


def test_second_derivatives_raise():
    user_emb, item_emb = (t.requires_grad_() for t in tables(torch.float32, 8))
    loss = ops.list_kd_loss(user_emb, item_emb, USERS, candidates_of(4), torch.randn(5, 4))
    (grad,) = torch.autograd.grad(loss, user_emb, create_graph=True)
    with pytest.raises(RuntimeError, match=r"list_kd_backward: second derivatives are not supported"):
        grad.sum().backward()


def test_errors_name_the_argument():
    u, i = tables(torch.float32, 8)
    c, t = candidates_of(4), torch.randn(5, 4)
    bad = c.clone()
    bad[2, 1] = 17
    cases = [
        (RuntimeError, "candidates: entry 9 is 17, expected", lambda: ops.list_scores(u, i, USERS, bad)),
        (RuntimeError, "users: entry 0 is -1", lambda: ops.list_kd_loss(u, i, USERS - 1, c, t)),
        (ValueError, "candidates: expected 5 rows", lambda: ops.list_scores(u, i, USERS, c[:3])),
        (ValueError, "candidates: expected K >= 2", lambda: ops.list_kd_loss(u, i, USERS, c[:, :1], t[:, :1])),
        (ValueError, "teacher_logits: expected shape", lambda: ops.list_kd_loss(u, i, USERS, c, t[:, :3])),
        (ValueError, "weight: expected one of", lambda: ops.list_kd_loss(u, i, USERS, c, t, weight="x")),
        (ValueError, "alpha: expected >= 0", lambda: ops.list_kd_loss(u, i, USERS, c, t, alpha=-1)),
        (ValueError, "modality_weights: expected shape", lambda: ops.list_kd_loss(u, i, USERS, c, t, modality_weights=torch.ones(2))),
    ]  # fmt: skip
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
