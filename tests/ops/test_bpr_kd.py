"""bpr_loss, pair_kd_loss, bpr_pair_kd_loss and their form on scores."""

from __future__ import annotations

import pytest
import torch

from mmkd import ops, reference
from tests.ops.grid import DIMS, DTYPES
from tests.ops.losses import bit_equal_for_threads, compare, each_alone, tables

USERS = torch.tensor([0, 3, 3, 12, 5, 0, 7])
POS = torch.tensor([1, 16, 2, 2, 0, 1, 9])
NEG = torch.tensor([4, 4, 16, 0, 0, 4, 3])  # repeats, and one sample whose negative is its positive
KINDS = ("bernoulli", "positive")


def both(kind="bernoulli", tau=1.0, index=(USERS, POS, NEG)):
    def loss(user_emb, item_emb, teacher, impl):
        bpr, pair = ops.bpr_pair_kd_loss(user_emb, item_emb, *index, teacher, tau=tau, kind=kind, impl=impl)
        return bpr + 0.7 * pair

    return loss


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", DIMS)
@pytest.mark.parametrize("kind", KINDS)
def test_grid(d, dtype, kind, cpu_isa, poison_empty):
    teacher = torch.randn(len(USERS)).to(dtype)
    compare(both(kind, 0.7), [*tables(dtype, d), teacher], dtype)


def test_the_parts_are_the_whole():
    user_emb, item_emb = tables(torch.float32, 16)
    teacher = torch.randn(len(USERS))
    bpr, pair = ops.bpr_pair_kd_loss(user_emb, item_emb, USERS, POS, NEG, teacher, tau=2.0)
    assert torch.equal(bpr, ops.bpr_loss(user_emb, item_emb, USERS, POS, NEG))
    assert torch.equal(pair, ops.pair_kd_loss(user_emb, item_emb, USERS, POS, NEG, teacher, tau=2.0))
    margin = reference.margins(user_emb, item_emb, USERS, POS, NEG)
    own_bpr, own_pair = ops.bpr_kd_from_scores(margin, teacher, tau=2.0)
    torch.testing.assert_close((own_bpr, own_pair), (bpr, pair))
    assert ops.bpr_kd_from_scores(margin)[1] == 0


def test_pair_kd_is_zero_only_where_both_agree():
    user_emb, item_emb = tables(torch.float64, 8)
    margin = reference.margins(user_emb, item_emb, USERS, POS, NEG)
    assert ops.pair_kd_loss(user_emb, item_emb, USERS, POS, NEG, margin).abs() < 1e-15
    assert ops.pair_kd_loss(user_emb, item_emb, USERS, POS, NEG, margin + 0.5) > 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_margins_of_ten_thousand(dtype, kind, cpu_isa):
    big = torch.tensor([1e4, -1e4, 1e4, -1e4, 0.0, 1e4, -1e4])
    teacher = torch.tensor([1e4, 1e4, -1e4, -1e4, 1e4, 0.0, 0.0])
    leaves = [big.to(dtype).requires_grad_(), teacher.to(dtype).requires_grad_()]
    bpr, pair = ops.bpr_kd_from_scores(*leaves, kind=kind)
    (bpr + pair).backward()
    for t in (bpr, pair, *(leaf.grad for leaf in leaves)):
        assert torch.isfinite(t).all()
    truth = ops.bpr_kd_from_scores(big.to(dtype).double(), teacher.to(dtype).double(), kind=kind, impl="reference")
    torch.testing.assert_close((bpr.double(), pair.double()), truth, rtol=1e-5, atol=1e-5)


def test_gradcheck():
    leaves = [t.requires_grad_() for t in (*tables(torch.float64, 3), torch.randn(len(USERS), dtype=torch.float64))]
    for kind in KINDS:
        assert torch.autograd.gradcheck(lambda u, i, t, k=kind: both(k, 1.3)(u, i, t, impl="cpp"), leaves)
        scores = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        assert torch.autograd.gradcheck(lambda s, t, k=kind: ops.bpr_kd_from_scores(s, t, kind=k), scores)


def test_each_gradient_alone_and_threads():
    leaves = [*tables(torch.float32, 64), torch.randn(len(USERS))]
    each_alone(both(), leaves)
    index = (torch.randint(0, 300, (2000,)), torch.randint(0, 400, (2000,)), torch.randint(0, 400, (2000,)))
    bit_equal_for_threads(both(index=index), [*tables(torch.float32, 64, 300, 400), torch.randn(2000)])


