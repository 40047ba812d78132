"""A cell is one training run in its own folder: finished ones are read back, interrupted ones go on."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mmkd.config import Config, load_config
from mmkd.data import Dataset, load_configured
from mmkd.experiments.parallel import side_by_side
from mmkd.training import Stop, train
from mmkd.training.run_folder import RunFolder, code_fingerprint

log = logging.getLogger("mmkd")

# What the teacher's stage depends on; cells that agree here share one teacher.
TEACHER_SETTINGS = ("data", "dim", "seed", "teacher", "prompt", "evaluation")
# Seconds of training instead of hours: enough to see that everything runs, not to believe a number.
QUICK = {"dim": 16, "epochs": 2, "batch_size": 1024, "seeds": 1}


@dataclass(frozen=True)
class Cell:
    """A finished run.

    Attributes:
        path: its folder. part: `"test"`, `"val"` or `"none"`.
        results: method -> metric -> value; seconds, parameters: method -> number.
    """

    path: Path
    part: str
    results: dict[str, dict[str, float]]
    seconds: dict[str, float]
    parameters: dict[str, int]


class Study:
    """Where an experiment's cells are, and what they share.

    Args:
        out: folder of all experiments of one data set; cells of different tables are shared.
        config: settings every cell starts from.
        seeds: number of seeds, `0 .. seeds-1`.
        quick: two epochs, a narrow model, one seed and short sweeps.
        jobs: cells that are trained at a time, each in a process with its share of the threads.
        test: False takes the test part away.
        prepare: a module's function of a data set and a seed that gives what the cells see.

    Attributes:
        datasets: by seed, loaded when first asked for. One that is set by hand is not seen by the processes of `jobs`.
        tuned: file of what the search chose.
        stop: what ends the cell at hand.
        older: names of the cells read so far that another version of the code has trained.
        in_parent: False in one of those processes, which have their share of the threads and no progress bars.
    """

    def __init__(
        self, out: Path, config: Config, seeds: int = 5, quick: bool = False, jobs: int = 1, test: bool = True,
        prepare: Callable[[Dataset, int], Dataset] | None = None,
    ) -> None:  # fmt: skip
        if jobs < 1:
            raise ValueError(f"jobs: expected at least 1, got {jobs}")
        self.out, self.quick, self.jobs, self.test, self.prepare = Path(out), quick, jobs, test, prepare
        self.tuned = self.out / "tuned.json"
        self.seeds = range(QUICK["seeds"] if quick else seeds)
        self.config = _quick(config) if quick else config
        self.datasets: dict[int, Dataset] = {}
        self.stop, self.in_parent = Stop(), True
        self.older: set[str] = set()

    def dataset(self, seed: int) -> Dataset:
        """The data as a run with this seed sees it (the split may depend on the seed)."""
        if seed not in self.datasets:
            whole = load_configured(self.config.data, seed)
            whole = whole if self.test else replace(whole, test=None)
            self.datasets[seed] = self.prepare(whole, seed) if self.prepare else whole
        return self.datasets[seed]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"datasets": {}, "stop": Stop(), "in_parent": False}  # another process has its own

    @cached_property
    def name(self) -> str:
        """The data set's name."""
        return self.dataset(0).name

    def settings(self, changes: dict[str, Any], seed: int) -> Config:
        """The shared settings, what the search chose for the model (`tuned.json`), and `{"teacher.lr": 1e-3, ...}` on top."""
        tuned = json.loads(self.tuned.read_text(encoding="utf-8")) if self.tuned.exists() else {}
        changes = tuned.get(changes.get("model", self.config.model), {}) | changes
        overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
        base = self.config.model_dump(mode="json") | {"baselines": [], "seed": seed}
        return load_config(base, overrides)

    def cells(self, wanted: Sequence[tuple[dict[str, Any], int]]) -> list[Cell]:
        """The cells of these changes and seeds; what is missing is trained `jobs` at a time.

        Of the cells that share a teacher one goes first, the others find it finished.
        """
        missing = {}
        for changes, seed in wanted if self.jobs > 1 else ():
            config = self.settings(changes, seed)
            if not _finished(self._path(config)):
                missing.setdefault(self._path(config), (config, changes, seed))
        first, later = [], []
        teachers = set()
        for config, changes, seed in missing.values():
            teacher = self._shared_teacher(config) if config.model in ("mmkd", "teacher") else None
            waits = teacher is not None and teacher in teachers and not teacher.exists()
            (later if waits else first).append((changes, seed))
            teachers.add(teacher)
        for wave in (first, later):
            if len(wave) > 1:
                side_by_side(self, Study.cell, wave)
        return [self.cell(changes, seed) for changes, seed in wanted]

    def _path(self, config: Config) -> Path:
        return self.out / "cells" / f"{config.model}-{_digest(config.model_dump(mode='json'))}"

    def cell(self, changes: dict[str, Any] | None = None, seed: int = 0) -> Cell:
        """Runs the cell, or reads it back where it is finished."""
        config = self.settings(changes or {}, seed)
        path = self._path(config)
        folder = RunFolder(path)
        if not _finished(path):
            started = (path / "config.yaml").exists()
            log.info("cell %s: %s, seed %d", path.name, changes or "defaults", seed)
            shared = self._shared_teacher(config)
            if shared.exists() and not folder.checkpoint("teacher").exists():
                folder.checkpoint("teacher").parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(shared, folder.checkpoint("teacher"))
            own = config if self.in_parent else config.model_copy(update={"threads": None, "progress": False})
            train(own, out=path, resume=started, dataset=self.dataset(seed), stop=self.stop)
            self._share_teacher(folder, shared)
        info = folder.info()
        if info.get("code") != code_fingerprint():
            self.older.add(path.name)
        return Cell(path, info["part"], info["results"], info["seconds"], info["parameters"])

    def _shared_teacher(self, config: Config) -> Path:
        content = config.model_dump(mode="json")
        key = {name: content[name] for name in TEACHER_SETTINGS}
        key["prompt"].pop("lr")  # of the student's stage
        key["code"] = code_fingerprint()
        return self.out / "teachers" / f"{_digest(key)}.safetensors"

    def _share_teacher(self, folder: RunFolder, shared: Path) -> None:
        source = folder.checkpoint("teacher")
        if source.exists() and not shared.exists():
            shared.parent.mkdir(parents=True, exist_ok=True)
            temporary = shared.with_suffix(".partial")
            shutil.copyfile(source, temporary)
            temporary.replace(shared)


def _finished(path: Path) -> bool:
    return (path / "config.yaml").exists() and "finished" in RunFolder(path).info()


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _quick(config: Config) -> Config:
    content = config.model_dump(mode="json")
    short = {"epochs": QUICK["epochs"], "batch_size": QUICK["batch_size"]}
    for stage in ("teacher", "student", "lightgcn"):
        content[stage] |= short
    from mmkd.models.baselines import TRAINED

    content["models"] = {name: content["models"].get(name, {}) | short for name in TRAINED}
    return load_config(content | {"dim": QUICK["dim"]})
