"""Every op on a GPU: CUDA C++ and Triton kernels, eager, torch.compile, and cuSPARSE through torch.

Timed by events, warmed up, in turn, with different inputs every time and a cold L2; called from Python, and as CUDA
graphs. Skipped, with the reason, where there is no GPU.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import bench_epoch
import bench_step
import cases
import gpu
import harness
import pytest
import steps
import torch
from bench_spmm import _eager, _moved, _SymmetricCsr, _torch_csr
from harness import compiled, forward_backward

from mmkd import backends, ops, reference
from mmkd.ops.frozen_teacher import composed
from mmkd.training.recorded import steps_of

COPIES = 4  # of the inputs
TOP = 50


@dataclass
class Work:
    """`make(i)` gives every competitor a call over the i-th copy of the inputs; `value(i)` what each computes there."""

    op: str
    case: str
    make: Callable[[int], dict[str, Callable[[], object]]]
    value: Callable[[], dict[str, torch.Tensor]]
    moved_bytes: float | None = None
    flops: float | None = None


def available(op: str) -> list[str]:
    """Which of our GPU implementations can run; the first is `ours` in the table, the other a rival."""
    return [impl for impl in ("cuda", "triton") if backends.why_not(op, impl, "cuda") is None]


def named(impls: list[str], call: Callable[[str], Callable]) -> dict[str, Callable]:
    return {"ours" if i == 0 else impl: call(impl) for i, impl in enumerate(impls)}


def sparse_works(name: str, device: str, impls: Callable[[str], list[str]], dtype: torch.dtype) -> Iterator[Work]:
    """SpMM forward, and propagation with its gradient: all rows, and the rows of a batch."""
    on_cpu = cases.graph(name)
    g, csr = on_cpu.to(device), _torch_csr(on_cpu).to(device=device)
    x = [torch.randn(g.num_nodes, cases.DIM, device=device, dtype=dtype, requires_grad=True) for _ in range(COPIES)]
    rows = torch.randperm(g.num_nodes, device=device)[: min(3072, g.num_nodes)]
    kind = str(dtype).removeprefix("torch.")

    def product(i: int) -> dict:
        def ours(impl):
            return lambda: ops.spmm(g.rowptr, g.col, x[i].detach(), row_scale=g.scale, col_scale=g.scale, impl=impl)

        wide = x[i].detach().float()
        return named(impls("spmm"), ours) | {"cuSPARSE fp32": lambda: csr @ wide}

    yield Work(
        "spmm", f"{name} forward {kind}", product, lambda: {n: f() for n, f in product(0).items()},
        _moved(on_cpu, x[0].element_size()), 4 * g.num_edges * cases.DIM,
    )  # fmt: skip
    for label, which in (("all rows", None), ("rows=3072", rows)):

        def layers(i: int, which=which) -> dict:
            def pick(out):
                return out if which is None else out[which]

            wide = x[i].detach().float().requires_grad_()
            theirs = {
                "cuSPARSE autograd": (lambda: pick(_eager(lambda h: csr @ h, wide, 2)), wide),
                "cuSPARSE symmetric": (lambda: pick(_eager(lambda h: _SymmetricCsr.apply(csr, h), wide, 2)), wide),
            }
            ours = named(impls("propagate"), lambda impl: (lambda: ops.propagate(g, x[i], 2, which, impl=impl), x[i]))
            return ours | theirs

        yield Work(
            "propagate", f"{name} L=2 {label} {kind} fwd+bwd",
            lambda i, layers=layers: {n: forward_backward(f, [leaf]) for n, (f, leaf) in layers(i).items()},
            lambda layers=layers: {n: f().detach() for n, (f, _) in layers(0).items()},
        )  # fmt: skip


def loss_works(name: str, device: str, impls: Callable[[str], list[str]], dtype: torch.dtype) -> Iterator[Work]:
    """The losses with their gradients, over full tables and over the rows of the batch."""
    kind = str(dtype).removeprefix("torch.")
    for form in ("full", "compact"):
        batches = [cases.batch(name, dtype, seed=i) for i in range(COPIES)]
        batches = [(b if form == "full" else b.compact()).to(device) for b in batches]

        def pair_eager(user_emb, item_emb, users, pos, neg, teacher):
            margin = reference.margins(user_emb, item_emb, users, pos, neg)
            return reference.bpr(margin) + reference.pair_kd(margin, teacher)

        def list_eager(user_emb, item_emb, users, candidates, teacher):
            return reference.list_kd(reference.list_scores(user_emb, item_emb, users, candidates), teacher)

        def pair_args(b):
            return b.user_emb, b.item_emb, b.users, b.pos, b.neg, b.teacher_margin

        def list_args(b):
            return b.user_emb, b.item_emb, b.users, b.candidates, b.teacher_logits

        def summed(*args, impl):
            return sum(ops.bpr_pair_kd_loss(*args, impl=impl))

        for op, ours, eager, args in (
            ("bpr_kd", summed, pair_eager, pair_args),
            ("list_kd", ops.list_kd_loss, list_eager, list_args),
        ):
            yield _loss(op, f"{name} {form} {kind} fwd+bwd", ours, eager, [args(b) for b in batches], impls(op), 2)

    rows = cases.SIZES[name][1]
    tables = [
        (torch.randn(rows, cases.DIM, device=device).to(dtype).requires_grad_(),
         torch.randn(cases.NUM_MODALITIES, rows, cases.DIM, device=device).to(dtype))
        for _ in range(COPIES)
    ]  # fmt: skip

    def emb_eager(student, teachers):
        return sum((1 - torch.cosine_similarity(student, f, dim=-1)).pow(2).mean() for f in teachers)

    yield _loss(
        "emb_kd", f"{name} all items M=2 {kind} fwd+bwd", ops.emb_kd_loss, emb_eager, tables, impls("emb_kd"), 1
    )


def distill_works(name: str, device: str, impls: Callable[[str], list[str]], dtype: torch.dtype) -> Iterator[Work]:
    """All losses of the student at once, with every gradient, over the rows of the batch."""
    kind, nodes = str(dtype).removeprefix("torch."), 1024
    inputs = []
    for i in range(COPIES):
        b = cases.batch(name, dtype, seed=i).compact().to(device)
        table = torch.cat([b.user_emb, b.item_emb]).detach().requires_grad_()
        targets = torch.randn(cases.NUM_MODALITIES, nodes, cases.DIM, device=device).to(dtype).requires_grad_()
        learned = (t.detach().clone().requires_grad_() for t in (b.teacher_margin, b.teacher_logits))
        asked = torch.randint(len(b.user_emb), len(table), (nodes,), device=device)
        inputs.append((table, *learned, targets, len(b.user_emb), b.users, b.candidates, asked))

    def ours(table, margin, logits, targets, count, users, candidates, asked, impl):
        return ops.distill_loss(table, count, users, candidates, margin, logits, asked, targets, impl=impl)[0]

    def single(*args):
        table, margin, logits, targets, count, users, candidates, asked = args
        own = table.split([count, len(table) - count])
        terms = (
            *ops.bpr_pair_kd_loss(*own, users, candidates[:, 0], candidates[:, 1], margin),
            ops.list_kd_loss(*own, users, candidates, logits),
            ops.emb_kd_loss(table.index_select(0, asked), targets),
        )
        return sum(w * t for w, t in zip((1.0, 0.1, 0.1, 0.01), terms, strict=True))

    def eager(table, margin, logits, targets, count, users, candidates, asked):
        return reference.distill(
            table, count, users, candidates, margin, logits, asked, targets, (1.0, 0.1, 0.1, 0.01), 1.0, "bernoulli", 1.0,
            1.0, 1.0, "coupled", 2.0, None, None,
        )[0]  # fmt: skip

    work = _loss("distill", f"{name} compact {kind} fwd+bwd", ours, eager, inputs, impls("distill")[:1], 4)
    make = work.make
    work.make = lambda i: make(i) | {"our single ops": forward_backward(lambda: single(*inputs[i]), inputs[i][:4])}
    yield work


def frozen_works(name: str, device: str, impls: Callable[[str], list[str]], dtype: torch.dtype) -> Iterator[Work]:
    """What a student's step asks of the collapsed teacher, with the gradient of its state; constants are float32 or float64."""
    if dtype.itemsize < 4:
        return
    users, items, _, _ = cases.SIZES[name]
    d, modalities, further = cases.DIM, cases.NUM_MODALITIES, 1024

    def random(*shape):
        return torch.randn(*shape, device=device, dtype=dtype)

    constants = random(modalities, users + items, d), random(users + items, d + 1), random(users + items, d)
    omega, inputs = random(modalities).abs(), []
    for i in range(COPIES):
        b = cases.batch(name, dtype, seed=i).to(device)
        nodes = (b.users, users + b.candidates[:, 0], users + b.candidates[:, 1])
        asked = torch.cat([*nodes, torch.randint(0, users + items, (further,), device=device)])
        state = (0.1 * random(modalities, d + 1, d)).requires_grad_()
        inputs.append((state, *constants, omega, asked, b.candidates))

    def pick(fn):
        def call(state, content, design, ids, omega, asked, candidates, **impl):
            out = fn(content, design, ids, omega, state, asked, candidates, users, **impl)
            return torch.stack([part.square().mean() for part in out]).sum()

        return call

    kind, eager, products = str(dtype).removeprefix("torch."), pick(reference.frozen_teacher), pick(composed)
    work = _loss(
        "frozen_teacher", f"{name} M={modalities} {kind} fwd+bwd", pick(ops.frozen_teacher), eager, inputs,
        impls("frozen_teacher")[:1], 1,
    )  # fmt: skip
    make = work.make
    work.make = lambda i: make(i) | {"library products": forward_backward(lambda: products(*inputs[i]), inputs[i][:1])}
    yield work


