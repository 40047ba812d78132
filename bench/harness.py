"""Times ours and its rivals in turn, in one run, and keeps the rows of the table that `pytest bench/` prints."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch

from mmkd.memory import release

ROUNDS = int(os.environ.get("MMKD_BENCH_ROUNDS", "10"))
CALLS = 4  # timed calls of a turn, after one that is kept apart
SLOW_MS = 100.0  # what takes longer has only as many as make up
LEAST = 20  # timed calls in all
RESULTS = Path(__file__).parent / "results"


@dataclass
class Row:
    """One line of the table. Times in milliseconds; `ratio` is the fastest rival's median over ours.

    `first`: medians of the first call of every turn, which finds the caches as the rival before it left them.
    """

    op: str
    case: str
    ours_ms: float
    spread_ms: float  # interquartile range of ours
    rivals: dict[str, float | None]  # None: not installed
    ratios: dict[str, float]
    gbps: float | None = None  # bytes that must move / our time
    gflops: float | None = None
    peak_mb: dict[str, float] = field(default_factory=dict)
    target: dict[str, float] = field(default_factory=dict)  # rival -> the least ratio asked for
    first: dict[str, float] = field(default_factory=dict)  # "ours" and every rival present; empty if not kept apart
    captured: dict[str, float] = field(default_factory=dict)  # on a GPU: as a CUDA graph, without the host's work


ROWS: list[Row] = []


def sync() -> None:
    """Waits for the device, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _once(fn: Callable[[], object]) -> float:
    sync()
    start = time.perf_counter()
    fn()
    sync()
    return (time.perf_counter() - start) * 1e3


