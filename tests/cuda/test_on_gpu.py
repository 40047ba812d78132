"""What only a GPU can show: every op's kernels on one, on a stream of their own, captured, and bit-equal where asked.

Skipped without one; test_kernels.py and tests/triton run the same kernels on the CPU, and their cases run here once more, on
the GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gpu
import pytest
import torch

from mmkd import BipartiteGraph, backends, ops

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(gpu.why_not() is not None, reason=str(gpu.why_not()))]
DEVICE, IMPLS = "cuda", ("cuda", "triton")
USERS, ITEMS, DIM, BATCH, LIST = 50, 70, 64, 40, 11


def calls(device: str = DEVICE) -> dict[str, tuple]:
    """op -> (function of (impl, *leaves), leaves)."""
    g = torch.Generator().manual_seed(0)

    def table(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(device).requires_grad_()

    def index(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=g).to(device)

    graph = BipartiteGraph.from_edges(index(USERS, 900).cpu(), index(ITEMS, 900).cpu() // 3, USERS, ITEMS).to(device)
    users, lists, rows = index(USERS, BATCH), index(ITEMS, BATCH, LIST), index(USERS + ITEMS, 30)
    pos, neg, margin, logits = (
        lists[:, 0],
        lists[:, 1],
        torch.randn(BATCH, device=device),
        torch.randn(2, BATCH, LIST, device=device),
    )
    ue, ie, x, teachers = table(USERS, DIM), table(ITEMS, DIM), table(USERS + ITEMS, DIM), table(2, USERS, DIM)
    aims, nodes = table(2, len(rows), DIM), USERS + ITEMS
    content, design, ids = (table(*s).detach() for s in ((2, nodes, DIM), (nodes, DIM + 1), (nodes, DIM)))
    omega, state = torch.tensor([0.3, 0.7], device=device), (0.1 * table(2, DIM + 1, DIM).detach()).requires_grad_()
    return {
        "spmm": (lambda impl, i: graph.users_from_items(i, impl=impl).square().sum(), [ie]),
        "propagate": (lambda impl, t: ops.propagate(graph, t, 2, impl=impl).square().sum(), [x]),
        "propagate rows": (lambda impl, t: ops.propagate(graph, t, 2, rows, impl=impl).square().sum(), [x]),
        "bpr_kd": (lambda impl, u, i: sum(ops.bpr_pair_kd_loss(u, i, users, pos, neg, margin, impl=impl)), [ue, ie]),
        "list_kd": (lambda impl, u, i: ops.list_kd_loss(u, i, users, lists, logits, impl=impl), [ue, ie]),
        "emb_kd": (lambda impl, u, t: ops.emb_kd_loss(u, t, impl=impl), [ue, teachers]),
        "distill": (
            lambda impl, t, f: ops.distill_loss(t, USERS, users, lists, margin, logits, rows, f, impl=impl)[0],
            [table(USERS + ITEMS, DIM), aims],
        ),
        "frozen_teacher": (
            lambda impl, z: sum(
                t.square().sum()
                for t in ops.frozen_teacher(
                    content,
                    design,
                    ids,
                    omega,
                    z,
                    torch.cat([users, lists[:, 0] + USERS, lists[:, 1] + USERS, rows]),
                    lists,
                    USERS,
                    impl=impl,
                )
            ),
            [state],
        ),
        "topk": (lambda impl, u, i: ops.topk(u, i, 5, impl=impl)[0].sum() + 0 * u.sum() + 0 * i.sum(), [ue, ie]),
    }


def run(call, leaves, impl: str) -> list[torch.Tensor]:
    for leaf in leaves:
        leaf.grad = None
    out = call(impl, *leaves)
    out.backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def usable(op: str, impl: str) -> None:
    reason = backends.why_not(op.split()[0], impl, DEVICE)
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("op", calls("cpu"))
def test_values_and_gradients(op, impl):
    usable(op, impl)
    call, leaves = calls()[op]
    for mine, truth in zip(run(call, leaves, impl), run(call, leaves, "reference"), strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("op", calls("cpu"))
def test_bit_equal_under_deterministic_algorithms(op, impl):
    usable(op, impl)
    call, leaves = calls()[op]
    torch.use_deterministic_algorithms(True)
    try:
        runs = [run(call, leaves, impl) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("op", calls("cpu"))
def test_another_stream_and_a_cuda_graph(op, impl, monkeypatch):
    """Nothing waits for the device or allocates by itself: else the capture fails."""
    usable(op, impl)
    monkeypatch.setenv("MMKD_TRITON_FIXED", "1")  # a search for a configuration waits
    call, leaves = calls()[op]
    truth = call("reference", *leaves).detach()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        torch.testing.assert_close(call(impl, *leaves), truth, rtol=1e-4, atol=1e-4)
    out = torch.zeros((), device=DEVICE)
    replay = gpu.captured(lambda: out.copy_(call(impl, *leaves).detach()))
    with torch.no_grad():
        for leaf in leaves:
            leaf.mul_(0.5)
    replay()
    torch.testing.assert_close(out, call("reference", *leaves).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("op", calls("cpu"))
def test_forward_and_backward_in_a_cuda_graph(op, impl, monkeypatch):
    usable(op, impl)
    monkeypatch.setenv("MMKD_TRITON_FIXED", "1")
    call, leaves = calls()[op]
    out = [torch.zeros_like(leaf) for leaf in leaves]

    def step() -> None:
        for kept, grad in zip(out, torch.autograd.grad(call(impl, *leaves), leaves), strict=True):
            kept.copy_(grad)

    replay = gpu.captured(step)
    with torch.no_grad():
        for leaf in leaves:
            leaf.mul_(0.5)
    replay()
    for mine, truth in zip(out, run(call, leaves, "reference")[1:], strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("op", calls("cpu"))
def test_on_a_device_that_is_not_the_current_one(op, impl):
    usable(op, impl)
    call, leaves = calls("cuda:1")[op]
    for mine, truth in zip(run(call, leaves, impl), run(call, leaves, "reference"), strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-4)


TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("folder", "case"), [(f, p.stem) for f in IMPLS for p in sorted((TESTS / f / "cases").glob("case_[lst]*.py"))]
)
def test_the_cases_of_the_cpu(folder, case):
    """cases/<case>.py with its tensors taken to the GPU and back (tests/through_gpu.py)."""
    if reason := backends.why_not("spmm", folder, DEVICE):
        pytest.skip(reason)
    cases = TESTS / folder / "cases"
    environment = {
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(cases), os.environ.get("PYTHONPATH", "")]),
        "MMKD_SIMT_LIBRARY": "gpu", "MMKD_TRITON_CASES": "gpu", "MMKD_TRITON_FIXED": "1", "TRITON_INTERPRET": "0",
    }  # fmt: skip
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark", "-o", "python_files=case_*.py",
            "-o", "python_functions=case_*", *([f"--confcutdir={cases}"] if folder == "cuda" else []), str(cases / f"{case}.py"),
        ],
        env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
