"""Loads the compiled libraries, and says exactly what is wrong when one cannot be loaded."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import sys
from pathlib import Path

import torch

# MMKD_OUT: where another build (make test-asan) put its libraries.
OUT = Path(os.environ.get("MMKD_OUT") or Path(__file__).parent)
LIB = OUT / "lib"
REBUILD = "Rebuild it against this environment's torch: pip install --no-deps --force-reinstall mmkd (or, in a checkout, pip install -e .)"


def build_info() -> dict:
    """What the installed libraries were built with, as written by CMake; empty when nothing was built."""
    path = LIB / "build.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _load(path: Path) -> None:
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        built = build_info().get("torch", "unknown")
        raise ImportError(
            f"mmkd: {path.name} was built for torch {built}, found torch {torch.__version__}; the loader says: {error}. {REBUILD}"
        ) from error


def load_cpu() -> None:
    """Loads the op schemas and the CPU kernels. Without them there is no package: ImportError with the fix."""
    path = LIB / "libmmkd_cpu.so"
    if not path.exists():
        raise ImportError(
            f"mmkd: the compiled library {path.name} is missing from {LIB}: the package was not built. {REBUILD}"
        )
    _load(path)


def load_host() -> None:
    """Loads the C++ over NumPy arrays as `mmkd._host`; ImportError with the fix where it is missing."""
    spec = importlib.machinery.PathFinder.find_spec("mmkd._host", [str(OUT)])
    if spec is None or spec.loader is None:
        raise ImportError(
            f"mmkd: the compiled module _host is missing from {OUT}: the package was not built. {REBUILD}"
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["mmkd._host"] = module


def load_cuda() -> str | None:
    """Loads the CUDA kernels where torch has CUDA. Returns None when loaded, else the reason."""
    if os.environ.get("MMKD_CUDA", "auto") == "off":
        return "switched off by MMKD_CUDA=off"
    path = LIB / "libmmkd_cuda.so"
    if not path.exists():
        return build_info().get("cuda", "not built")
    if torch.version.cuda is None:
        return f"built, not loaded: torch {torch.__version__} has no CUDA"
    _load(path)
    return None


load_cpu()
load_host()
CUDA_MISSING = load_cuda()