def _loss(op, case, ours, eager, inputs: list[tuple], impls: list[str], leaves: int) -> Work:
    fused = compiled(eager)

    def calls(i: int) -> dict[str, Callable[[], torch.Tensor]]:
        args = inputs[i]
        mine = named(impls, lambda impl: lambda: ours(*args, impl=impl))
        return mine | {"eager": lambda: eager(*args), "torch.compile": fused and (lambda: fused(*args))}

    def make(i: int) -> dict:
        return {n: f and forward_backward(f, inputs[i][:leaves]) for n, f in calls(i).items()}

    return Work(op, case, make, lambda: {n: f().detach() for n, f in calls(0).items() if f})


def topk_works(name: str, device: str, impls: Callable[[str], list[str]], dtype: torch.dtype) -> Iterator[Work]:
    """All-ranking top-k, nothing left out, against one product and torch.topk over chunks of users."""
    users, items, _, _ = cases.SIZES[name]
    n, k = min(8192, users), min(TOP, items)
    item_emb = torch.randn(items, cases.DIM, device=device).to(dtype)
    asked = [torch.randn(n, cases.DIM, device=device).to(dtype) for _ in range(COPIES)]

    def chunked(rows):
        return torch.cat([(part.float() @ item_emb.float().T).topk(k).values for part in rows.split(1024)])

    def make(i: int) -> dict:
        mine = named(impls("topk"), lambda impl: lambda: ops.topk(asked[i], item_emb, k, impl=impl)[0])
        return mine | {"matmul+topk": lambda: chunked(asked[i])}

    kind = str(dtype).removeprefix("torch.")
    yield Work("topk", f"{name} {n} users {kind}", make, lambda: {m: f() for m, f in make(0).items()},
               flops=2 * n * items * cases.DIM)  # fmt: skip


