"""The run folder: everything one run was told, did and left behind, each file whole or absent."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
import yaml

from mmkd.config import Config, load_config, read_yaml
from mmkd.data import Dataset, load_configured
from mmkd.files import append_line, make_folder, sweep, write_atomic, write_json, write_text
from mmkd.training.loggers import Logger, Loggers

# Parts of the package that change no number of a run.
NOT_TRAINING = ("cli", "experiments", "kernels", "serving")
# Settings that may differ between a run and its resumption: no number depends on them, but that another device rounds, and
# draws a teacher's dropout, in its own way.
FREE_SETTINGS = ("progress", "threads", "device", "cuda_graphs", "log", "profile", "teacher.feature_memory")


class RunError(ValueError):
    """A run folder that cannot be used; the message names it and what to do."""


class RunFolder:
    """Paths and writers of one run folder.

    Files: `config.yaml` (every setting, resolved), `run.json` (versions, fingerprints of code and data, seed, results),
    `metrics.jsonl` (one line per look at validation), `checkpoints/<stage>.safetensors`, `student.safetensors`,
    `teacher.safetensors`, `ids.npz`, `seen.npz`, `curves.png`, `summary.md`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.loggers = Loggers()

    @classmethod
    def start(cls, path: str | Path | None, config: Config, dataset: Dataset, resume: bool) -> RunFolder:
        """Makes the folder, or checks that the one to be resumed is of the same settings and data.

        Raises:
            RunError: the folder already holds a run (and `resume` is off), or a resumed run differs.
            WriteError: the folder cannot be made or written to.
        """
        if path is None:
            path = Path("runs") / f"{dataset.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        folder = cls(path)
        held = (folder.path / "config.yaml").exists()
        if held and not resume:
            raise RunError(
                f"run folder {folder.path} already holds a run; pass --resume to go on with it, or another --out"
            )
        fingerprint = dataset.fingerprint()
        if held:
            folder._check_same(config, fingerprint)
            return folder
        make_folder(folder.path / "checkpoints")
        write_json(folder.path / "run.json", {**versions(), "seed": config.seed, "data": _about(dataset, fingerprint)})
        # last: its presence says that the folder was set up
        write_text(folder.path / "config.yaml", config.to_yaml())
        return folder

    @contextlib.contextmanager
    def held(self, loggers: Iterable[Logger] = ()) -> Iterator[None]:
        """What trains in this folder does it in here: nobody else may meanwhile, what a killed run left half-written is
        removed first, and the loggers hear of the start, every epoch and the end.

        Raises:
            RunError: another process is training in it.
        """
        with self._locked():
            for folder in (self.path, *(inside for inside in self.path.iterdir() if inside.is_dir())):
                sweep(folder)
            self.loggers = Loggers(loggers)
            self.loggers.start(self.path, str(self.info().get("started")), read_yaml(self.path / "config.yaml"))
            results = None
            try:
                yield
                results = self.info().get("results")
            finally:
                self.loggers.finish(results)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        handle = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                message = f"run folder {self.path}: another process is training in it; wait, or use another --out"
                raise RunError(message) from None
            yield
        finally:
            os.close(handle)

    def _check_same(self, config: Config, fingerprint: str) -> None:
        saved = read_yaml(self.path / "config.yaml")
        now = yaml.safe_load(config.to_yaml())
        changed = sorted(_differences(saved, now))
        if changed:
            raise RunError(
                f"run folder {self.path} was started with other settings ({', '.join(changed)}); use another --out"
            )
        before = self.info()["data"]["fingerprint"]
        if before != fingerprint:
            raise RunError(
                f"run folder {self.path} was started on other data (fingerprint {before[:12]}, now {fingerprint[:12]}); "
                "use another --out"
            )

    def info(self) -> dict[str, Any]:
        """The content of `run.json`.

        Raises:
            RunError: it is missing or damaged.
        """
        path = self.path / "run.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise RunError(f"{path} is missing or damaged: {error}") from error
        data = content.get("data") if isinstance(content, dict) else None
        if not isinstance(data, dict) or not all(isinstance(data.get(key), str) for key in ("name", "fingerprint")):
            raise RunError(f"{path} is damaged: expected an object with 'data', its 'name' and its 'fingerprint'")
        return content

    def update_info(self, **values: Any) -> None:
        """Adds to `run.json`."""
        write_json(self.path / "run.json", {**self.info(), **values})

    def checkpoint(self, stage: str) -> Path:
        """Where the checkpoint of a stage is."""
        return self.path / "checkpoints" / f"{stage}.safetensors"

    def log(self, stage: str, epoch: int, **values: float) -> None:
        """Appends one JSON line to `metrics.jsonl`, and tells the loggers."""
        append_line(self.path / "metrics.jsonl", json.dumps({"stage": stage, "epoch": epoch, **values}))
        self.loggers.metrics(stage, epoch, values)

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of `metrics.jsonl`; a line cut short by a crash is left out, a repeated epoch's newest line holds."""
        path = self.path / "metrics.jsonl"
        lines: dict[tuple[str, int], dict[str, Any]] = {}
        for text in path.read_bytes().splitlines() if path.exists() else []:
            try:
                line = json.loads(text)
                lines[str(line["stage"]), int(line["epoch"])] = line
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                continue
        return list(lines.values())

    def forget(self, stage: str, after: int) -> None:
        """Removes a stage's lines of later epochs from `metrics.jsonl`: a resumed run goes through them again."""
        path = self.path / "metrics.jsonl"
        lines = self.metrics()
        kept = [line for line in lines if line["stage"] != stage or line["epoch"] <= after]
        if len(kept) != len(lines):
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def dataset(self, path: str = "") -> Dataset:
        """The data of the run: from `path`, else from its own `data/` folder, else from where its settings say.

        Raises:
            RunError: the data has changed since.
        """
        settings = load_config(self.path / "config.yaml")
        own = self.path / "data"
        dataset = load_configured(settings.data, settings.seed, path or (own if own.is_dir() else ""))
        expected, got = self.info()["data"]["fingerprint"], dataset.fingerprint()
        if expected != got:
            raise RunError(f"{self.path}: the data has changed since (fingerprint {expected[:12]}, now {got[:12]})")
        return dataset

    def write_ids(self, dataset: Dataset, everything: bool = False) -> None:
        """`ids.npz` (original ids, item names) and `seen.npz`: interactions of train as 1, of validation (and, with
        `everything`, of test) as 2."""
        arrays = {"user_ids": _plain(dataset.user_ids), "item_ids": _plain(dataset.item_ids)}
        if dataset.item_names is not None:
            arrays["item_names"] = _plain(dataset.item_names)
        write_atomic(self.path / "ids.npz", lambda temporary: np.savez(temporary, **arrays))
        held_out = [part for part in (dataset.val, dataset.test if everything else None) if part is not None]
        seen = sp.csr_matrix(sum((2 * part for part in held_out), dataset.train))
        write_atomic(self.path / "seen.npz", lambda temporary: sp.save_npz(temporary, seen))


