"""Memory that was freed, handed back to the system."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch


@lru_cache
def _others() -> list[tuple[Callable[..., object], tuple]]:
    """Calls that make libraries let go: MKL of its work space, glibc of what it keeps. Those that there are."""
    torch_cpu = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    library = ctypes.CDLL(str(torch_cpu)) if torch_cpu.exists() else None
    found = [
        (getattr(library, "mkl_serv_free_buffers", None), ()),
        (getattr(ctypes.CDLL(None), "malloc_trim", None), (0,)),
    ]
    return [(call, arguments) for call, arguments in found if call is not None]


def release(collect: bool = True) -> None:
    """Returns the blocks that the CPU ops keep for their next results (up to MMKD_KEEP_MB, 256 by default), those below
    32 MB that glibc keeps and the work space of MKL's products; before that collects garbage, which takes a tenth of a second in a large process."""
    if collect:
        gc.collect()
    torch.ops.mmkd.release_memory()
    for call, arguments in _others():
        call(*arguments)
