"""Builds the CUDA sources for the CPU executor (csrc/simt) and runs the cases under the sanitizers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]
CASES = Path(__file__).parent / "cases"


def cuda_include() -> Path | None:
    """The toolkit's include folder: the sources need its vector types and 16-bit floats, not its compiler."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        homes.append(str(Path(nvcc).resolve().parents[1]))
    for home in homes:
        if home and (Path(home) / "include" / "cuda_bf16.h").exists():
            return Path(home) / "include"
    return None


@lru_cache(maxsize=1)
def library() -> Path:
    """The library of `mmkd_simt` ops with both sanitizers in, built where it is missing or old."""
    include = cuda_include()
    if include is None:
        pytest.skip("no CUDA toolkit headers: set CUDA_HOME")
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("cmake and ninja are needed to build the executor of the CUDA kernels")
    build = ROOT / "build" / "cmake-simt"
    configure = [
        "cmake", "-S", str(ROOT / "csrc" / "simt"), "-B", str(build), "-G", "Ninja",
        f"-DMMKD_TORCH_INCLUDE={';'.join(cpp_extension.include_paths())}",
        f"-DMMKD_TORCH_LIB={';'.join(cpp_extension.library_paths())}",
        f"-DMMKD_CUDA_INCLUDE={include}",
    ]  # fmt: skip
    for command in (configure, ["cmake", "--build", str(build)]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    return build / "libmmkd_simt.so"


def runtime(name: str) -> str:
    """Path of a sanitizer's runtime library."""
    compiler = os.environ.get("CXX", "g++")
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(found):
        pytest.skip(f"{compiler} has no {name}")
    return os.path.realpath(found)


def kernels() -> dict[int, str]:
    """address -> name of every kernel in the library, template arguments and all."""
    if shutil.which("nm") is None:
        pytest.skip("no nm to list the kernels with")
    listed = subprocess.run(["nm", "-C", "--defined-only", str(library())], capture_output=True, text=True, check=True)
    kernel = (
        r"^(\w+) \w (?:void )?mmkd::cuda::\(anonymous namespace\)::(\w+_kernel\b[^(]*)\([^()]*\)$"  # not its lambdas
    )
    return {int(address, 16): name for address, name in re.findall(kernel, listed.stdout, re.M)}


def run(arguments: list[str], timeout: float = 600, **environment: str) -> subprocess.CompletedProcess:
    """Python under both sanitizers, with the library's path in MMKD_SIMT_LIBRARY. Fresh memory is filled with 0xff:
    NaN in every floating-point type."""
    environment = dict(
        {**os.environ, **environment},
        MMKD_SIMT_LIBRARY=str(library()),
        # libstdc++ too: the sanitizer looks for its throw when the process starts
        LD_PRELOAD=f"{runtime('libasan.so')} {runtime('libstdc++.so')}",
        ASAN_OPTIONS="detect_leaks=0:max_malloc_fill_size=100000000:malloc_fill_byte=255:abort_on_error=0",
        UBSAN_OPTIONS="print_stacktrace=1",
        OMP_NUM_THREADS="1",
        PYTHONPATH=os.pathsep.join([str(ROOT), str(CASES)]),
    )
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )
