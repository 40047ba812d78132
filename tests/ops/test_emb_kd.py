"""emb_kd_loss: the grid, zero rows, parallel rows, any gamma >= 1."""

from __future__ import annotations

import weakref

import pytest
import torch

from mmkd import ops
from tests.ops.grid import DIMS, DTYPES
from tests.ops.losses import bit_equal_for_threads, compare, each_alone


def kd(gamma=2.0, weights=None):
    return lambda student, teachers, impl: ops.emb_kd_loss(
        student, teachers, gamma=gamma, modality_weights=weights, impl=impl
    )


def rows(dtype, d, n=9, m=2):
    torch.manual_seed(d)
    return [torch.randn(n, d).to(dtype), torch.randn(m, n, d).to(dtype)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", DIMS[1:])  # at d = 1 every cosine is +-1 and the gradient is rounding: see below
@pytest.mark.parametrize("gamma", [1.0, 2.0, 2.5])
def test_grid(d, dtype, gamma, cpu_isa, poison_empty):
    compare(kd(gamma), rows(dtype, d), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gamma", [1.0, 2.5])
def test_weights_of_the_modalities(dtype, gamma, cpu_isa, poison_empty):
    compare(kd(gamma, torch.tensor([0.25, 0.0, 3.0])), rows(dtype, 24, m=3), dtype)


def test_a_weighted_sum_is_the_sum_of_the_weighted_modalities():
    student, teachers = (t.double().requires_grad_() for t in rows(torch.float32, 16, m=3))
    weights = torch.tensor([0.5, 0.0, 2.0])  # exact in float32 and float64
    whole = ops.emb_kd_loss(student, teachers, modality_weights=weights)
    apart = sum(w.double() * ops.emb_kd_loss(student, t) for w, t in zip(weights, teachers, strict=True))
    torch.testing.assert_close(whole, apart)
    ours = torch.autograd.grad(whole, (student, teachers))
    torch.testing.assert_close(ours, torch.autograd.grad(apart, (student, teachers)))
    assert ours[1][1].eq(0).all()  # weight 0: no gradient
    assert torch.equal(ops.emb_kd_loss(student, teachers), kd(weights=torch.ones(3))(student, teachers, "auto"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_column(dtype, cpu_isa):
    student, teachers = (t.requires_grad_() for t in rows(dtype, 1))
    loss = ops.emb_kd_loss(student, teachers)
    loss.backward()
    signs = (student.detach().sign() * teachers.detach().sign()).float()
    torch.testing.assert_close(loss.detach().float(), (1 - signs).square().mean(1).sum(), rtol=1e-3, atol=1e-3)
    assert student.grad.abs().max() < 1e-2 and torch.isfinite(teachers.grad).all()


@pytest.mark.parametrize("impl", ["cpp", "reference"])
def test_zero_rows_have_cosine_zero_and_no_gradient(impl):
    student, teachers = (t.double().requires_grad_() for t in rows(torch.float32, 8))
    with torch.no_grad():
        student[2] = 0
        teachers[1, 4] = 0
    loss = ops.emb_kd_loss(student, teachers, gamma=3.0, impl=impl)
    loss.backward()
    cosine = torch.cosine_similarity(student.detach(), teachers.detach(), dim=-1)
    torch.testing.assert_close(loss.detach(), (1 - cosine).pow(3).mean(1).sum())
    assert student.grad[2].eq(0).all() and teachers.grad[:, 2].eq(0).all() and teachers.grad[1, 4].eq(0).all()
    assert student.grad[4].ne(0).any()  # the other modality still teaches this row


@pytest.mark.parametrize("gamma", [1.0, 2.0, 1.5])
def test_parallel_rows_are_free_and_finite(gamma, cpu_isa):
    student = torch.randn(50, 64, requires_grad=True)
    loss = ops.emb_kd_loss(student, (3 * student.detach())[None], gamma=gamma)
    loss.backward()
    assert 0 <= loss < 1e-5 and torch.isfinite(student.grad).all() and student.grad.abs().max() < 1e-3


def test_a_sequence_is_its_stack_and_one_matrix_is_one_modality():
    student, teachers = rows(torch.float32, 16)
    assert torch.equal(ops.emb_kd_loss(student, list(teachers)), ops.emb_kd_loss(student, teachers))
    assert torch.equal(ops.emb_kd_loss(student, teachers[0]), ops.emb_kd_loss(student, teachers[:1]))


def test_gradcheck():
    leaves = [t.double().requires_grad_() for t in rows(torch.float32, 5, n=4)]
    for gamma in (1.0, 2.0, 2.5):
        loss = kd(gamma, torch.tensor([0.5, 2.0]))
        assert torch.autograd.gradcheck(lambda s, t, loss=loss: loss(s, t, "cpp"), leaves)


def test_each_gradient_alone_and_threads():
    each_alone(kd(), rows(torch.float32, 64))
    bit_equal_for_threads(kd(2.5), rows(torch.float32, 64, n=3000))


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_a_kept_graph_gives_its_gradient_again(scale):
    student, teachers = (t.requires_grad_() for t in rows(torch.float32, 64, n=300))
    loss = scale * ops.emb_kd_loss(student, teachers)
    first = torch.autograd.grad(loss, (student, teachers), retain_graph=True)
    kept = [g.clone() for g in first]
    first[0].zero_()  # the caller's own
    again = torch.autograd.grad(loss, (student, teachers), retain_graph=True)
    torch.testing.assert_close(again, tuple(kept))
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], kept[0])


def test_transforms_are_refused_but_by_the_reference():
    student, teachers = rows(torch.float32, 8)
    with pytest.raises(RuntimeError, match=r"emb_kd: transforms of torch.func are not supported"):
        torch.func.grad(lambda s: ops.emb_kd_loss(s, teachers))(student)
    transformed = torch.func.grad(lambda s: ops.emb_kd_loss(s, teachers, impl="reference"))(student)
    student.requires_grad_()
    torch.testing.assert_close(transformed, torch.autograd.grad(ops.emb_kd_loss(student, teachers), student)[0])


def test_a_gradient_that_no_one_fetched_goes_with_its_graph():
    student, teachers = rows(torch.float32, 64, n=300)
    loss = ops.emb_kd_loss(student.requires_grad_(), teachers)
    unit = weakref.ref(loss.grad_fn.unit)
    assert unit().shape == student.shape
    del loss
    assert unit() is None  # no cycle that a collection would have to find


def test_16_bits_make_no_gradient_on_the_way_and_survive_a_scaled_loss():
    student, teachers = rows(torch.float16, 64, n=20000)
    loss = ops.emb_kd_loss(student.requires_grad_(), teachers)
    assert loss.grad_fn.unit is None
    (2.0**15 * loss).backward()  # unscaled, gradients of 1e-6 would keep three of their bits
    truth = student.detach().double().requires_grad_()
    ops.emb_kd_loss(truth, teachers.double()).backward()
    torch.testing.assert_close(student.grad.double() / 2**15, truth.grad, rtol=2e-3, atol=1e-9)


def test_no_rows_and_no_teachers(poison_empty):
    for impl in ("cpp", "reference"):
        student = torch.empty(0, 8, requires_grad=True)
        loss = ops.emb_kd_loss(student, torch.empty(2, 0, 8), impl=impl)
        loss.backward()
        assert loss == 0 and student.grad.shape == (0, 8)
        assert ops.emb_kd_loss(torch.randn(4, 8), torch.empty(0, 4, 8), impl=impl) == 0


def test_views():
    student, teachers = torch.randn(16, 9).T, torch.randn(9, 2, 32)[..., ::2].transpose(0, 1)
    torch.testing.assert_close(ops.emb_kd_loss(student, teachers), ops.emb_kd_loss(student, teachers, impl="reference"))
    expanded = torch.randn(1, 8).expand(5, 8)
    torch.testing.assert_close(
        ops.emb_kd_loss(expanded, torch.ones(5, 8)), ops.emb_kd_loss(expanded.clone(), torch.ones(5, 8))
    )


def test_opcheck_compile_and_autocast():
    student, teachers = (t.requires_grad_() for t in rows(torch.float32, 8))
    for with_grad in (False, True):
        arguments = student, teachers, torch.tensor([0.5, 2.0]), 2.0, with_grad
        torch.library.opcheck(torch.ops.mmkd.emb_kd.default, arguments)
    compiled = torch.compile(lambda s, t: ops.emb_kd_loss(s, t), fullgraph=True, backend="aot_eager")(student, teachers)
    plain = ops.emb_kd_loss(student, teachers)
    torch.testing.assert_close(
        torch.autograd.grad(compiled, (student, teachers)), torch.autograd.grad(plain, (student, teachers))
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.emb_kd_loss(student, teachers).dtype == torch.float32


def test_second_derivatives_raise():
    student, teachers = (t.requires_grad_() for t in rows(torch.float32, 8))
    (grad,) = torch.autograd.grad(ops.emb_kd_loss(student, teachers), student, create_graph=True)
    with pytest.raises(RuntimeError, match=r"emb_kd_backward: second derivatives are not supported"):
        grad.sum().backward()


def test_errors_name_the_argument():
    student, teachers = rows(torch.float32, 8)
    cases = [
        (ValueError, "gamma: expected >= 1", lambda: ops.emb_kd_loss(student, teachers, gamma=0.5)),
        (ValueError, "gamma: expected >= 1", lambda: ops.emb_kd_loss(student, teachers, gamma=float("nan"))),
        (ValueError, "teachers: expected shape", lambda: ops.emb_kd_loss(student, teachers[:, :3])),
        (
            ValueError,
            r"teachers\[1\]: expected shape",
            lambda: ops.emb_kd_loss(student, [teachers[0], teachers[1, :2]]),
        ),
        (
            ValueError,
            r"modality_weights: expected shape \(2,\)",
            lambda: kd(weights=torch.ones(3))(student, teachers, "cpp"),
        ),
        (TypeError, "modality_weights: expected", lambda: kd(weights=torch.ones(2).int())(student, teachers, "cpp")),
        (
            ValueError,
            "modality_weights: is a constant",
            lambda: kd(weights=torch.ones(2).requires_grad_())(student, teachers, "cpp"),
        ),
        (TypeError, "teachers: expected", lambda: ops.emb_kd_loss(student, teachers.double())),
        (TypeError, "student: expected", lambda: ops.emb_kd_loss(student.int(), teachers)),
        (RuntimeError, "teachers: expected at most 16", lambda: ops.emb_kd_loss(student, torch.ones(17, 9, 8))),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
