"""project: the grid over storage types and widths, what is added and what is masked, blocks and parts of every size."""

from __future__ import annotations

import weakref

import pytest
import torch

from mmkd import ops
from tests.ops.grid import DIMS, DTYPES, within_budget


def problem(dtype, d, *, rows=130, widths=(5, 97), e=4, shift=True, scale=True, mask=True):
    """(tables, weights, keyword arguments), leaves that ask for gradients, constants that do not."""
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    g = torch.Generator().manual_seed(d + rows)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(kind)

    tables = [normal(rows, k).to(dtype) for k in widths]
    weights = [(normal(k + shift, d) / max(k, 1) ** 0.5).requires_grad_() for k in widths]
    total = len(widths) * d
    given = {
        "scales": [normal(rows) if scale and m % 2 == 0 else None for m in range(len(widths))],
        "design": normal(rows, e) if e else None,
        "added": normal(e, total).requires_grad_() if e else None,
        "mask": 1.25 * (torch.rand(rows, total, generator=g) > 0.2).to(kind) if mask else None,
    }
    return tables, weights, given


def double(x):
    if isinstance(x, (list, tuple)):
        return [double(t) for t in x]
    return None if x is None else x.detach().double().requires_grad_(x.requires_grad)


def results(tables, weights, given, impl):
    """The output and all gradients for an upstream one that is the same for every type."""
    out = ops.project(tables, weights, **given, impl=impl)
    leaves = [t for t in (*weights, given["added"]) if t is not None and t.requires_grad]
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def compare(tables, weights, given, dtype):
    truth = results(double(tables), double(weights), {k: double(v) for k, v in given.items()}, "reference")
    eager, ours = (results(tables, weights, given, impl) for impl in ("reference", "cpp"))
    kind = torch.float64 if dtype == torch.float64 else torch.float32  # 16 bits are only how features are stored
    for o, e, t in zip(ours, eager, truth, strict=True):
        assert o.dtype == e.dtype == kind
        within_budget(o, e, t, kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", DIMS)
def test_grid(d, dtype, cpu_isa, poison_empty):
    compare(*problem(dtype, d), dtype)


@pytest.mark.parametrize("without", ["e", "shift", "scale", "mask", "all"])
@pytest.mark.parametrize("d", [64, 65])
def test_what_may_be_left_out(without, d, cpu_isa, poison_empty):
    names = ("e", "shift", "scale", "mask") if without == "all" else (without,)
    compare(*problem(torch.float32, d, **dict.fromkeys(names, 0)), torch.float32)


@pytest.mark.parametrize(
    "sizes",
    [
        {"rows": 1, "widths": (1,), "e": 1},
        {"rows": 95, "widths": (96,)},
        {"rows": 97, "widths": (193, 95), "e": 7},
        {"rows": 64, "widths": (6, 12, 479, 481), "e": 6},
        {"rows": 2200, "widths": (3, 50)},  # more parts of the rows than one
        {"rows": 129, "widths": (961,)},  # more ranges of the columns than one
        {"rows": 40, "widths": (0, 3)},
        {"rows": 0, "widths": (5, 3)},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_ranges_and_parts(sizes, dtype, cpu_isa, poison_empty):
    compare(*problem(dtype, 64, **sizes), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_numbers(dtype):
    tables, weights, given = problem(dtype, 16)
    tables = [table * 1e4 for table in tables]
    compare(tables, weights, given, dtype)


def test_a_number_that_is_not_finite_stays_where_it_belongs():
    tables, weights, given = problem(torch.float32, 16, mask=False)
    tables[1][7, 3] = torch.inf
    out = ops.project(tables, weights, **given)
    assert torch.isfinite(out[:7]).all() and torch.isfinite(out[8:]).all() and torch.isfinite(out[7, :16]).all()
    assert not torch.isfinite(out[7, 16:]).any()


@pytest.mark.parametrize("threads_see", [{"rows": 3000, "widths": (70,)}, {"rows": 300, "widths": (1000, 7)}], ids=str)
def test_threads(threads_see):
    given = problem(torch.float32, 64, **threads_see)
    before, seen = torch.get_num_threads(), []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        seen.append(results(*given, "cpp"))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


def test_gradcheck():
    tables, weights, given = problem(torch.float64, 3, rows=7, widths=(2, 4), e=2)
    added = given.pop("added")
    assert torch.autograd.gradcheck(
        lambda *ts: ops.project(tables, ts[:2], **given, added=ts[2], impl="cpp"), [*weights, added]
    )


@pytest.mark.parametrize("place", range(3))
def test_each_gradient_alone(place):
    tables, weights, given = problem(torch.float32, 64)
    whole = results(tables, weights, given, "cpp")[1:]
    leaves = [*weights, given["added"]]
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i == place)
    assert torch.equal(results(tables, weights, given, "cpp")[1], whole[place])
    leaves[place].requires_grad_(False)
    assert not ops.project(tables, weights, **given).requires_grad


def test_views_and_read_only_memory(tmp_path):
    import numpy as np

    tables, weights, given = problem(torch.float32, 32)
    np.save(tmp_path / "x.npy", tables[1].numpy())
    wide = torch.randn(130, 10)
    tables = [wide[:, ::2], torch.from_numpy(np.load(tmp_path / "x.npy", mmap_mode="c"))]
    given["mask"] = torch.rand(64, 130).T
    weights[0] = torch.randn(32, 6).T.requires_grad_()
    compare(tables, weights, given, torch.float32)


def test_opcheck_compile_and_autocast():
    tables, weights, given = problem(torch.float32, 8)
    scales = [torch.empty(0) if r is None else r for r in given["scales"]]
    still = [w.detach() for w in weights]
    arguments = tables, still, scales, given["design"], given["added"].detach(), given["mask"]
    checks = ("test_schema", "test_faketensor")  # its gradient is the door's
    torch.library.opcheck(torch.ops.mmkd.project.default, arguments, test_utils=checks)
    grad = torch.randn(130, 16)
    for need in (True, False):
        back = grad, tables, [len(w) for w in still], scales, given["design"], given["mask"], need
        torch.library.opcheck(torch.ops.mmkd.project_backward.default, back, test_utils=checks)
    leaves = [*weights, given["added"]]
    compiled = torch.compile(lambda: ops.project(tables, weights, **given), fullgraph=True, backend="aot_eager")()
    plain = ops.project(tables, weights, **given)
    torch.testing.assert_close(compiled, plain)
    ours = torch.autograd.grad(compiled.square().sum(), leaves)
    torch.testing.assert_close(ours, torch.autograd.grad(plain.square().sum(), leaves))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.project(tables, weights, **given).dtype == torch.float32


def test_what_has_no_gradient_says_so():
    tables, weights, given = problem(torch.float32, 8)
    (grad,) = torch.autograd.grad(ops.project(tables, weights, **given).square().sum(), weights[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    scales = [torch.empty(0)] * 2
    raw = torch.ops.mmkd.project(tables, weights, scales, None, None, None)
    with pytest.raises(RuntimeError, match=r"call mmkd.ops.project, which carries its gradient"):
        raw.sum().backward()
    with pytest.raises(RuntimeError, match=r"project: transforms of torch.func are not supported"):
        torch.func.grad(lambda w: ops.project(tables[:1], [w]).sum())(weights[0].detach())


def test_what_is_overwritten_before_the_way_back_is_noticed():
    tables, weights, given = problem(torch.float32, 8)
    for t in (given["mask"], given["design"], given["scales"][0], tables[1]):
        out = ops.project(tables, weights, **given).sum()
        t.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()
    out = ops.project(tables, weights, **given)
    (before,) = torch.autograd.grad(out.sum(), weights[0], retain_graph=True)
    with torch.no_grad():
        weights[0].mul_(2)  # nobody reads it any more
    assert torch.equal(torch.autograd.grad(out.sum(), weights[0])[0], before)


def test_constants_go_with_the_way_back():
    tables, weights, given = problem(torch.float32, 8)
    seen = weakref.ref(given["mask"])
    loss = ops.project(tables, weights, **given).sum()
    del given
    loss.backward()
    assert seen() is None


def test_errors_name_the_argument():
    tables, weights, given = problem(torch.float32, 8)
    half = [w.detach().half() for w in weights]
    cases = [
        (ValueError, "tables, weights, scales: expected equally many", lambda: ops.project(tables, weights[:1])),
        (ValueError, "tables, weights, scales: expected equally many", lambda: ops.project([], [])),
        (TypeError, r"weights\[0\]: expected a tensor of float32 or float64", lambda: ops.project(tables, half)),
        (TypeError, r"tables\[0\]: torch.float32 goes with", lambda: ops.project(tables, [w.double() for w in weights])),
        (TypeError, r"tables\[1\]: expected", lambda: ops.project([tables[0], tables[1].int()], weights)),
        (ValueError, r"tables\[1\]: expected shape", lambda: ops.project([tables[0], tables[1][:9]], weights)),
        (ValueError, r"tables\[0\]: expected 2 dim", lambda: ops.project([tables[0][0], tables[1]], weights)),
        (ValueError, r"weights\[1\]: expected \[97, 8\]", lambda: ops.project(tables, [weights[0], weights[1][:90]])),
        (ValueError, r"weights\[1\]: expected \[97, 8\]", lambda: ops.project(tables, [weights[0], weights[1][:, :4]])),
        (ValueError, r"scales\[0\]: expected shape", lambda: ops.project(tables, weights, scales=[torch.ones(3), None])),
        (ValueError, "design, added: expected both", lambda: ops.project(tables, weights, design=given["design"])),
        (ValueError, "added: expected shape", lambda: ops.project(tables, weights, design=given["design"], added=torch.ones(4, 8))),
        (ValueError, "mask: expected shape", lambda: ops.project(tables, weights, mask=torch.ones(130, 8))),
        (TypeError, "mask: expected", lambda: ops.project(tables, weights, mask=torch.ones(130, 16).double())),
        (ValueError, "mask: is a constant", lambda: ops.project(tables, weights, mask=torch.ones(130, 16).requires_grad_())),
        (ValueError, r"tables\[0\]: is a constant", lambda: ops.project([tables[0].clone().requires_grad_(), tables[1]], weights)),
        (ValueError, r"weights\[0\]: expected on cpu", lambda: ops.project(tables, [weights[0].to("meta"), weights[1]])),
    ]  # fmt: skip
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


def test_the_kernel_checks_for_itself():
    (x,), (w,), _ = problem(torch.float32, 8, widths=(5,))
    run, back, none = torch.ops.mmkd.project, torch.ops.mmkd.project_backward, torch.empty(0)
    w, grad = w.detach(), torch.ones(130, 8)
    cases = [
        ("weights, scales: expected 1", lambda: run([x], [w, w], [none], None, None, None)),
        (r"weights\[0\]: expected float32 or float64", lambda: run([x], [w.half()], [none], None, None, None)),
        (r"tables\[0\]: expected float64 with", lambda: run([x], [w.double()], [none.double()], None, None, None)),
        (r"weights\[0\]: expected 5 rows, or one more", lambda: run([x], [w[:3]], [none], None, None, None)),
        (r"scales\[0\]: expected 130 entries or none", lambda: run([x], [w], [torch.ones(3)], None, None, None)),
        (r"tables\[0\]: expected contiguous", lambda: run([x.T.contiguous().T], [w], [none], None, None, None)),
        ("design: expected size 130", lambda: run([x], [w], [none], torch.ones(3, 2), torch.ones(2, 8), None)),
        ("design, added: expected both", lambda: run([x], [w], [none], torch.ones(130, 2), None, None)),
        ("added: expected size 2", lambda: run([x], [w], [none], torch.ones(130, 2), torch.ones(3, 8), None)),
        ("mask: expected size 8", lambda: run([x], [w], [none], None, None, torch.ones(130, 9))),
        ("grad: expected size 130", lambda: back(grad[:3], [x], [6], [none], None, None, True)),
        (r"tables\[0\]: expected float64", lambda: back(grad.double(), [x], [6], [none.double()], None, None, True)),
        ("grad: expected as many columns", lambda: back(grad[:, :7], [x, x], [6, 6], [none, none], None, None, True)),
        (r"weights\[0\]: expected 5 rows", lambda: back(grad, [x], [4], [none], None, None, True)),
    ]
    for message, call in cases:
        with pytest.raises(RuntimeError, match=message):
            call()
