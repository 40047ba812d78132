"""Memory that was freed, handed back to the system."""

from __future__ import annotations

import ctypes
import gc

import torch


def release(collect: bool = True) -> None:
    """Returns the blocks that the CPU ops keep for their next results (up to MMKD_KEEP_MB, 256 by default) and those below
    32 MB that glibc keeps; before that collects garbage, which takes a tenth of a second in a large process."""
    if collect:
        gc.collect()
    torch.ops.mmkd.release_memory()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
