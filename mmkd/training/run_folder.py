"""The run folder: everything one run was told, did and left behind, each file whole or absent."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
import yaml

from mmkd.config import Config, load_config
from mmkd.data import Dataset, load
from mmkd.files import write_atomic, write_json, write_text

# Settings that may differ between a run and its resumption without changing a single number.
FREE_SETTINGS = ("progress", "threads", "device")


class RunError(ValueError):
    """A run folder that cannot be used; the message names it and what to do."""


class RunFolder:
    """Paths and writers of one run folder.

    Files: `config.yaml` (every setting, resolved), `run.json` (versions, seed, data fingerprint, results),
    `metrics.jsonl` (one line per look at validation), `checkpoints/<stage>.safetensors`, `student.safetensors`,
    `teacher.safetensors`, `ids.npz`, `seen.npz`, `curves.png`, `summary.md`; after an update also `data/`, without a teacher.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @classmethod
    def start(cls, path: str | Path | None, config: Config, dataset: Dataset, resume: bool) -> RunFolder:
        """Makes the folder, or checks that the one to be resumed is of the same settings and data.

        Raises:
            RunError: the folder already holds a run (and `resume` is off), or a resumed run differs.
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
        (folder.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        write_json(folder.path / "run.json", {**versions(), "seed": config.seed, "data": _about(dataset, fingerprint)})
        # last: its presence says that the folder was set up
        write_text(folder.path / "config.yaml", config.to_yaml())
        return folder

    def _check_same(self, config: Config, fingerprint: str) -> None:
        saved = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
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
        """The content of `run.json`."""
        return json.loads((self.path / "run.json").read_text(encoding="utf-8"))

    def update_info(self, **values: Any) -> None:
        """Adds to `run.json`."""
        write_json(self.path / "run.json", {**self.info(), **values})

    def checkpoint(self, stage: str) -> Path:
        """Where the checkpoint of a stage is."""
        return self.path / "checkpoints" / f"{stage}.safetensors"

    def log(self, **line: Any) -> None:
        """Appends one JSON line to `metrics.jsonl`."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of `metrics.jsonl`; a last line cut short by a crash is left out, a resumed epoch's newest line holds."""
        path = self.path / "metrics.jsonl"
        lines: dict[tuple[str, int], dict[str, Any]] = {}
        for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            lines[line["stage"], line["epoch"]] = line
        return list(lines.values())

    def dataset(self, path: str = "") -> Dataset:
        """The data of the run: from `path`, else from its own `data/` folder, else from where its settings say.

        Raises:
            RunError: the data has changed since.
        """
        settings = load_config(self.path / "config.yaml")
        d, own = settings.data, self.path / "data"
        dataset = load(
            path or (own if own.is_dir() else d.path), format=d.format, split=d.split, seed=settings.seed, **d.options
        )
        expected, got = self.info()["data"]["fingerprint"], dataset.fingerprint()
        if expected != got:
            raise RunError(f"{self.path}: the data has changed since (fingerprint {expected[:12]}, now {got[:12]})")
        return dataset

    def write_ids(self, dataset: Dataset, everything: bool = False) -> None:
        """`ids.npz` (original ids, item names) and `seen.npz` (train and validation interactions, or everything)."""
        arrays = {"user_ids": _plain(dataset.user_ids), "item_ids": _plain(dataset.item_ids)}
        if dataset.item_names is not None:
            arrays["item_names"] = _plain(dataset.item_names)
        write_atomic(self.path / "ids.npz", lambda temporary: np.savez(temporary, **arrays))
        parts = [dataset.train, dataset.val, dataset.test if everything else None]
        seen = sp.csr_matrix(sum(part for part in parts[1:] if part is not None) + parts[0])
        seen.data = np.ones_like(seen.data)
        write_atomic(self.path / "seen.npz", lambda temporary: sp.save_npz(temporary, seen))


def versions() -> dict[str, Any]:
    """What produced the run."""
    import scipy

    import mmkd

    return {
        "mmkd": mmkd.__version__,
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
