"""frozen_teacher: values and the prompt's gradient against the reference, refusals, and bit-equality for any threads."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mmkd import backends, ops, reference
from mmkd.ops.frozen_teacher import _which, composed
from tests.ops.grid import DIMS, within_budget

USERS, ITEMS = 30, 23


def arguments(d=16, *, modalities=2, batch=37, width=5, further=21, dtype=torch.float64, seed=0) -> list:
    """Tables with a zero row of `F` among those asked for, ids with repeats; `state` asks for a gradient."""
    generator = torch.Generator().manual_seed(seed)
    nodes, e = USERS + ITEMS, d + 1

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def ids(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    content, design = normal(modalities, nodes, d), normal(nodes, e)
    content[:, 0] = design[0] = 0
    asked = torch.cat([ids(0, USERS, batch), ids(USERS, nodes, 2 * batch), ids(0, nodes, further)])
    asked[:1] = 0
    omega = torch.rand(modalities, generator=generator, dtype=torch.float64).to(dtype)
    state = (0.1 * normal(modalities, e, d)).requires_grad_()
    return [content, design, normal(nodes, d), omega, state, asked, ids(0, ITEMS, batch, width), USERS]


def outputs_and_gradient(function, given: list, weights) -> tuple[list, torch.Tensor]:
    state = given[4].detach().clone().requires_grad_()
    out = function(*given[:4], state, *given[5:])
    torch.autograd.backward(out, [w.to(o.dtype) for w, o in zip(weights, out, strict=True)])
    return list(out), state.grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("d", DIMS)
@pytest.mark.parametrize(
    "sizes", [{}, {"modalities": 1, "width": 1}, {"modalities": 3, "batch": 100, "further": 0}], ids=str
)
def test_grid(d, dtype, sizes, cpu_isa, poison_empty):
    given = arguments(d, dtype=dtype, **sizes)
    wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in given]
    torch.manual_seed(d)
    weights = [torch.randn(o.shape, dtype=torch.float64) for o in reference.frozen_teacher(*wide)]
    truth, true_grad = outputs_and_gradient(reference.frozen_teacher, wide, weights)
    eager, eager_grad = outputs_and_gradient(reference.frozen_teacher, given, weights)
    for function in (ops.frozen_teacher, composed):  # the kernels, and what runs off the CPU
        ours, our_grad = outputs_and_gradient(function, given, weights)
        for mine, theirs, true in zip([*ours, our_grad], [*eager, eager_grad], [*truth, true_grad], strict=True):
            within_budget(mine, theirs, true, dtype)


@pytest.mark.parametrize("part", [0, 1, 2])
def test_gradcheck_of_each_output(part):
    given = arguments(3, batch=4, width=3, further=5)
    given[5][0] = 1  # a row of length 0 has no derivative

    def one(state):
        return ops.frozen_teacher(*given[:4], state, *given[5:])[part]

    assert torch.autograd.gradcheck(one, (given[4],))


def test_a_zero_row_has_no_direction():
    given = arguments()
    margin, _, targets = ops.frozen_teacher(*given)
    assert torch.isfinite(margin).all() and torch.isfinite(targets).all()
    (grad,) = torch.autograd.grad(margin.sum(), given[4])
    assert torch.isfinite(grad).all()


def test_nothing_asked_for():
    for sizes in ({"batch": 0}, {"further": 0}, {"batch": 0, "further": 0}):
        given = arguments(**sizes)
        margin, logits, targets = ops.frozen_teacher(*given)
        assert margin.shape == (sizes.get("batch", 37),) and logits.shape == (2, len(margin), 5)
        (grad,) = torch.autograd.grad(margin.sum() + logits.sum() + targets.sum(), given[4])
        assert torch.isfinite(grad).all() and (bool(grad.any()) or sizes == {"batch": 0, "further": 0})
    given = arguments(width=0)
    assert ops.frozen_teacher(*given)[1].shape == (2, 37, 0)
    torch.testing.assert_close(ops.frozen_teacher(*given)[0], ops.frozen_teacher(*arguments())[0])


def test_on_a_gpu_auto_takes_no_kernel_that_was_never_run_on_one():
    on_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    assert "frozen_teacher" in backends.UNTRIED and _which(on_gpu, "auto") == "composed"
    assert backends._used("frozen_teacher", "cuda") == "composed" and backends._used("frozen_teacher", "cpu") == "cpp"


def test_constants_without_a_gradient():
    given = arguments()
    given[4] = given[4].detach()
    assert not any(out.requires_grad for out in ops.frozen_teacher(*given))


def test_bit_equal_for_any_number_of_threads():
    given, before, seen = arguments(64, batch=700, further=300, dtype=torch.float32), torch.get_num_threads(), []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        out = ops.frozen_teacher(*given)
        seen.append((*out, *torch.autograd.grad(sum(o.sin().sum() for o in out), given[4])))
    torch.set_num_threads(before)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_inputs_may_be_strided_and_are_never_written():
    given = arguments()
    strided = [t.detach().T.contiguous().T if isinstance(t, torch.Tensor) and t.dim() == 2 else t for t in given]
    copies = [t.detach().clone() if isinstance(t, torch.Tensor) else t for t in given]
    for a, b in zip(ops.frozen_teacher(*strided), ops.frozen_teacher(*given), strict=True):
        assert torch.equal(a, b)
    sum(o.sum() for o in ops.frozen_teacher(*given)).backward()
    assert all(torch.equal(a.detach(), b) for a, b in zip(given[:7], copies[:7], strict=True))


def test_opcheck_and_compile():
    given = arguments(5, batch=4, further=3, dtype=torch.float32)
    torch.library.opcheck(torch.ops.mmkd.frozen_teacher.default, tuple(given))

    def step(state):
        margin, logits, targets = ops.frozen_teacher(*given[:4], state, *given[5:])
        return margin.sin().sum() + logits.cos().sum() + targets.sum()

    seen = []
    for function in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
        seen.append(torch.autograd.grad(function(given[4]), given[4])[0])
    torch.testing.assert_close(*seen)
    with pytest.raises(RuntimeError, match="frozen_teacher_backward: second derivatives are not supported"):
        torch.autograd.grad(step(given[4]), given[4], create_graph=True)[0].sum().backward()


def test_errors_name_the_argument():
    good = arguments()

    def call(index, value):
        ops.frozen_teacher(*good[:index], value, *good[index + 1 :])

    content, design, ids, omega, state, nodes, candidates, _ = good
    cases = [
        (0, content[0], ValueError, "content: expected 3 dimension"),
        (0, content.long(), TypeError, "content: expected"),
        (0, content.clone().requires_grad_(), ValueError, "content: is a constant"),
        (1, design[:, 1:], ValueError, "design: expected shape"),
        (2, ids.clone().requires_grad_(), ValueError, "ids: is a constant"),
        (3, omega.float(), TypeError, "omega: expected"),
        (4, state[:1], ValueError, "state: expected shape"),
        (5, nodes[:9], ValueError, "nodes: expected at least 111 ids"),
        (5, nodes.int(), TypeError, "nodes: expected"),
        (5, nodes.clone().fill_(USERS + ITEMS), RuntimeError, "nodes: entry 0 is 53, expected"),
        (6, candidates - ITEMS, RuntimeError, "candidates: entry 0 is -"),
        (6, candidates[0], ValueError, "candidates: expected 2 dimension"),
        (7, USERS + ITEMS + 1, ValueError, "first_item: expected"),
    ]
    for index, value, kind, message in cases:
        with pytest.raises(kind, match=message):
            call(index, value)
    half = [t.half() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in good]
    with pytest.raises(RuntimeError, match="content: expected float32 or float64"):
        ops.frozen_teacher(*half)
