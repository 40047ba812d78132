"""A cell is one training run in its own folder: finished ones are read back, interrupted ones go on."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mmkd.config import Config, load_config
from mmkd.data import Dataset, load_configured
from mmkd.training import train
from mmkd.training.run_folder import RunFolder

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
    """

    def __init__(self, out: Path, config: Config, seeds: int = 5, quick: bool = False) -> None:
        self.out, self.quick = Path(out), quick
        self.seeds = range(QUICK["seeds"] if quick else seeds)
        self.config = _quick(config) if quick else config
        self.datasets: dict[int, Dataset] = {}

    def dataset(self, seed: int) -> Dataset:
        """The data as a run with this seed sees it (the split may depend on the seed)."""
        if seed not in self.datasets:
            self.datasets[seed] = load_configured(self.config.data, seed)
        return self.datasets[seed]

    @cached_property
    def name(self) -> str:
        """The data set's name."""
        return self.dataset(0).name

    def settings(self, changes: dict[str, Any], seed: int) -> Config:
        """The shared settings, what the search chose for the model (`tuned.json`), and `{"teacher.lr": 1e-3, ...}` on top."""
        file = self.out / "tuned.json"
        tuned = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        changes = tuned.get(changes.get("model", self.config.model), {}) | changes
        overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
        base = self.config.model_dump(mode="json") | {"baselines": [], "seed": seed}
        return load_config(base, overrides)

    def cell(self, changes: dict[str, Any] | None = None, seed: int = 0) -> Cell:
        """Runs the cell, or reads it back where it is finished."""
        config = self.settings(changes or {}, seed)
        path = self.out / "cells" / f"{config.model}-{_digest(config.model_dump(mode='json'))}"
        folder = RunFolder(path)
        started = (path / "config.yaml").exists()
        if not (started and "finished" in folder.info()):
            log.info("cell %s: %s, seed %d", path.name, changes or "defaults", seed)
            shared = self._shared_teacher(config)
            if shared.exists() and not folder.checkpoint("teacher").exists():
                folder.checkpoint("teacher").parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(shared, folder.checkpoint("teacher"))
            train(config, out=path, resume=started, dataset=self.dataset(seed))
            self._share_teacher(folder, shared)
        info = folder.info()
        return Cell(path, info["part"], info["results"], info["seconds"], info["parameters"])

    def _shared_teacher(self, config: Config) -> Path:
        content = config.model_dump(mode="json")
        key = {name: content[name] for name in TEACHER_SETTINGS}
        key["prompt"].pop("lr")  # of the student's stage
        return self.out / "teachers" / f"{_digest(key)}.safetensors"

    def _share_teacher(self, folder: RunFolder, shared: Path) -> None:
        source = folder.checkpoint("teacher")
        if source.exists() and not shared.exists():
            shared.parent.mkdir(parents=True, exist_ok=True)
            temporary = shared.with_suffix(".partial")
            shutil.copyfile(source, temporary)
            temporary.replace(shared)


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
