"""What the fault tests run in processes of their own, which are forked from a server that has everything imported."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import torch

import mmkd
from mmkd.data import convert, load
from mmkd.serving import export
from mmkd.training import summary

SETTINGS = {
    "dim": 8, "progress": False, "checkpoint_every": 1, "baselines": ["popularity", "lightgcn"], "threads": 1,
    "teacher": {"epochs": 3, "eval_every": 1, "batch_size": 128, "layers": 2},
    "student": {"epochs": 3, "eval_every": 1, "batch_size": 128, "layers": 2},
    "lightgcn": {"epochs": 2, "eval_every": 1, "batch_size": 128}, "evaluation": {"ks": [20]},
    "data": {"path": "synthetic", "options": {"num_users": 60, "num_items": 50, "num_interactions": 900}},
}  # fmt: skip
_FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["tests.faults.jobs", "faiss", "pyarrow.parquet", "mmkd.cli", "pytest"])


def train(folder: Path, **settings) -> None:
    """A small run, new or resumed."""
    torch.set_num_threads(1)
    summary.plot_curves = lambda *_: False  # a quarter of the time, and no part of what is tested
    mmkd.train({**SETTINGS, **settings}, out=folder, resume=True)


def update(run: Path, new: Path, folder: Path) -> None:
    """`mmkd update`, new or resumed."""
    torch.set_num_threads(1)
    sys.modules["mmkd.training.incremental"].plot_curves = lambda *_: False
    mmkd.update(
        run, new, out=folder, resume=True, overrides=["update.epochs=4", "update.batch_size=32", "progress=false"]
    )


def cli(folder: Path, *arguments: str) -> None:
    """`mmkd ...`, as a process with that exit code."""
    from mmkd.cli import app

    torch.set_num_threads(1)
    with open(folder / "output.txt", "a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        app(list(arguments))


def export_run(run: Path, to: str, path: Path) -> None:
    """`mmkd export`."""
    torch.set_num_threads(1)
    export(run, to, path)


def converted(source: Path, to: str, out: Path) -> None:
    """`mmkd data --convert`."""
    convert(load(source), out, to)


def killed_at(event: int | None, folder: Path, report: Path | None, job, *arguments) -> None:
    """Runs a job that is killed when it starts its `event`-th operation on a file under `folder`; reports how many it did."""
    count = 0

    def hook(name: str, arguments: tuple) -> None:
        nonlocal count
        named = name in _FILE_EVENTS and isinstance(arguments[0], (str, os.PathLike))
        if named and os.fspath(arguments[0]).startswith(os.fspath(folder)):
            count += 1
            if count == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    job(*arguments)
    if report is not None:
        report.write_text(json.dumps(count))


def result_of(report: Path, prepare, job, *arguments) -> None:
    """Runs a job after `prepare()`; writes the exception it ended with, as [class, text]."""
    with open(report, "w", buffering=1) as file:  # opened before `prepare` takes rights or space away
        try:
            prepare()
            job(*arguments)
        except Exception as error:
            file.write(json.dumps([type(error).__name__, str(error)]))


def small_files() -> None:
    """From now on no file of this process can grow beyond 3 kB."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))


def as_nobody() -> None:
    """From now on this process has no more rights than anybody."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
