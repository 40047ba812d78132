"""Times functions on a CUDA device with events: warmed up, in turn, over rotating inputs, the L2 cache cold.

A call of a few dozen microseconds is timed with the work of the host that launches it: it is what a loop in Python pays.
As a CUDA graph (`captured`) the same call is its kernels alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

ROUNDS, WARMUP = 50, 10
FLUSH_BYTES = 256 << 20  # more than any card's L2


def why_not() -> str | None:
    """None where a CUDA device can be timed, else the reason a bench is skipped with."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def rotating(make: Callable[[int], Callable[[], object]], copies: int = 4) -> Callable[[], object]:
    """A function that calls make(0)(), make(1)(), ... in turn: different inputs every time."""
    functions, turn = [make(i) for i in range(copies)], -1

    def call() -> object:
        nonlocal turn
        turn += 1
        return functions[turn % len(functions)]()

    return call


def interleaved(
    functions: dict[str, Callable[[], object]], rounds: int = ROUNDS, warmup: int = WARMUP, cuda=torch.cuda
) -> dict[str, list[float]]:
    """Milliseconds of each function between two events, the functions in turn. The same shape as harness.interleaved.

    Nothing waits for the device between calls; the cache is overwritten before each, outside the events.
    """
    for fn in functions.values():
        for _ in range(warmup):
            fn()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=cuda.current_device())
    events: dict[str, list[tuple]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, fn in functions.items():
            flush.zero_()
            start, stop = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
            start.record()
            fn()
            stop.record()
            events[name].append((start, stop))
    cuda.synchronize()
    return {name: [start.elapsed_time(stop) for start, stop in pairs] for name, pairs in events.items()}


def peak_extra_mb(fn: Callable[[], object], cuda=torch.cuda) -> float:
    """How far torch's allocator rises above its level before the call, in MB."""
    cuda.synchronize()
    cuda.reset_peak_memory_stats()
    before = cuda.memory_allocated()
    fn()
    cuda.synchronize()
    return (cuda.max_memory_allocated() - before) / 2**20


def capturable(fn: Callable[[], object]) -> Callable[[], None] | None:
    """`captured(fn)`, or None where something in it waits for the device."""
    try:
        return captured(fn)
    except RuntimeError:
        torch.cuda.synchronize()
        return None


def captured(fn: Callable[[], object]) -> Callable[[], None]:
    """The function as a CUDA graph: what it costs without its launches' work on the host."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return graph.replay
