"""The CUDA kernels' rows of docs/gpu.md: static facts read from the machine code in libmmkd_cuda.so."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

LIBRARY = Path(__file__).parents[1] / "mmkd" / "lib" / "libmmkd_cuda.so"
ELEMENTS = {
    "f": "float32",
    "d": "float64",
    "6__half": "float16",
    "13__nv_bfloat16": "bfloat16",
    "i": "int32",
    "l": "int64",
}
# Threads of a block, and dynamic shared memory at the paper's sizes (K = 11, k = 20), of a kernel or of one with a flag.
BLOCK = {"topk_kernel": 256, "combine_kernel": 256} | dict.fromkeys(
    ("frozen_forward_kernel", "frozen_rows_kernel", "frozen_outer_kernel", "frozen_sum_kernel"), 256
)
DYNAMIC_SHARED = {
    "list_forward_kernel": 4 * 11 * 4, "list_backward_kernel": 4 * 11 * 4,
    "distill_kernel": 4 * 2 * 11 * 4,
    "frozen_forward_kernel": 4 * (4228 + 8 * 656), "frozen_rows_kernel": 4 * (4228 + 8 * 656),  # e = 65, d = 64
    "topk_kernel few": 64 * (20 + 32) * 8, "topk_kernel float64 x1": 64 * 20 * 12,
}  # fmt: skip
# What the compiler counts of the system's own shared memory where a kernel has any; `gpu_report.occupancy` adds it for every architecture.
SYSTEM_SHARED = {"sm_90": 1024}
_FUNCTION = re.compile(r"_\d+_(\w+)_kernel_cu_[0-9a-f]{8}(\d+)(\w+)")
_ARGUMENTS = re.compile(r"^I(f|d|i|l|6__half|13__nv_bfloat16)(?:Li(\d+)E)?(?:Lb([01])E)?E")
# what a kernel's third argument says where it is true
FLAGS = {"spmm_kernel": "flat", "topk_kernel": "few"}


def tool(name: str) -> str | None:
    """Path of a CUDA binary utility: on PATH, in CUDA's folder, or among those that come with triton."""
    if found := shutil.which(name):
        return found
    folders = [Path("/usr/local/cuda/bin")]
    if spec := importlib.util.find_spec("triton"):
        folders.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin")
    return next((str(f / name) for f in folders if (f / name).exists()), None)


def parse_function(mangled: str) -> dict:
    """op, kernel and configuration from a mangled name: the kernels are templates over (element type, width, flag)."""
    op, length, rest = _FUNCTION.search(mangled).groups()
    kernel, arguments = rest[: int(length)], _ARGUMENTS.match(rest[int(length) :])
    element, width, flag = arguments.groups() if arguments else (None, None, None)
    config = ELEMENTS.get(element, "")
    if width:
        config += f" x{width}"
    if flag == "1":
        config += f" {FLAGS[kernel]}"
    return {"op": op, "kernel": kernel, "config": config, "fast": bool(width) and int(width) > 1}


def _lines(library: Path, option: str) -> Iterator[str]:
    cuobjdump = tool("cuobjdump")
    if cuobjdump is None:
        raise FileNotFoundError("cuobjdump: not on PATH, not in /usr/local/cuda/bin, not among triton's")
    process = subprocess.Popen([cuobjdump, option, str(library)], stdout=subprocess.PIPE, text=True)
    with process:
        yield from process.stdout
    if process.returncode:
        raise RuntimeError(f"cuobjdump {option} {library} failed with {process.returncode}")


def _resources(library: Path) -> dict[tuple[str, str], dict]:
    found, arch, function = {}, "", ""
    for line in _lines(library, "--dump-resource-usage"):
        if match := re.match(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            function = match[1]
        elif "REG:" in line:
            numbers = dict(re.findall(r"(\w+):(\d+)", line))
            found[arch, function] = {
                "registers": int(numbers["REG"]),
                "shared_bytes": max(0, int(numbers["SHARED"]) - SYSTEM_SHARED.get(arch, 0)),
                "stack_bytes": int(numbers["STACK"]) + int(numbers["LOCAL"]),
            }
    return found


def _instructions(library: Path) -> dict[tuple[str, str], dict]:
    """Per function: the widest global load in bits, how many of each width, accesses to local memory."""
    found, arch, now = {}, "", None
    load = re.compile(r"\bLDG\.(\S+)")
    for line in _lines(library, "-sass"):
        if "Function :" in line:
            now = found[arch, line.split(":")[1].strip()] = {"loads": {}, "local": 0}
        elif line.startswith("arch = "):
            arch = line.split("=")[1].strip()
        elif now is None:
            continue
        elif match := load.search(line):
            width = next((w for w in (128, 64) if f".{w}" in f".{match[1]}"), 32)
            now["loads"][width] = now["loads"].get(width, 0) + 1
        elif " LDL" in line or " STL" in line:
            now["local"] += 1
    return found


def rows(library: Path = LIBRARY) -> list[dict]:
    """One row per kernel, configuration and architecture: op, kernel, config, fast, arch, block, registers,
    shared_bytes, spill_bytes, stack_bytes, global_load_width, loads, local_accesses."""
    resources, instructions = _resources(library), _instructions(library)
    out = []
    for (arch, function), facts in resources.items():
        name = parse_function(function)
        code = instructions[arch, function]
        flag = next((f" {flag}" for flag in FLAGS.values() if name["config"].endswith(flag)), "")
        keys = (name["kernel"], name["kernel"] + flag, f"{name['kernel']} {name['config']}")
        facts["shared_bytes"] += next((DYNAMIC_SHARED[key] for key in keys if key in DYNAMIC_SHARED), 0)
        out.append(
            {
                **name,
                "arch": arch,
                "block": BLOCK.get(name["kernel"], 128),
                **facts,
                # What is spilled lives on the stack: none of the one, none of the other.
                "spill_bytes": facts["stack_bytes"] if code["local"] else 0,
                "global_load_width": max(code["loads"], default=0),
                "loads": code["loads"],
                "local_accesses": code["local"],
            }
        )
    return sorted(out, key=lambda r: (r["op"], r["kernel"], r["config"], r["arch"]))


if __name__ == "__main__":
    json.dump(rows(), sys.stdout, indent=1)
