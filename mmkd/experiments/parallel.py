"""Runs side by side: a process each, with its share of the threads."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from mmkd.data import DataWarning
from mmkd.training import RunStopped, Stop

if TYPE_CHECKING:
    from multiprocessing.synchronize import Event

    from mmkd.experiments.cells import Study

# Of a worker: what it works on, whether no more calls are wanted, and whether it is in one.
_study: Study
_over: Event
_busy = False


def side_by_side(
    study: Study, function: Callable[..., Any], arguments: Sequence[tuple], what: str = "runs",
    then: Callable[..., Any] | None = None,
) -> None:  # fmt: skip
    """Calls `function(study, *a)` for every `a`, `study.jobs` at a time, each in a process that loads the data itself.

    What the calls return is dropped: they leave their results in the study's folder. `then(*a)` is called here when one
    is done, in the order they end. Small models gain little from a
    second thread, so on two cores two processes of one thread get nearly twice as far as one of two.

    Raises:
        What the first call that failed raised; the others are stopped at their next step, and their runs can go on later.
    """
    others = set(multiprocessing.active_children())
    share = max(1, (study.config.threads or torch.get_num_threads()) // study.jobs)
    context = multiprocessing.get_context("spawn")
    over = context.Event()
    start = (study, over, share, logging.getLogger().getEffectiveLevel())
    with ProcessPoolExecutor(study.jobs, mp_context=context, initializer=_begin, initargs=start) as pool:
        futures = {}
        try:
            futures.update((pool.submit(_call, function, a), a) for a in arguments)
            for done in tqdm(as_completed(futures), total=len(futures), desc=what, unit="run", dynamic_ncols=True):
                done.result()
                if then is not None:
                    then(*futures[done])
        except BaseException:
            over.set()  # some calls are with the workers already, where they cannot be cancelled
            for future in futures:
                future.cancel()
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()  # a run that is under way saves a checkpoint first
            raise


def _begin(study: Study, over: Event, threads: int, level: int) -> None:
    global _study, _over
    _study, _over = study, over
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent passes it on
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # outside a call; a worker that died would take the others with it
    logging.basicConfig(level=level, format="%(message)s")
    warnings.filterwarnings("ignore", category=DataWarning)  # every worker would say the same of the same files
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed cannot stop its workers, so they look themselves."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        _over.set()
        os.kill(os.getpid(), signal.SIGTERM)
        while _busy:
            time.sleep(0.1)
        os._exit(1)


def _call(function: Callable[..., Any], arguments: tuple) -> None:
    global _busy
    _busy = True
    stop = _study.stop = Stop()
    # Once: the signal may come from the parent and from whoever signals the group, and a second one would not wait.
    signal.signal(signal.SIGTERM, lambda *_: None if stop.requested else stop.request())
    try:
        if _over.is_set():
            raise RunStopped("stopped before it began")
        function(_study, *arguments)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _busy = False
