from __future__ import annotations

import pytest
import torch
from common import compare, each_alone, gradients

from mmkd import ops
from mmkd.kernels import launch
from mmkd.kernels import list_kd as list_kernels
from tests.ops.grid import DIMS, DTYPES
from tests.ops.losses import tables

USERS = torch.tensor([0, 3, 3, 5, 0])
POS = torch.tensor([1, 6, 2, 2, 1])
NEG = torch.tensor([4, 4, 6, 0, 1])  # repeats, and one sample whose negative is its positive


@pytest.fixture(params=[False, True], ids=["atomics", "sorted"])
def deterministic(request):
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)


def bpr(kind="bernoulli", tau=0.7, index=(USERS, POS, NEG)):
    def loss(user_emb, item_emb, teacher, impl):
        a, b = ops.bpr_pair_kd_loss(user_emb, item_emb, *index, teacher, tau=tau, kind=kind, impl=impl)
        return a + 0.7 * b

    return loss


def candidates_of(k, batch=5):
    return torch.randint(0, 7, (batch, k), generator=torch.Generator().manual_seed(k))


def listed(candidates, users=USERS, **options):
    options = {"tau": 0.8, "alpha": 1.5, "beta": 0.5} | options

    def loss(user_emb, item_emb, teacher, impl):
        return ops.list_kd_loss(user_emb, item_emb, users, candidates, teacher, impl=impl, **options)

    return loss


def small(dtype, d):
    return list(tables(dtype, d, 6, 7))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", DIMS)
