"""Which implementation runs for which tensor, and why not the others. `mmkd info` prints `report()`."""

from __future__ import annotations

import importlib.util
import logging
import os
import platform

import torch

from mmkd import _library

log = logging.getLogger("mmkd")

IMPLS = ("auto", "reference", "cpp", "cuda", "triton")
# op stem -> schema names that make up its compiled implementation
OPS = {
    "spmm": ("spmm", "sddmm", "csr_transpose"),
    "propagate": ("propagate", "propagate_backward"),
    "propagate_mixed": ("propagate_mixed", "propagate_mixed_backward"),
    "propagate_adamw": ("propagate_adamw",),
    "bpr_kd": ("bpr_kd", "bpr_kd_backward"),
    "list_kd": ("list_kd", "list_kd_backward", "list_scores", "list_scores_backward"),
    "emb_kd": ("emb_kd", "emb_kd_backward"),
    "distill": ("distill",),
    "distill_frozen": ("distill_frozen",),
    "student": ("student",),
    "teacher": ("teacher",),
    "topk": ("topk",),
    "frozen_teacher": ("frozen_teacher", "frozen_teacher_backward"),
    "project": ("project", "project_backward"),
}
# off the CPU the doors of these compose library products and other ops
CPU_ONLY = ("propagate_mixed", "propagate_adamw", "distill_frozen", "student", "teacher", "project")
# and of these where there is no CUDA library
NO_TRITON = (*CPU_ONLY, "frozen_teacher", "distill")
ORDER = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}
# CUDA kernels that were not yet run on a GPU: there `auto` composes, and `impl="cuda"` takes them
UNTRIED = ("frozen_teacher",)
# what is known of the GPU kernels' speed: docs/performance.md
TIMED_ON = "timed on an H100, not yet on other GPUs"
_said: set[tuple[str, str]] = set()


def _has_kernel(op: str, key: str) -> bool:
    return all(
        hasattr(torch.ops.mmkd, name) and torch._C._dispatch_has_kernel_for_dispatch_key(f"mmkd::{name}", key)
        for name in OPS[op]
    )


# Asked once, while importing: torch.compile can trace a look-up but not these calls, and every op call comes by here.
_KERNELS = {(op, key): _has_kernel(op, key) for op in OPS for key in ("CPU", "CUDA")}


@torch.compiler.assume_constant_result
def _triton_missing(op: str, device: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if importlib.util.find_spec("mmkd.kernels") is None:
        return "the package mmkd.kernels is missing: install mmkd (pip install -e .) instead of importing the folder"
    if importlib.util.find_spec(f"mmkd.kernels.{'spmm' if op == 'propagate' else op}") is None:
        return "no Triton kernel for this op in this version"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton runs on CPU tensors only with its interpreter: set TRITON_INTERPRET=1 before importing triton"
    return None


def why_not(op: str, impl: str, device: str) -> str | None:
    """None if `impl` can run `op` on tensors of `device` ("cpu" or "cuda"), else the reason."""
    if impl == "reference":
        return None
    if impl == "triton":
        return _triton_missing(op, device)
    if impl == "cpp":
        if device != "cpu":
            return "the C++ kernels take CPU tensors"
        return None if _KERNELS[op, "CPU"] else "no C++ kernel for this op in this version"
    if device != "cuda":
        return "the CUDA kernels take CUDA tensors"
    if _library.CUDA_MISSING:
        return _library.CUDA_MISSING
    return None if _KERNELS[op, "CUDA"] else "no CUDA kernel for this op in this version"


def _first(op: str, device: str) -> str:
    return next(impl for impl in ORDER[device] if why_not(op, impl, device) is None)


_AUTO = {(op, device): _first(op, device) for op in OPS for device in ORDER}


def resolve(op: str, x: torch.Tensor, impl: str = "auto") -> str:
    """The implementation that runs `op` on tensors like `x`.

    A named one that cannot run raises ValueError with the reason. `auto` prefers the compiled kernels of the
    tensor's device, then Triton, then the reference, and says so once per op and device when it had to fall back.
    """
    device = x.device.type
    if impl == "auto":
        choice = _AUTO.get((op, device), "reference")
        if not torch.compiler.is_compiling():
            _say_once(op, device, choice)
        return choice
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(IMPLS)}, got {impl!r}")
    reason = why_not(op, impl, device)
    if reason:
        raise ValueError(f"impl={impl!r} cannot run {op} on {device} tensors: {reason}")
    return impl


def _say_once(op: str, device: str, choice: str) -> None:
    if (op, device) in _said:
        return
    _said.add((op, device))
    best = ORDER.get(device, (None,))[0]
    if choice == best:
        log.info("%s on %s runs as %s", op, device, choice)
    else:
        reason = why_not(op, best, device) if best else f"no kernels for {device}"
        log.warning("%s on %s runs as %s, not %s: %s", op, device, choice, best, reason)


def _used(op: str, device: str) -> str:
    """What `auto` takes, as a word for people."""
    composed = op in UNTRIED or (op in NO_TRITON and _AUTO[op, device] != "cuda")
    return "composed" if device != "cpu" and composed else _AUTO[op, device]


def report() -> str:
    """Versions, what is built and loaded, which implementation each op uses, and why not the others."""
    import mmkd

    built = _library.build_info()
    cuda = _library.CUDA_MISSING or f"loaded ({TIMED_ON}; never run: {', '.join(UNTRIED)}, which auto leaves alone)"
    triton = importlib.util.find_spec("triton")
    triton_version = f"{__import__('triton').__version__} (kernels {TIMED_ON})" if triton else "not installed"
    lines = [
        f"mmkd      {mmkd.__version__}",
        f"python    {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch     {torch.__version__} (built against {built.get('torch')}, stable ABI >= 2.10), {torch.get_num_threads()} threads",
        f"triton    {triton_version}",
        f"compiler  {built.get('compiler')}",
        f"cpu       kernels for {', '.join(built.get('cpu_isas', []))}; this processor uses {torch.ops.mmkd.cpu_isa()} (MMKD_CPU_ISA overrides)",
        f"cuda      {cuda}",
        "",
    ]
    for device in ("cpu", "cuda"):
        if device == "cuda" and not torch.cuda.is_available():
            taken = ", ".join(f"{op} {_used(op, device)}" for op in OPS if op not in CPU_ONLY)
            lines.append(f"cuda tensors: torch sees no CUDA device; beside one, auto would take: {taken}")
            continue
        lines.append(f"{device} tensors:")
        for op in OPS if device == "cpu" else [op for op in OPS if op not in CPU_ONLY]:
            used = _used(op, device)
            others = "; ".join(
                f"{i}: {why_not(op, i, device) or 'available'}" for i in IMPLS[1:] if i != used and i != "reference"
            )
            lines.append(f"  {op:<15} {used:<10} ({others})")
    return "\n".join(lines)