def test_an_empty_batch_costs_nothing_and_has_zero_gradients(poison_empty):
    empty = torch.empty(0, dtype=torch.int64)
    for impl in ("cpp", "reference"):
        leaves = [t.requires_grad_() for t in (*tables(torch.float32, 8), torch.empty(0))]
        loss = both(index=(empty, empty, empty))(*leaves, impl=impl)
        loss.backward()
        assert loss == 0
        assert all(leaf.grad is None or leaf.grad.eq(0).all() for leaf in leaves)


def test_views_and_expanded_inputs():
    base_u, base_i = torch.randn(8, 13), torch.randn(17, 16)
    user_emb, item_emb = base_u.T, base_i[:, ::2]
    index = (torch.tensor([2]).expand(7), torch.stack([POS, POS], 1)[:, 0], NEG)
    assert not user_emb.is_contiguous() and not item_emb.is_contiguous()
    ours = ops.bpr_loss(user_emb, item_emb, *index)
    torch.testing.assert_close(ours, ops.bpr_loss(user_emb, item_emb, *index, impl="reference"))


def test_opcheck_compile_and_autocast():
    user_emb, item_emb = (t.requires_grad_() for t in tables(torch.float32, 8))
    teacher = torch.randn(len(USERS), requires_grad=True)
    args = (user_emb, item_emb, USERS, POS, NEG)
    torch.library.opcheck(torch.ops.mmkd.bpr_kd.default, (*args, teacher, 0.7, True))
    torch.library.opcheck(torch.ops.mmkd.bpr_kd.default, (*args, None, 1.0, False))
    torch.library.opcheck(torch.ops.mmkd.bpr_kd_scores.default, (teacher, teacher.detach(), 1.0, True))

    def step(u, i, t):
        return sum(ops.bpr_pair_kd_loss(u, i, USERS, POS, NEG, t))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(user_emb, item_emb, teacher)
    grads = torch.autograd.grad(compiled, (user_emb, item_emb, teacher))
    torch.testing.assert_close(
        grads, torch.autograd.grad(step(user_emb, item_emb, teacher), (user_emb, item_emb, teacher))
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.bpr_loss(*args).dtype == torch.float32


def test_second_derivatives_raise():
    user_emb, item_emb = (t.requires_grad_() for t in tables(torch.float32, 8))
    (grad,) = torch.autograd.grad(ops.bpr_loss(user_emb, item_emb, USERS, POS, NEG), user_emb, create_graph=True)
    with pytest.raises(RuntimeError, match=r"bpr_kd_backward: second derivatives are not supported"):
        grad.sum().backward()


def test_errors_name_the_argument():
    u, i = tables(torch.float32, 8)
    cases = [
        (RuntimeError, "users: entry 1 is 13, expected", lambda: ops.bpr_loss(u, i, torch.tensor([0, 13]), POS[:2], NEG[:2])),
        (RuntimeError, "neg: entry 0 is -1, expected", lambda: ops.bpr_loss(u, i, USERS[:1], POS[:1], torch.tensor([-1]))),
        (ValueError, "pos: expected shape", lambda: ops.bpr_loss(u, i, USERS, POS[:3], NEG)),
        (TypeError, "users: expected a tensor of int64", lambda: ops.bpr_loss(u, i, USERS.int(), POS, NEG)),
        (TypeError, "item_emb: expected", lambda: ops.bpr_loss(u, i.double(), USERS, POS, NEG)),
        (ValueError, "item_emb: expected 8 columns", lambda: ops.bpr_loss(u, i[:, :4], USERS, POS, NEG)),
        (ValueError, "tau: expected > 0", lambda: ops.pair_kd_loss(u, i, USERS, POS, NEG, torch.zeros(7), tau=0)),
        (ValueError, "kind: expected one of", lambda: ops.pair_kd_loss(u, i, USERS, POS, NEG, torch.zeros(7), kind="x")),
        (ValueError, "teacher_margin: expected shape", lambda: ops.pair_kd_loss(u, i, USERS, POS, NEG, torch.zeros(3))),
    ]  # fmt: skip
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
