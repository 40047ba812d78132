"""Floors, measured: what an op cannot be quicker than on this machine, timed beside it and its rivals.

They stand among the rivals as "floor: ...", without a target, and their ratio is below 1. What reads rows is `floor.cpp`, compiled
when it is first asked for; without a C++ compiler it is listed as absent.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

WAYS = range(4)  # of prefetching: none, beginnings of rows, rows, rows twice; the quickest one counts


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        return None
    folder = Path(tempfile.mkdtemp(prefix="mmkd-floor-"))
    source, built = Path(__file__).with_name("floor.cpp"), folder / "floor.so"
    flags = ["-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
    done = subprocess.run([compiler, *flags, str(source), "-o", str(built)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{source}: {done.stderr.strip()}")
    library = ctypes.CDLL(str(built))
    shutil.rmtree(folder)
    pointer, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.floor_read.argtypes = [pointer, pointer, long, integer, integer, integer]
    library.floor_step.argtypes = [pointer, pointer, pointer, long, integer]
    library.floor_read.restype = library.floor_step.restype = None
    return library


def rows_read(parts: Iterable[tuple[Tensor, Tensor]]) -> Callable[[], None] | None:
    """A call that reads rows of tables one after another and makes nothing of them.

    Args:
        parts: `(table, index)`: `[n, d]` of 128 or 256 bytes a row, and int32 rows of it in the order they are read.
    """
    library, parts = _library(), list(parts)
    if library is None:
        return None
    for table, index in parts:
        if table.stride(0) * table.element_size() not in (128, 256) or index.dtype != torch.int32:
            raise ValueError(f"expected rows of 128 or 256 bytes and an int32 index, got {table.shape}, {index.dtype}")

    def read(way: int) -> None:
        for table, index in parts:
            lines = table.stride(0) * table.element_size() // 64
            library.floor_read(table.data_ptr(), index.data_ptr(), index.numel(), lines, way, torch.get_num_threads())

    quickest = _quickest(read)
    return lambda: read(quickest)


def _quickest(read: Callable[[int], None]) -> int:
    least = {}
    for way in [*WAYS] * 4:
        start = time.perf_counter()
        read(way)
        least[way] = min(least.get(way, float("inf")), time.perf_counter() - start)
    return min(least, key=least.__getitem__)


def step_of(tables: list[Tensor]) -> Callable[[], None] | None:
    """A call that reads and writes three float32 tables, as AdamW must."""
    library = _library()
    if library is None:
        return None
    return lambda: library.floor_step(*(t.data_ptr() for t in tables), tables[0].numel(), torch.get_num_threads())


def both(*calls: Callable[[], None] | None) -> Callable[[], None] | None:
    """One after the other; absent if one is."""
    if any(call is None for call in calls):
        return None

    def run() -> None:
        for call in calls:
            call()

    return run


def propagation(graph, rows: Tensor | None, dim: int) -> list[tuple[Tensor, Tensor]]:
    """What two layers of propagation read, forward and backward: with `rows`, the last layer for them and the first one back
    from them."""
    first, second = (torch.randn(graph.num_nodes, dim) for _ in range(2))
    everything = graph.col
    if rows is None:
        return [(first, everything), (second, everything), (first, everything), (second, everything)]
    ones = np.ones(graph.col.numel(), np.int8)
    size = (graph.num_nodes, graph.num_nodes)
    listed = sparse.csr_matrix((ones, graph.col.numpy(), graph.rowptr.numpy()), size)[rows.numpy()]
    back = listed.T.tocsr()
    back.sort_indices()
    onwards, backwards = (torch.from_numpy(m.indices.astype(np.int32)) for m in (listed, back))
    return [(first, everything), (second, onwards), (torch.randn(len(rows), dim), backwards), (second, everything)]


def spread(graph, item_rows, modalities: int, dim: int) -> list[tuple[Tensor, Tensor]]:
    """What one layer of `R_hat` and `R_hat^T` over features reads, forward and backward, where the second is wanted for the items
    of `item_rows` alone: rows `modalities * dim` wide, as so many rows of `dim` one after the other."""
    wide = torch.arange(modalities, dtype=torch.int32)

    def rows(count: int, index: Tensor) -> tuple[Tensor, Tensor]:
        return torch.randn(count * modalities, dim), (index[:, None] * modalities + wide).flatten().contiguous()

    forward = rows(graph.num_items, graph.user_col), rows(graph.num_users, item_rows.col)
    return [*forward, rows(len(item_rows.items), item_rows.user_col), rows(graph.num_users, graph.item_col)]


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, grads, *tables):
        ctx.grads = grads
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        return None, None, *(g.detach() for g in ctx.grads)  # of their own, so that nobody copies them


def call_alone(leaves: list[Tensor]) -> Callable[[], Tensor]:
    """A loss over `leaves` that computes nothing: an `autograd.Function` whose gradients are there already, and never change.
    What is left is what PyTorch takes for any op that is called from Python."""
    loss, grads = torch.ones(()), [torch.zeros_like(leaf) for leaf in leaves]
    return lambda: _Nothing.apply(loss, grads, *leaves)
