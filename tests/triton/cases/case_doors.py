from __future__ import annotations

import contextlib

import pytest
import torch

from mmkd import BipartiteGraph, backends, ops
from mmkd.kernels import bpr_kd, emb_kd, launch, list_kd, scatter, spmm, topk
from mmkd.kernels.register import OPS

U, C = torch.tensor([0, 1]), torch.tensor([[0, 1, 2], [3, 1, 1]])
UE, IE = torch.randn(4, 3), torch.randn(5, 3)


@pytest.mark.parametrize("name", [*OPS, "topk"])
def case_schemas_are_the_compiled_library_s(name):
    ours, theirs = (str(getattr(getattr(torch.ops, ns), name).default._schema) for ns in ("mmkd_triton", "mmkd"))

    def types(schema: str) -> str:  # results have names only in one of them, integers are SymInt in the other
        arguments, results = schema.split(" -> ")
        bare = [r.split()[0] for r in results.strip("()").split(", ")]
        return f"{arguments.split('(', 1)[1]} -> {bare}".replace("SymInt", "int")

    assert types(ours) == types(theirs)


def case_opcheck():
    ops_ = torch.ops.mmkd_triton
    tables = [t.clone().requires_grad_() for t in (UE, IE)]
    teacher, logits, w = torch.randn(2), torch.randn(2, 2, 3), torch.tensor([0.5, 0.5])
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for op, args in (
        (ops_.bpr_kd, (*tables, U, U, U, teacher, 0.7, True)),
        (ops_.list_scores, (*tables, U, C)),
        (ops_.list_kd, (*tables, U, C, logits, w, 1.0, 1.0, 1.0, True)),
        (ops_.emb_kd, (tables[0], torch.randn(2, 4, 3), torch.rand(2), 2.0, True)),
        (ops_.topk, (UE, IE, 2, None, None, None)),
    ):
        torch.library.opcheck(op.default, args, test_utils=tests)


def case_every_op_runs_on_its_tensors_device(monkeypatch):
    """Triton launches on the current device, which on a machine with several may be another."""
    current, wanted = [], []

    @contextlib.contextmanager
    def device_of(tensor):
        current.append(tensor)
        yield
        current.pop()

    def launched(kernel):
        assert current and current[-1] is wanted[-1]
        return kernel

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for module in (bpr_kd, emb_kd, list_kd, scatter, spmm, topk):
        monkeypatch.setattr(module, "wrap_triton", launched)
    ns, g = torch.ops.mmkd_triton, graph()
    for first, call in (
        (UE, lambda: ns.bpr_kd(UE, IE, U, U, U, None, 1.0, True)),
        (UE, lambda: ns.list_scores(UE, IE, U, C)),
        (UE, lambda: ns.emb_kd(UE, UE[None], torch.ones(1), 2.0, False)),
        (UE, lambda: ns.topk(UE, IE, 2, None, None, None)),
        (g.rowptr, lambda: ns.propagate(g.rowptr, g.col, g.scale, torch.randn(9, 2), 1, None)),
    ):
        wanted.append(first)
        call()


def case_errors_name_the_argument():
    bad = C.clone()
    bad[1, 2] = 5
    for message, call in (
        ("candidates: entry 5 is 5, expected", lambda: ops.list_scores(UE, IE, U, bad, impl="triton")),
        ("users: entry 0 is -1", lambda: ops.bpr_loss(UE, IE, U - 1, U, U, impl="triton")),
        ("neg: entry 1 is 7", lambda: ops.bpr_loss(UE, IE, U, U, U + torch.tensor([0, 6]), impl="triton")),
        ("users: entry 1 is 9", lambda: ops.topk(UE, IE, 1, torch.tensor([0, 9]), impl="triton")),
        ("col: entry 1 is 4", lambda: ops.spmm(torch.tensor([0, 2]), torch.tensor([0, 4]), UE, impl="triton")),
        (
            "rows: entry 0 is 99",
            lambda: ops.propagate(graph(), torch.randn(9, 2), 1, torch.tensor([99]), impl="triton"),
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


def graph():
    return BipartiteGraph.from_edges([0, 1, 3], [2, 4, 0], 4, 5)


def case_second_derivatives_raise():
    user_emb = UE.clone().requires_grad_()
    (grad,) = torch.autograd.grad(ops.bpr_loss(user_emb, IE, U, U, U, impl="triton"), user_emb, create_graph=True)
    with pytest.raises(RuntimeError, match=r"bpr_kd_backward: second derivatives are not supported"):
        grad.sum().backward()


def case_autocast_and_parameters():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ops.bpr_loss(torch.nn.Parameter(UE), torch.nn.Parameter(IE), U, U, U, impl="triton")
    assert loss.dtype == torch.float32


def case_every_op_is_available():
    kernels = [op for op in backends.OPS if op not in backends.NO_TRITON]
    assert all(backends.why_not(op, "triton", device) is None for op in kernels for device in ("cpu", "cuda"))
    assert backends.why_not("frozen_teacher", "triton", "cuda") == "no Triton kernel for this op in this version"


def case_the_fixed_choice(monkeypatch):
    fixed, autotuned = launch._tuned[spmm._spmm_rows]
    assert launch.choose(spmm._spmm_rows) is fixed and len(fixed.configs) == 1 and len(autotuned.configs) > 1
    monkeypatch.setattr(launch, "INTERPRETED", False)
    assert launch.choose(spmm._spmm_rows) is autotuned
    monkeypatch.setenv("MMKD_TRITON_FIXED", "1")
    assert launch.choose(spmm._spmm_rows) is fixed
    monkeypatch.delenv("MMKD_TRITON_FIXED")
    torch.use_deterministic_algorithms(True)
    assert launch.choose(spmm._spmm_rows) is fixed
    torch.use_deterministic_algorithms(False)


def case_degree_buckets():
    assert [launch.degree_bucket(n) for n in (0, 3, 4, 15, 16, 64)] == [0, 0, 1, 1, 2, 3]
    rowptr = torch.tensor([0, *range(1, 19), 18 + 300, 18 + 600])  # 18 rows of one entry, two of 300
    assert launch.degree_quantile(rowptr) == 1 and launch.degree_quantile(rowptr, 0.95) == 300
    assert launch.degree_quantile(rowptr[:1]) == 0


def case_a_graph_keeps_its_plan_and_its_degree_quantile(monkeypatch):
    monkeypatch.setattr(spmm, "SPLIT", 4)
    users, items = torch.arange(200) % 10, torch.arange(200) % 19
    g = BipartiteGraph.from_edges([*users, 0], [*items, 19], 10, 20)
    x = torch.randn(30, 5)
    truth = ops.propagate(g, x, 2, impl="reference")
    torch.testing.assert_close(ops.propagate(g, x, 2, impl="triton"), truth)
    kept = g._cache["plan all triton"]
    pieces, degree = spmm._cut(g.rowptr, g.col.numel(), kept)
    assert degree == launch.degree_bucket(launch.degree_quantile(g.rowptr)) == 2
    assert all(torch.equal(a, b) for a, b in zip(pieces, spmm.plan(g.rowptr, g.col.numel()), strict=True))
    monkeypatch.setattr(spmm, "plan", None)  # not made again
    torch.testing.assert_close(ops.propagate(g, x, 2, impl="triton"), truth)
