"""libmmkd_cuda.so as it is built here: it loads, implements every schema, and its fast paths are what they claim."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import lru_cache

import gpu_report
import gpu_report_cuda
import pytest
import torch

from mmkd import _library, backends

LIBRARY = _library.LIB / "libmmkd_cuda.so"

built = pytest.mark.skipif(
    not LIBRARY.exists(), reason=f"no CUDA library: {_library.build_info().get('cuda', 'not built')}"
)


@built
def test_it_loads_without_cuda_and_implements_every_schema():
    """With a CPU torch too: nothing of torch's CUDA libraries is linked."""
    script = f"""
import json, torch, mmkd
torch.ops.load_library({str(LIBRARY)!r})
schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("mmkd::")]
names = [s.name for s in schemas if any("Tensor" in str(a.type) for a in s.arguments)]
key = torch._C._dispatch_has_kernel_for_dispatch_key
print(json.dumps({{n: key(n, "CUDA") for n in names}}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    implemented = json.loads(done.stdout.splitlines()[-1])
    missing = {name.removeprefix("mmkd::") for name, there in implemented.items() if not there}
    assert len(implemented) >= 19 and missing == {name for op in backends.CPU_ONLY for name in backends.OPS[op]}, (
        implemented
    )


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA")
def test_a_cpu_torch_is_told_why_there_are_no_cuda_kernels():
    reason = backends.why_not("spmm", "cuda", "cuda")
    assert reason and ("has no CUDA" in reason or "not built" in reason or "off" in reason)


@lru_cache(maxsize=1)
def rows() -> list[dict]:
    if gpu_report_cuda.tool("cuobjdump") is None or gpu_report_cuda.tool("nvdisasm") is None:
        pytest.skip("no cuobjdump and nvdisasm: neither in CUDA's folder nor among triton's")
    return gpu_report_cuda.rows(LIBRARY)


@built
def test_fast_paths_spill_nothing_and_keep_nothing_on_the_stack():
    fast = [r for r in rows() if r["fast"]]
    assert {r["kernel"] for r in fast} >= {
        "spmm_kernel", "sddmm_kernel", "bpr_forward_kernel", "bpr_backward_kernel", "list_forward_kernel",
        "list_backward_kernel", "emb_forward_kernel", "emb_backward_kernel", "topk_kernel",
    }  # fmt: skip
    bad = [r for r in fast if r["spill_bytes"] or r["stack_bytes"] or r["local_accesses"]]
    assert not bad, bad


@built
def test_fast_paths_load_128_bits_at_a_time():
    bad = [r for r in rows() if r["fast"] and r["global_load_width"] != 128]
    assert not bad, bad


@built
def test_every_architecture_has_every_kernel():
    archs = {r["arch"] for r in rows()}
    per_arch = {a: sorted((r["kernel"], r["config"]) for r in rows() if r["arch"] == a) for a in archs}
    assert len({json.dumps(v) for v in per_arch.values()}) == 1
    assert archs <= set(gpu_report.ARCHS)
    assert {r["shared_bytes"] for r in rows() if r["kernel"] == "merge_kernel"} == {0}  # the system's is not counted


@built
def test_the_page_lists_every_kernel():
    """docs/gpu.md is older than the kernels where this fails: `make gpu-report`."""
    page = gpu_report.OUT.read_text()
    names = {(r["kernel"] + (" *" if r["fast"] else ""), r["config"] or "-") for r in rows()}
    assert not [n for n in names if f"| CUDA | {n[0]} | {n[1]} | 80-90 |" not in page]


def test_the_page_is_written_and_calls_predictions_predictions():
    row = {
        "op": "spmm", "kernel": "spmm_kernel", "config": "float32 x4", "fast": True, "arch": "sm_86", "block": 128,
        "registers": 72, "shared_bytes": 0, "spill_bytes": 0, "stack_bytes": 0, "global_load_width": 128,
    }  # fmt: skip
    triton = [dict(row, config="fp32 D=64 warps=2", arch=arch) for arch in ("sm_86", "gfx942", "sm_86")]
    text = gpu_report.page([dict(row, arch=arch, registers=n) for arch, n in (("sm_86", 72), ("sm_90", 80))], triton)
    assert "No number on this page was measured" in text and "They are predictions" in text
    assert "| spmm | CUDA | spmm_kernel * | float32 x4 | 86, 90 | 72 / 80 | 0 | 0 | 0 | 128 |" in text
    assert text.count("| spmm | Triton | spmm_kernel * | fp32 D=64 warps=2 | 86") == 2  # one with gfx942, one by itself
    assert all(card.name in text for card in gpu_report.CARDS)


def test_occupancy_of_known_cases():
    """72 registers: 28 warps of 48 fit the registers of an sm_86; blocks of 4 warps."""
    arch = gpu_report.ARCHS["sm_86"]
    assert gpu_report.occupancy(32, 0, 128, arch) == 1.0
    assert gpu_report.occupancy(72, 0, 128, arch) == 28 * 32 / 1536
    assert gpu_report.occupancy(32, 50_000, 128, arch) == 2 * 128 / 1536


def test_mangled_names_are_read():
    name = "_ZN4mmkd4cuda49_GLOBAL__N__6be246ec_16_bpr_kd_kernel_cu_2542e2bf19bpr_backward_kernelI6__halfLi8EEEvNS0_7BprArgsE"
    assert gpu_report_cuda.parse_function(name) == {
        "op": "bpr_kd", "kernel": "bpr_backward_kernel", "config": "float16 x8", "fast": True,
    }  # fmt: skip
    flat = name.replace("6bpr_kd_kernel", "4spmm_kernel").replace(
        "19bpr_backward_kernelI6__halfLi8EE", "11spmm_kernelI6__halfLi8ELb1EE"
    )
    assert gpu_report_cuda.parse_function(flat)["config"] == "float16 x8 flat"
    assert gpu_report_cuda.parse_function(flat.replace("Lb1E", "Lb0E"))["config"] == "float16 x8"
    name = "_ZN4mmkd4cuda47_GLOBAL__N__9555fbd2_14_spmm_kernel_cu_ea55aad011plan_kernelENS0_3CsrElPl"
    assert gpu_report_cuda.parse_function(name)["config"] == ""