@cache
def code_fingerprint() -> str:
    """12 hex digits of the Python that decides what a run computes: all of the package but what only shows or serves."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package)
        if place.parts[0] not in NOT_TRAINING:
            digest.update(f"{place.as_posix()}\n{path.read_text(encoding='utf-8')}\n".encode())
    return digest.hexdigest()[:12]


def versions() -> dict[str, Any]:
    """What produced the run."""
    import scipy

    import mmkd

    return {
        "mmkd": mmkd.__version__,
        "code": code_fingerprint(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _about(dataset: Dataset, fingerprint: str) -> dict[str, Any]:
    parts = {part: getattr(dataset, part) for part in ("train", "val", "test")}
    return {
        "name": dataset.name,
        "fingerprint": fingerprint,
        "users": dataset.num_users,
        "items": dataset.num_items,
        "interactions": {part: int(m.nnz) for part, m in parts.items() if m is not None},
        "modalities": {name: list(x.shape) for name, x in dataset.features.items()},
    }


def _differences(saved: Any, now: Any, path: str = "") -> set[str]:
    if path in FREE_SETTINGS:
        return set()
    if isinstance(saved, dict) and isinstance(now, dict):
        keys = saved.keys() | now.keys()
        return set().union(*(_differences(saved.get(k), now.get(k), f"{path}.{k}" if path else k) for k in keys), set())
    return set() if saved == now else {path}


def _plain(ids: np.ndarray) -> np.ndarray:
    """Ids as an array that needs no pickle: numbers as they are, everything else as text."""
    return ids if ids.dtype.kind in "iuU" else ids.astype(str)
