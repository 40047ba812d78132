"""Every Triton kernel and configuration compiled for GPUs that are not there."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter

import pytest

ARCHS = {"sm_80", "sm_86", "sm_89", "sm_90", "gfx942"}
# those that move rows of embeddings: 16 bytes at a time. bpr_kd_scatter on AMD waits for its atomics anyway.
MOVES_ROWS = {
    "spmm_rows", "spmm_pieces", "sddmm", "scatter_segments", "bpr_kd", "bpr_kd_scatter", "list_kd", "list_kd_scatter",
    "list_scores", "list_scores_scatter", "emb_kd", "emb_kd_backward", "score_groups", "group_maxima",
}  # fmt: skip


@pytest.fixture(scope="session")
def rows(run_python):
    done = run_python("tools/gpu_report_triton.py", TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_every_kernel_and_configuration_compiles_for_every_target(rows):
    """Tables of every type, optional inputs left out, odd sizes."""
    seen = Counter((r["kernel"], r["config"], r["arch"]) for r in rows)
    lines = {(kernel, config) for kernel, config, _ in seen}
    assert len(lines) >= 150 and {arch for *_, arch in seen} == ARCHS
    for line in lines:
        assert len({seen[(*line, arch)] for arch in ARCHS}) == 1, line


@pytest.mark.slow
def test_every_table_type_and_the_odd_sizes_compile(rows):
    for start, without in (
        ("fp32", set()),
        ("bf16", set()),
        ("fp16", set()),
        ("fp64", {"score_groups", "group_maxima"}),  # ranked by torch
        ("d=65", set()),
        ("d=1 B=1 M=1", {"spmm_pieces"}),  # one row is not cut
        ("d=128 K=64", {"bpr_kd_scatter", "score_groups", "group_maxima"}),  # the same kernels as for d = 64
    ):
        assert MOVES_ROWS - {r["kernel"] for r in rows if r["config"].startswith(start)} == without, start


@pytest.mark.slow
def test_nothing_spills(rows):
    spilled = [r for r in rows if r["spill_bytes"] or r["stack_bytes"]]
    assert not spilled


@pytest.mark.slow
def test_rows_are_loaded_sixteen_bytes_at_a_time(rows):
    narrow = [
        r
        for r in rows
        if r["kernel"] in MOVES_ROWS and r["arch"].startswith("sm_") and r["global_load_width"] < 128
        if not r["config"].startswith("d=")  # 65 columns are not a multiple of 16 bytes
    ]
    assert not narrow


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_recorded_launches_cover_every_kernel(run_python):
    code = """
from mmkd.kernels import aot, launch
names = {v.kernel for v in aot.variants()}
print([k.__name__ for k in launch._tuned if k not in names])
"""
    done = run_python("-c", code, TRITON_INTERPRET="0")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