def case_bpr_grid(d, dtype, deterministic, poison_empty):
    kind = "positive" if d % 2 else "bernoulli"
    compare(bpr(kind), [*small(dtype, d), torch.randn(5).to(dtype)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", DIMS)
def case_list_grid(d, dtype, deterministic, poison_empty):
    k, weight = {1: 2, 7: 3}.get(d, 11), "coupled" if d % 2 else "decoupled"
    compare(listed(candidates_of(k), weight=weight), [*small(dtype, d), torch.randn(2, 5, k).to(dtype)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", DIMS)
def case_list_scores_grid(d, dtype, deterministic, poison_empty):
    candidates = candidates_of(5 if d != 7 else 40)
    compare(lambda u, i, impl: ops.list_scores(u, i, USERS, candidates, impl=impl), small(dtype, d))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [*DIMS[1:], 130])  # at d = 1 every cosine is +-1 and the gradient is rounding
@pytest.mark.parametrize("gamma", [1.0, 2.0, 2.5])
def case_emb_grid(d, dtype, gamma, poison_empty):
    torch.manual_seed(d)
    leaves = [torch.randn(9, d).to(dtype), torch.randn(2, 9, d).to(dtype)]
    weights = torch.tensor([0.5, 3.0]) if gamma == 2.0 else None
    compare(lambda s, t, impl: ops.emb_kd_loss(s, t, gamma=gamma, modality_weights=weights, impl=impl), leaves)


def case_long_lists_take_two_launches(deterministic):
    k = list_kernels.MAX_FUSED + 6
    compare(listed(candidates_of(k)), [*small(torch.float32, 16), torch.randn(2, 5, k)])


def case_lists_beyond_one_program_are_refused():
    for k in (list_kernels.MAX_LIST + 1, 70_000):
        student = torch.randn(2, k)
        with pytest.raises(ValueError, match=f"candidates: expected at most 4096 a list, got {k}; .*impl='reference'"):
            ops.list_kd_from_scores(student, student, impl="triton")
        with pytest.raises(ValueError, match=f"got {k}"):
            ops.list_kd_loss(torch.ones(6, 4), torch.ones(7, 4), USERS[:2], candidates_of(k, 2), student, impl="triton")


def case_the_longest_list():
    leaves = [torch.randn(2, list_kernels.MAX_LIST), torch.randn(2, list_kernels.MAX_LIST)]
    compare(lambda s, t, impl: ops.list_kd_from_scores(s, t, impl=impl), leaves)


def case_modality_weights_and_one_modality():
    loss = listed(candidates_of(4), modality_weights=torch.tensor([0.9, 0.0, 0.1]), weight="decoupled")
    compare(loss, [*small(torch.float32, 8), torch.randn(3, 5, 4)])
    compare(listed(candidates_of(4)), [*small(torch.float32, 8), torch.randn(5, 4)])


def case_scores_forms():
    for kind in ("bernoulli", "positive"):
        compare(
            lambda s, t, impl, k=kind: sum(ops.bpr_kd_from_scores(s, t, tau=1.3, kind=k, impl=impl)),
            [torch.randn(300), torch.randn(300)],
        )
    compare(lambda s, t, impl: ops.list_kd_from_scores(s, t, impl=impl), [torch.randn(5, 9), torch.randn(2, 5, 9)])


def case_equals_the_ordinary_kl_when_nothing_is_reweighted():
    """Paper Eq. 16: alpha = beta = 1, coupled."""
    student, teacher = torch.randn(2, 9, 11, dtype=torch.float64) * 4
    ours = ops.list_kd_from_scores(student, teacher, tau=3.0, impl="triton")
    log_s, log_t = (student / 3).log_softmax(-1), (teacher / 3).log_softmax(-1)
    truth = 9 * torch.nn.functional.kl_div(log_s, log_t, log_target=True, reduction="batchmean")
    assert (ours - truth).abs() < 1e-12


def case_logits_of_ten_thousand():
    rows = [[1e4, -1e4, -1e4, 0], [-1e4, 1e4, 1e4, 0], [1e4, 1e4, 1e4, 1e4], [-1e4] * 4, [0, 1e4, -1e4, 5e3]]
    student = torch.tensor(rows)
    for f, leaves in (
        (lambda s, t, impl: ops.list_kd_from_scores(s, t, impl=impl), [student, student.flip(0)]),
        (lambda s, t, impl: sum(ops.bpr_kd_from_scores(s, t, impl=impl)), [student[:, 0], student[:, 1]]),
    ):
        compare(f, leaves)


def case_zero_rows_have_cosine_zero_and_no_gradient():
    student, teachers = torch.randn(5, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    student[2] = 0
    teachers[1, 4] = 0
    by_student, by_teachers = gradients(
        lambda s, t, impl: ops.emb_kd_loss(s, t, gamma=3.0, impl=impl), [student, teachers]
    )
    compare(lambda s, t, impl: ops.emb_kd_loss(s, t, gamma=3.0, impl=impl), [student, teachers])
    assert by_student[2].eq(0).all() and by_teachers[:, 2].eq(0).all() and by_teachers[1, 4].eq(0).all()


def case_nan_is_not_hidden():
    bad = torch.tensor([[1.0, float("nan")]])
    index = torch.zeros(1, dtype=torch.int64)
    good = torch.ones(1, 2)
    for gamma in (1.0, 2.0, 2.5):
        assert ops.emb_kd_loss(bad, good, gamma=gamma, impl="triton").isnan()
        assert ops.emb_kd_loss(good, bad, gamma=gamma, impl="triton").isnan()
    assert ops.bpr_loss(bad, good, index, index, index, impl="triton").isnan()
    assert ops.list_kd_loss(
        bad, good, index, torch.zeros(1, 3, dtype=torch.int64), good[:, :1].expand(1, 3), impl="triton"
    ).isnan()


def case_each_gradient_alone(deterministic):
    each_alone(bpr(), [*small(torch.float32, 16), torch.randn(5)])
    each_alone(listed(candidates_of(6)), [*small(torch.float32, 16), torch.randn(2, 5, 6)])
    each_alone(lambda s, t, impl: ops.emb_kd_loss(s, t, impl=impl), [torch.randn(5, 16), torch.randn(2, 5, 16)])


def case_sorted_gradients_are_bit_equal_from_run_to_run():
    torch.use_deterministic_algorithms(True)
    users = torch.zeros(40, dtype=torch.int64)  # one user in every sample: segments longer than a block
    index = (users, torch.arange(40) % 3, torch.arange(40) % 5)
    leaves = [*small(torch.float32, 16), torch.randn(40)]
    runs = [gradients(bpr(index=index), leaves) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    compare(bpr(index=index), leaves)
    torch.use_deterministic_algorithms(False)


def case_an_empty_batch(deterministic, poison_empty):
    empty = torch.empty(0, dtype=torch.int64)
    for f, teacher in (
        (bpr(index=(empty, empty, empty)), torch.empty(0)),
        (listed(torch.empty(0, 4, dtype=torch.int64), empty), torch.empty(2, 0, 4)),
    ):
        leaves = [t.requires_grad_() for t in (*small(torch.float32, 8), teacher)]
        loss = f(*leaves, impl="triton")
        loss.backward()
        assert loss == 0 and all(t.grad is None or t.grad.eq(0).all() for t in leaves)
    assert ops.emb_kd_loss(torch.empty(0, 8), torch.empty(2, 0, 8), impl="triton") == 0


def case_views_and_expanded_inputs():
    user_emb, item_emb = torch.randn(8, 6).T, torch.randn(7, 16)[:, ::2]
    candidates, teacher = candidates_of(10)[:, ::2], torch.randn(5, 1, 5).expand(5, 2, 5).transpose(0, 1)
    compare(listed(candidates), [user_emb, item_emb, teacher])
    compare(bpr(index=(torch.tensor([2]).expand(5), POS, NEG)), [user_emb, item_emb, torch.randn(5)])


def case_gradcheck():
    loose = 0.0 if launch.INTERPRETED else 1e-12  # a GPU's atomics add in an order of their own
    leaves = [t.requires_grad_() for t in (*tables(torch.float64, 2, 6, 7), torch.randn(5, dtype=torch.float64))]
    for kind in ("bernoulli", "positive"):
        f = bpr(kind, 1.3)
        assert torch.autograd.gradcheck(
            lambda u, i, t, f=f: f(u, i, t, "triton"), leaves, fast_mode=True, nondet_tol=loose
        )
    leaves[2] = torch.randn(1, 5, 3, dtype=torch.float64, requires_grad=True)
    for weight in ("coupled", "decoupled"):
        f = listed(candidates_of(3), weight=weight)
        assert torch.autograd.gradcheck(
            lambda u, i, t, f=f: f(u, i, t, "triton"), leaves, fast_mode=True, nondet_tol=loose
        )