WORKS = {
    "sparse": sparse_works,
    "losses": loss_works,
    "distill": distill_works,
    "frozen": frozen_works,
    "topk": topk_works,
}


def measure(work: Work, dtype: torch.dtype, cuda=torch.cuda, capture=gpu.capturable) -> harness.Row:
    """Asserts that all competitors agree, then times them, called and as CUDA graphs, and records the row."""
    values = {name: v.float() for name, v in work.value().items()}
    tolerance = 1e-3 if dtype == torch.float32 else 6e-2
    for name, value in values.items():
        torch.testing.assert_close(
            values["ours"], value, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    copies = [work.make(i) for i in range(COPIES)]
    turns = {name: fn and gpu.rotating(lambda i, n=name: copies[i][n], COPIES) for name, fn in copies[0].items()}
    ours = turns.pop("ours")
    row = harness.compare(
        work.op, work.case, ours, turns, moved_bytes=work.moved_bytes, flops=work.flops, memory=True, rounds=gpu.ROUNDS,
        clock=lambda functions, rounds, warmup: gpu.interleaved(functions, rounds, cuda=cuda),
        peak=lambda fn: gpu.peak_extra_mb(fn, cuda=cuda),
    )  # fmt: skip
    graphs = {n: [capture(copy[n]) for copy in copies] for n, fn in copies[0].items() if fn is not None}
    replays = {n: gpu.rotating(lambda i, n=n: graphs[n][i], COPIES) for n in graphs if all(graphs[n])}
    times = gpu.interleaved(replays, gpu.ROUNDS, cuda=cuda)
    row.captured = {n: statistics.median(t) for n, t in times.items()}
    return row


def in_fours(functions: dict[str, Callable[[], object]], rounds: int, warmup: int) -> dict[str, list[float]]:
    """Milliseconds of a step, of four that the host is free to run ahead in, as in a loop."""

    def four(step):
        return lambda: [step() for _ in range(4)]

    times = harness.interleaved({name: four(step) for name, step in functions.items()}, rounds, warmup)
    return {name: [t / 4 for t in taken] for name, taken in times.items()}


def _reserved() -> float:
    """MB of the device that torch holds, without what it only keeps for later."""
    gc.collect()  # of what came before
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved() / 2**20


@pytest.mark.gpu
@pytest.mark.skipif(gpu.why_not() is not None, reason=str(gpu.why_not()))
@pytest.mark.parametrize("stage", ["student", "teacher"])  # both of a size, while its data set is there
@pytest.mark.parametrize("name", ["tiktok", "netflix", "electronics"])
def bench_step_on_gpu(stage, name):
    """A training step as the loop makes it: batch, forward, backward, AdamW; played back, its kernels launched one by one, and
    the eager step of the same mathematics."""
    pair = (steps.student if stage == "student" else steps.teacher_step)(name, device="cuda")
    steps.assert_close(pair)
    turns = iter(range(100_000))

    def loop(recorded: bool) -> Callable[[], None]:
        made = steps_of(pair.task, pair.optimizer, recorded)

        def step() -> None:
            made.gradients(0, next(turns))
            made.update()

        return step

    launched, played = loop(recorded=False), loop(recorded=True)
    launched()  # the optimizer's state is neither's
    before = _reserved()
    for _ in range(24):  # every size is seen often enough to be recorded
        played()
    held = _reserved() - before  # recordings keep what a step uses
    rivals = {"launched": launched}
    rivals |= {f"eager {layout}": bench_step.eager_step(pair, layout) for layout in ("csr", "coo")}
    harness.compare(
        f"{stage} step", f"{name} L=2", played, rivals, rounds=10, memory=True, clock=in_fours,
        peak=lambda fn: held if fn is played else gpu.peak_extra_mb(fn),
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(gpu.why_not() is not None, reason=str(gpu.why_not()))
@pytest.mark.parametrize("stage", ["student", "teacher"])  # both of a size, while its data set is there
@pytest.mark.parametrize("name", ["tiktok", "netflix", "electronics"])
def bench_epoch_on_gpu(stage, name, tmp_path):
    """An epoch by the stage's own loop, held against the paper's seconds (Table 6, an RTX 3090) where it has some."""
    pair = (steps.student if stage == "student" else steps.teacher_step)(name, device="cuda")
    seconds = bench_epoch.epoch_seconds(pair, name, tmp_path, stage, warmup=24)
    limit = bench_epoch.STUDENT_SECONDS.get(name) if stage == "student" else None
    bench_epoch.record(f"{stage} epoch", f"{name} L=2 B=1024", seconds, limit)


@pytest.mark.gpu
@pytest.mark.skipif(gpu.why_not() is not None, reason=str(gpu.why_not()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", list(cases.SIZES))
@pytest.mark.parametrize("part", list(WORKS))
def bench_on_gpu(part, name, dtype):
    torch.manual_seed(0)
    for work in WORKS[part](name, "cuda", available, dtype):
        measure(work, dtype)
