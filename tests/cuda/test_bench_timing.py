"""The timing of bench/gpu.py with a device that only counts: the order of calls, what is timed, what is not."""

from __future__ import annotations

from types import SimpleNamespace

import gpu
import torch


class FakeCuda(SimpleNamespace):
    """A clock that only functions advance."""

    def __init__(self):
        super().__init__(now=0.0, waits=0)
        clock = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = clock.now

            def elapsed_time(self, other):
                return other.at - self.at

        self.Event = Event

    def current_device(self):
        return "cpu"

    def synchronize(self):
        self.waits += 1


def test_functions_are_timed_in_turn_between_events(monkeypatch):
    monkeypatch.setattr(gpu, "FLUSH_BYTES", 8)
    cuda, calls = FakeCuda(), []

    def work(name, ms):
        def run():
            calls.append(name)
            cuda.now += ms

        return run

    times = gpu.interleaved({"ours": work("ours", 2.0), "eager": work("eager", 5.0)}, rounds=3, warmup=2, cuda=cuda)
    assert times == {"ours": [2.0] * 3, "eager": [5.0] * 3}
    assert calls == ["ours"] * 2 + ["eager"] * 2 + ["ours", "eager"] * 3
    assert cuda.waits == 1


def test_inputs_rotate():
    seen = []
    call = gpu.rotating(lambda i: lambda: seen.append(i), copies=3)
    for _ in range(4):
        call()
    assert seen == [0, 1, 2, 0]


def test_the_reason_for_a_skip_names_what_is_missing():
    reason = gpu.why_not()
    assert (reason is None) == torch.cuda.is_available()
    assert reason is None or "CUDA" in reason
