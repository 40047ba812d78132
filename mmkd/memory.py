"""Memory that was freed, handed back to the system."""

from __future__ import annotations

import ctypes
import gc


def release() -> None:
    """Collects garbage, and has glibc return its free blocks: it keeps those below 32 MB otherwise. Elsewhere: only the first."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