def interleaved(
    functions: dict[str, Callable[[], object]], rounds: int = ROUNDS, warmup: int = 3, calls: int = 1,
    first: dict[str, list[float]] | None = None,
) -> dict[str, list[float]]:  # fmt: skip
    """Milliseconds of each function, called in turn so that a drift of the machine hits all of them.

    Args:
        calls: timed calls of a turn; where one takes over 100 ms, as few as make 20 in all rounds.
        first: if given, every turn begins with one more call, kept here: it pays for what the function before it did to
            the caches and the allocator, which is most of the time of a call that is itself over in a fraction of a millisecond.
    """
    per_turn = {}
    for name, fn in functions.items():
        for _ in range(warmup):
            last = _once(fn)
        per_turn[name] = min(calls, -(-LEAST // rounds)) if warmup and last > SLOW_MS else calls
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, fn in functions.items():
            if first is not None:
                first.setdefault(name, []).append(_once(fn))
            times[name] += [_once(fn) for _ in range(per_turn[name])]
    return times


def peak_extra_mb(fn: Callable[[], object]) -> float:
    """How far the resident set rises above its level before the call, in MB (Linux). What the allocator keeps of freed
    memory is handed back first: a call that only used that again would show nothing."""
    release()
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")

    def read(key: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key))

    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = read("VmRSS")
    fn()
    return (read("VmHWM") - before) / 1024


def _gpu_copy() -> float | None:
    if not torch.cuda.is_available():
        return None
    import gpu

    source = torch.empty(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return round(2 * source.numel() * 4 / min(gpu.interleaved({"c": lambda: target.copy_(source)}, 7)["c"]) / 1e6, 1)


@lru_cache(maxsize=1)
def machine() -> dict:
    """What the numbers were measured on, with this machine's own copy bandwidth and GEMM rate."""
    source, n = torch.rand(1 << 26), 2048
    target, a, b = torch.empty_like(source), torch.rand(n, n), torch.rand(n, n)
    copy = min(interleaved({"copy": lambda: target.copy_(source)}, rounds=7)["copy"])
    gemm = min(interleaved({"gemm": lambda: a @ b}, rounds=7)["gemm"])
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "?",
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return {
        "cpu": cpu,
        "isa": torch.ops.mmkd.cpu_isa(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "os": platform.platform(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or "unknown",
        "copy_gbps": round(2 * source.numel() * 4 / copy / 1e6, 1),
        "gemm_gflops": round(2 * n**3 / gemm / 1e6, 1),
        "gpu_copy_gbps": _gpu_copy(),
        "date": time.strftime("%Y-%m-%d"),
    }


def compare(
    op: str,
    case: str,
    ours: Callable[[], object],
    rivals: dict[str, Callable[[], object] | None],
    *,
    moved_bytes: float | None = None,
    flops: float | None = None,
    targets: dict[str, float] | None = None,
    rounds: int = ROUNDS,
    warmup: int = 3,
    repeats: int = 1,
    calls: int = CALLS,
    memory: bool = False,
    clock: Callable[..., dict[str, list[float]]] | None = None,
    peak: Callable[[Callable[[], object]], float] = peak_extra_mb,
) -> Row:
    """Measures and records one row. A rival given as None is listed as absent. `clock`: times the functions in turn in
    place of :func:`interleaved`; on a GPU it is that of `bench/gpu.py`.
    `repeats`: how many steps one call of ours does. `calls`: timed calls of a turn, after one kept apart; 1: none apart."""
    present = {name: fn for name, fn in rivals.items() if fn is not None}
    functions, first = {"ours": ours, **present}, {}
    if clock is not None:
        times = clock(functions, rounds, warmup)
    else:
        times = interleaved(functions, rounds, warmup, calls, first if calls > 1 else None)
    times["ours"] = [t / repeats for t in times["ours"]]
    median = {name: statistics.median(t) for name, t in times.items()}
    quartiles = statistics.quantiles(times["ours"], n=4) if len(times["ours"]) > 1 else [0, 0, 0]
    row = Row(
        op, case, median["ours"], quartiles[2] - quartiles[0],
        {name: median.get(name) for name in rivals},
        {name: median[name] / median["ours"] for name in present},
        gbps=moved_bytes / median["ours"] / 1e6 if moved_bytes else None,
        gflops=flops / median["ours"] / 1e6 if flops else None,
        peak_mb={name: peak(fn) for name, fn in {"ours": ours, **present}.items()} if memory else {},
        target=targets or {},
        first={name: statistics.median(t) for name, t in first.items()},
    )  # fmt: skip
    ROWS.append(row)
    return row


def forward_backward(fn: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> Callable[[], None]:
    """A call that computes `fn`, its gradients, and drops them (as zero_grad(set_to_none=True) does).

    The gradient that comes in from outside, ones, is made in the first call: fresh pages for it are part of no op.
    """
    ones: list[torch.Tensor] = []

    def step() -> None:
        out = fn()
        if isinstance(out, tuple):
            out = out[0] + out[1]
        if out.dim() and not ones:
            ones.append(torch.ones_like(out))
        out.backward(*ones)
        for leaf in leaves:
            leaf.grad = None

    return step


def compiled(fn: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor] | None:
    """`torch.compile(fn)`, or None (listed as absent) where MMKD_BENCH_COMPILE=0 switches it off."""
    return None if os.environ.get("MMKD_BENCH_COMPILE") == "0" else torch.compile(fn)


def table() -> str:
    """The rows as fixed-width text."""
    if not ROWS:
        return ""
    where = machine()
    lines = [
        f"{where['cpu']}, {where['threads']} threads, {where['isa']}; torch {where['torch']}; copy {where['copy_gbps']} GB/s, "
        f"GEMM {where['gemm_gflops']} GFLOP/s; commit {where['commit']}",
        *([f"{where['gpu']}, copy {where['gpu_copy_gbps']} GB/s"] if where["gpu"] else []),
        f"{'op':<16}{'case':<44}{'ours ms':>9} {'±':>6}  {'GB/s':>7}{'GFLOP/s':>9}  rivals: ms (ratio) [target]",
    ]
    for r in ROWS:
        rivals = []
        for name, ms in r.rivals.items():
            goal = f" [{r.target[name]:g}x]" if name in r.target else ""
            memory = f" {r.peak_mb[name]:.1f}MB" if name in r.peak_mb else ""
            rivals.append(f"{name}: absent" if ms is None else f"{name} {ms:.2f} ({r.ratios[name]:.1f}x){goal}{memory}")
        own = f" ours {r.peak_mb['ours']:.1f}MB" if r.peak_mb else ""
        if r.captured:
            own += "; captured: " + ", ".join(f"{name} {ms:.3f}" for name, ms in r.captured.items())
        rates = f"{r.gbps:>7.1f}" if r.gbps else " " * 7
        rates += f"{r.gflops:>9.1f}" if r.gflops else " " * 9
        lines.append(f"{r.op:<16}{r.case:<44}{r.ours_ms:>9.3f} {r.spread_ms:>6.3f}  {rates}  {'; '.join(rivals)}{own}")
    return "\n".join(lines)


def save(path: Path | None = None) -> Path | None:
    """Writes the rows as JSON: to MMKD_BENCH_JSON, or bench/results/latest.json."""
    if not ROWS:
        return None
    path = path or Path(os.environ.get("MMKD_BENCH_JSON", RESULTS / "latest.json"))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"machine": machine(), "rows": [vars(r) for r in ROWS]}, indent=1) + "\n")
    os.replace(temporary, path)
    return path
