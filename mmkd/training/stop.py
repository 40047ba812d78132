"""Stopping on purpose: SIGTERM and Ctrl-C end a run after the step at hand, with a checkpoint."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


class RunStopped(Exception):
    """Training was asked to stop and did; the message says what was kept and how to go on."""


class StoppedAtStep(RunStopped):
    """The same, raised between two steps: weights, optimizer and counters belong together and may be saved."""


class Stop:
    """A request to stop. Code that can leave at a point of its own choosing runs under `held()` and looks at `requested`;
    everywhere else :meth:`request` raises :class:`RunStopped` at once, from within the signal handler."""

    def __init__(self) -> None:
        self.requested = False
        self._held = False

    def request(self, *_: object) -> None:
        """Ask for the stop; asked a second time, it is not waited for the end of a step. Usable as a signal handler."""
        again, self.requested = self.requested, True
        if again or not self._held:
            raise RunStopped("stopped before the next step; the last checkpoint holds")

    @contextlib.contextmanager
    def held(self) -> Iterator[Stop]:
        """In here a request waits until the code looks, or until the end."""
        self._held = True
        try:
            yield self
        finally:
            self._held = False
        if self.requested:
            raise RunStopped("stopped at the end of a stage, which is saved")


@contextlib.contextmanager
def stop_on_signals(*signals: signal.Signals) -> Iterator[Stop]:
    """A :class:`Stop` that the signals (default SIGTERM and SIGINT) ask for; the handlers before are put back."""
    stop = Stop()
    before = {number: signal.signal(number, stop.request) for number in signals or (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
