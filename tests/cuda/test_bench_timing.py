"""The timing of bench/gpu.py with a device that only counts: the order of calls, what is timed, what is not."""

from __future__ import annotations

from types import SimpleNamespace

import bench_gpu
import cases
import gpu
import harness
import pytest
import torch


class FakeCuda(SimpleNamespace):
    """A clock that only functions advance, and every event by `tick`."""

    def __init__(self, tick: float = 0.0):
        super().__init__(now=0.0, waits=0)
        clock = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = clock.now
                clock.now += tick

            def elapsed_time(self, other):
                return other.at - self.at

        self.Event = Event

    def current_device(self):
        return "cpu"

    def synchronize(self):
        self.waits += 1

    def reset_peak_memory_stats(self):
        pass

    def memory_allocated(self):
        return 0

    def max_memory_allocated(self):
        return 3 << 20


def test_functions_are_timed_in_turn_between_events(monkeypatch):
    monkeypatch.setattr(gpu, "FLUSH_BYTES", 8)
    cuda, calls = FakeCuda(), []

    def work(name, ms):
        def run():
            calls.append(name)
            cuda.now += ms

        return run

    times = gpu.interleaved({"ours": work("ours", 2.0), "eager": work("eager", 5.0)}, rounds=3, warmup=2, cuda=cuda)
    assert times == {"ours": [2.0] * 3, "eager": [5.0] * 3}
    assert calls == ["ours"] * 2 + ["eager"] * 2 + ["ours", "eager"] * 3
    assert cuda.waits == 1


def test_inputs_rotate():
    seen = []
    call = gpu.rotating(lambda i: lambda: seen.append(i), copies=3)
    for _ in range(4):
        call()
    assert seen == [0, 1, 2, 0]


def test_the_reason_for_a_skip_names_what_is_missing():
    reason = gpu.why_not()
    assert (reason is None) == torch.cuda.is_available()
    assert reason is None or "CUDA" in reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_op_is_timed_and_tabulated(dtype, monkeypatch):
    """`pytest bench/` on a GPU, with CPU tensors and C++ kernels in the GPU's place: every competitor of every op is
    checked against ours, called with all copies of the inputs, and stands in the table."""
    monkeypatch.setitem(cases.SIZES, "tiny", (60, 40, 400, ()))
    monkeypatch.setattr(harness, "ROWS", [])
    monkeypatch.setattr(gpu, "FLUSH_BYTES", 8)
    monkeypatch.setattr(gpu, "ROUNDS", 3)
    monkeypatch.setenv("MMKD_BENCH_COMPILE", "0")  # compiled in bench/, which takes long
    machine = {"cpu": "c", "threads": 1, "isa": "i", "torch": "t", "copy_gbps": 1, "gemm_gflops": 1, "commit": "x"}
    monkeypatch.setattr(harness, "machine", lambda: machine | {"gpu": "a GPU", "gpu_copy_gbps": 900.0})
    sixteen = dtype == torch.bfloat16
    for part in bench_gpu.WORKS.values():
        for work in part("tiny", "cpu", lambda op: ["cpp", "reference"][sixteen and op == "distill" :], dtype):
            bench_gpu.measure(work, dtype, FakeCuda(tick=1.0), capture=lambda fn: fn)
    named = set() if sixteen else {"frozen_teacher"}
    assert {r.op for r in harness.ROWS} == {
        "spmm",
        "propagate",
        "bpr_kd",
        "list_kd",
        "emb_kd",
        "distill",
        "topk",
    } | named
    rivals = {r.op: set(r.rivals) for r in harness.ROWS}
    assert rivals["spmm"] == {"reference", "cuSPARSE fp32"}
    assert rivals["propagate"] == {"reference", "cuSPARSE autograd", "cuSPARSE symmetric"}
    assert rivals["distill"] == {"eager", "torch.compile", "our single ops"}
    assert rivals["list_kd"] == {"reference", "eager", "torch.compile"}
    assert all(set(r.captured) == {"ours"} | {n for n, ms in r.rivals.items() if ms} for r in harness.ROWS)
    text = harness.table()
    assert "captured: ours" in text
    assert "a GPU, copy 900.0 GB/s" in text and "torch.compile: absent" in text and "3.0MB" in text


def test_on_a_gpu_both_of_ours_are_timed(monkeypatch):
    monkeypatch.setattr(bench_gpu.backends, "why_not", lambda op, impl, device: None)
    assert bench_gpu.available("spmm") == ["cuda", "triton"]
    monkeypatch.setattr(bench_gpu.backends, "why_not", lambda op, impl, device: "not built" if impl == "cuda" else None)
    assert bench_gpu.available("spmm") == ["triton"]


def test_a_competitor_that_computes_something_else_is_not_timed():
    work = bench_gpu.Work("x", "y", lambda i: {}, lambda: {"ours": torch.zeros(2), "rival": torch.ones(2)})
    with pytest.raises(AssertionError, match="rival"):
        bench_gpu.measure(work, torch.float32, FakeCuda())


def test_without_a_gpu_the_bench_is_skipped_with_the_reason(pytestconfig):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    mark = next(m for m in bench_gpu.bench_on_gpu.pytestmark if m.name == "skipif")
    assert mark.args[0] is True and mark.kwargs["reason"] == gpu.why_not()
