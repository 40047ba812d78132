"""New interactions arrive: a trained model goes on for one epoch on the grown graph (paper, section 7.3.1).

MMKD's row is `mmkd update` itself; the baselines, which it does not know, take an epoch of their own training.
"""

from __future__ import annotations

import csv
import io
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from mmkd.data import Dataset
from mmkd.evaluation import evaluate
from mmkd.experiments.cells import Cell, Study
from mmkd.files import make_folder, write_atomic, write_text
from mmkd.models.baselines import TITLES, TRAINED
from mmkd.models.features import FeatureTable
from mmkd.serving.recommend import load
from mmkd.training.baseline_task import BaselineTask
from mmkd.training.checkpoint import load_checkpoint
from mmkd.training.incremental import update
from mmkd.training.run_folder import RunFolder

HELD_BACK = 0.1


def before(dataset: Dataset, seed: int) -> Dataset:
    """The data set without a random tenth of its train interactions; users and items keep their ids."""
    train = dataset.train.tocoo()
    kept = np.random.Generator(np.random.Philox(seed)).random(train.nnz) >= HELD_BACK
    old = sp.csr_matrix((train.data[kept], (train.row[kept], train.col[kept])), shape=train.shape)
    return replace(dataset, name=f"{dataset.name}-before", train=old)


def earlier(study: Study) -> Study:
    """The same study before the last interactions came, with what its search chose."""
    past = Study(study.out / "before", study.config, seeds=1, jobs=study.jobs, prepare=before)
    past.stop, past.tuned = study.stop, study.tuned
    return past


def adapt(study: Study) -> list[dict[str, Any]]:
    """One epoch of every model on the grown graph: metrics before (on the old graph) and after, seconds of the epoch."""
    new = study.dataset(0)
    past = earlier(study)
    part = "test" if new.test is not None and new.test.nnz else "val"
    names, records = ("lattice", "bm3", "mmkd"), []
    for name, cell in zip(names, past.cells([({"model": name}, 0) for name in names]), strict=True):
        tables, seconds = _updated(cell, past, new) if name == "mmkd" else _retrained(name, cell, study, new)
        after = evaluate(*tables, new, part, (20,))
        records.append({
            "model": TITLES[name], "before": cell.results[TITLES[name]]["recall@20"], "recall@20": after["recall@20"],
            "ndcg@20": after["ndcg@20"], "seconds": seconds,
        })  # fmt: skip
    return records


def _updated(cell: Cell, past: Study, new: Dataset) -> tuple[tuple[Tensor, Tensor], float]:
    """The student after `mmkd update` with every pair that came later, and the seconds of joining and fine-tuning."""
    base = cell.path.with_name(f"{cell.path.name}-updated")
    folder = RunFolder(base / "run")
    started = (folder.path / "config.yaml").exists()
    if not (started and "finished" in folder.info()):
        _train_pairs_only(cell.path, base)
        write_text(base / "later.csv", _later(past.dataset(0), new))
        overrides = ["update.epochs=1", "update.val_fraction=0", "update.test_fraction=0", "progress=false"]
        update(base, base / "later.csv", out=folder.path, resume=started, overrides=overrides, stop=past.stop)
    run, seconds = load(folder.path), folder.info()["seconds"]
    return (run.user_emb, run.item_emb), seconds["joining"] + seconds["fine-tuning"]


def _train_pairs_only(run: Path, out: Path) -> None:
    """The run as `mmkd update` reads it, without its validation pairs: an update takes in everything the run has seen, and
    the baselines beside it learn from train pairs alone."""
    make_folder(out)
    for name in ("config.yaml", "run.json", "student.safetensors", "ids.npz"):
        shutil.copyfile(run / name, out / name)
    seen = sp.load_npz(run / "seen.npz")
    seen.data[seen.data != 1] = 0
    seen.eliminate_zeros()
    write_atomic(out / "seen.npz", lambda temporary: sp.save_npz(temporary, seen))


def _later(old: Dataset, new: Dataset) -> str:
    """The train pairs that are new, by original ids, as CSV."""
    pairs = (new.train - new.train.multiply(old.train > 0)).tocoo()
    kept = pairs.data != 0
    buffer = io.StringIO()
    rows = zip(new.user_ids[pairs.row[kept]], new.item_ids[pairs.col[kept]], strict=True)
    csv.writer(buffer, lineterminator="\n").writerows([("user", "item"), *rows])
    return buffer.getvalue()


def _retrained(name: str, cell: Cell, study: Study, new: Dataset) -> tuple[tuple[Tensor, Tensor], float]:
    """A baseline's tables after one epoch from its best weights on the grown graph, and that epoch's seconds."""
    task = _task(name, study, new)
    tensors, _ = load_checkpoint(cell.path / "checkpoints" / f"{name}.safetensors")
    best = {k.removeprefix("best."): t for k, t in tensors.items() if k.startswith("best.")}
    task.model.load_state_dict(best, strict=False)
    seconds = _one_epoch(task, new)
    return task.tables(), seconds


def _task(name: str, study: Study, dataset: Dataset) -> BaselineTask:
    config, graph, kind = study.settings({"model": name}, 0), dataset.graph(), TRAINED[name]
    features = [FeatureTable(m, x, config.teacher.features) for m, x in dataset.features.items()]
    settings = kind.Settings.model_validate(config.models[name])
    model = kind(graph, features, config.dim, settings, torch.Generator().manual_seed(0))
    return BaselineTask(name, model, dataset, config.seed + 9)


def _one_epoch(task: BaselineTask, dataset: Dataset) -> float:
    settings = task.model.settings
    optimizer, start = task.optimizer(), time.perf_counter()
    for step in range(-(-dataset.train.nnz // settings.batch_size)):
        optimizer.zero_grad(set_to_none=True)
        task.step(0, step)
        optimizer.step()
    return time.perf_counter() - start
