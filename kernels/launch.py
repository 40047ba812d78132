"""Launch choices shared by the Triton kernels: configurations, block sizes, index checks."""

import os

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED and isinstance(triton.language.sum, JITFunction):
    raise ImportError("TRITON_INTERPRET=1 was set after triton was imported; set it before the first import of triton")

_tuned: dict = {}  # kernel -> (fixed, autotuned)


def tuned(kernel, configs: list[triton.Config], key: list[str]) -> None:
    """Gives `kernel` its configurations; the first is the fixed choice. `key`: arguments that start a new search."""
    _tuned[kernel] = (triton.autotune(configs[:1], key)(kernel), triton.autotune(configs, key)(kernel))


def configs_of(kernel) -> list[triton.Config]:
    """Every configuration `kernel` can run with."""
    return _tuned[kernel][1].configs


def choose(kernel):
    """The autotuned kernel, or the fixed one where results must not depend on a timing: under MMKD_TRITON_FIXED=1,
    torch.use_deterministic_algorithms(True) and the interpreter."""
    fixed, autotuned = _tuned[kernel]
    if INTERPRETED or os.environ.get("MMKD_TRITON_FIXED") == "1" or torch.are_deterministic_algorithms_enabled():
        return fixed
    return autotuned


def accumulate_type(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def block(size: int, low: int, high: int) -> int:
    """The power of two that holds `size`, within [low, high]."""
    return min(high, max(low, triton.next_power_of_2(size)))


def column_block(table: Tensor, high: int = 128) -> int:
    """Columns of `table` taken at a time: all of them up to `high`, half of that where they are loaded one by one.

    Such a column has an address and a mask of its own: as many at a time would not fit the registers.
    """
    d = table.shape[-1]
    return block(d, 16, high if d % 16 == 0 else high // 2)


def degree_bucket(entries: int) -> int:
    """Entries of a row in steps of a factor of four."""
    bucket = 0
    while entries >= 4:
        entries, bucket = entries // 4, bucket + 1
    return bucket


def degree_quantile(rowptr: Tensor, share: float = 0.9) -> int:
    """How many entries that share of the rows do not exceed. Waits for the device: once per graph, never in a step."""
    degrees = rowptr.diff()
    return int(degrees.sort().values[int(share * (degrees.numel() - 1))]) if degrees.numel() else 0


def check_index(index: Tensor, bound: int, name: str) -> None:
    """Entries in `[0, bound)`, else RuntimeError. On a GPU this costs a sync, so it is done under MMKD_CHECK=1 only."""
    if type(index) is not Tensor or torch.compiler.is_compiling():
        return  # traced: there are no numbers to look at
    if index.device.type != "cpu" and os.environ.get("MMKD_CHECK") != "1":
        return
    bad = (index < 0) | (index >= bound)
    if bool(bad.any()):
        at = int(bad.flatten().to(torch.uint8).argmax())
        raise RuntimeError(f"{name}: entry {at} is {int(index.flatten()[at])}, expected [0, {bound})")
