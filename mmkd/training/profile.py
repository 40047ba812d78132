"""Where a training step's time goes, op by op (`mmkd train --profile`)."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from mmkd.files import write_text

log = logging.getLogger("mmkd")

WARMUP = 5  # steps before the profiled ones: first allocations, thread pools
SHARE = 0.005  # torch's ops below this share of the step are summed up in one line


class StepProfiler:
    """Times some steps, then profiles as many; writes and logs the table. Does nothing where `steps` is 0.

    An op's time is its own, without the ops it calls. Profiling costs microseconds per op, so the time of a step comes
    from the steps without it.

    Args:
        stage: its name, for the heading.
        steps: how many to time and how many to profile; fewer where the epoch is shorter.
        path: the table goes here.
    """

    def __init__(self, stage: str, steps: int, path: Path) -> None:
        self.stage, self.steps, self.path = stage, steps, path
        self._done, self._start, self._plain = 0, 0.0, 0.0
        self._profile: profile | None = None

    def __enter__(self) -> StepProfiler:
        return self

    def step(self) -> None:
        """Call after every step."""
        if not self.steps:
            return
        self._done += 1
        if self._done == WARMUP:
            self._start = time.perf_counter()
        elif self._done == WARMUP + self.steps:
            self._plain = (time.perf_counter() - self._start) / self.steps
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profile = profile(activities=activities, acc_events=True)
            self._profile.__enter__()
        elif self._done == WARMUP + 2 * self.steps:
            self._finish(self.steps)

    def __exit__(self, kind, error, traceback) -> None:
        if self._profile is not None:
            self._finish(self._done - WARMUP - self.steps, failed=kind is not None)
        elif self.steps and kind is None and self._done < WARMUP + self.steps:
            log.warning(
                "profile: an epoch of stage %s has %d steps, %d are needed; lower profile or the batch size",
                self.stage, self._done, WARMUP + self.steps + 1,
            )  # fmt: skip

    def _finish(self, profiled: int, failed: bool = False) -> None:
        done, self._profile, self.steps = self._profile, None, 0
        done.__exit__(None, None, None)
        if not failed and profiled:
            text = table(self.stage, done.key_averages(), profiled, self._plain * 1e3)
            write_text(self.path, text + "\n")
            log.info("%s", text)


def table(stage: str, events, steps: int, plain_ms: float) -> str:
    """A markdown table of the ops of a step, the most expensive first.

    Args:
        events: of `torch.profiler`, averaged by name.
        steps: how many steps they cover.
        plain_ms: milliseconds of a step without the profiler.
    """
    merged: dict[str, tuple[float, float]] = {}
    for event in events:
        own = event.self_cpu_time_total + getattr(event, "self_device_time_total", 0)
        before, calls = merged.get(name := _plain_name(event.key), (0.0, 0.0))
        merged[name] = before + own / 1e3 / steps, max(calls, event.count / steps)
    rows = sorted(((own, calls, name) for name, (own, calls) in merged.items()), reverse=True)
    total = sum(own for own, _, _ in rows)
    shown = [row for row in rows if row[0] >= SHARE * total or row[2].startswith("mmkd::")]
    rest = [row for row in rows if row not in shown]
    lines = [
        f"A step of stage {stage}: {plain_ms:.2f} ms; its ops, profiled over {steps} steps: {total:.2f} ms.",
        "",
        "| op | ms a step | share | calls a step |",
        "| --- | ---: | ---: | ---: |",
        *(f"| {name} | {own:.3f} | {own / total:.1%} | {calls:.1f} |" for own, calls, name in shown),
    ]
    if rest:
        own, calls = sum(row[0] for row in rest), sum(row[1] for row in rest)
        lines.append(f"| {len(rest)} others | {own:.3f} | {own / total:.1%} | {calls:.1f} |")
    return "\n".join(lines)


def _plain_name(key: str) -> str:
    """The op's name, also for the autograd nodes around an op and its backward."""
    name = key.removeprefix("GeneratedBackwardFor_")
    if not name.startswith("mmkd_"):
        return key
    return "mmkd::" + name.removeprefix("mmkd_").replace("_default", "").replace("Backward", "_backward")
