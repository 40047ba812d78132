"""The Triton kernels on CPU tensors under Triton's interpreter, against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from mmkd import backends, ops


@pytest.mark.parametrize("case", ["spmm", "losses", "topk", "doors"])
def test_under_the_interpreter(case, run_case):
    run_case(case, TRITON_INTERPRET="1")


def test_compile_sees_through_to_the_kernels(run_case):
    run_case("compile", TRITON_INTERPRET="0")


def test_without_the_interpreter_cpu_tensors_are_refused(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    index = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"impl='triton' cannot run bpr_kd on cpu tensors: .*TRITON_INTERPRET=1"):
        ops.bpr_loss(torch.ones(3, 4), torch.ones(3, 4), index, index, index, impl="triton")


def test_on_a_gpu_auto_takes_triton_where_the_cuda_library_is_missing(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(backends._library, "CUDA_MISSING", "not built: no nvcc found")
    assert {backends._first(op, "cuda") for op in backends.OPS if op not in backends.NO_TRITON} == {"triton"}
    assert backends.why_not("spmm", "cuda", "cuda") == "not built: no nvcc found"
    monkeypatch.setattr(backends._library, "CUDA_MISSING", None)
    monkeypatch.setattr(backends, "_KERNELS", dict.fromkeys(backends._KERNELS, True))
    assert {backends._first(op, "cuda") for op in backends.OPS} == {"cuda"}
    assert backends.report().count("timed on an H100, not yet on other GPUs") == 2


def test_interpreter_asked_for_too_late_says_so(run_python):
    done = run_python(
        "-c", "import os, triton.language; os.environ['TRITON_INTERPRET'] = '1'; import mmkd.kernels.register",
        TRITON_INTERPRET="0",
    )  # fmt: skip
    assert done.returncode != 0
    assert "set after triton was imported" in done.stderr
