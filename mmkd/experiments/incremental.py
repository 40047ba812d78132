"""New interactions arrive: a trained model goes on for one epoch on the grown graph (paper, section 7.3.1)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import nn

from mmkd.data import Dataset
from mmkd.evaluation import evaluate
from mmkd.experiments.cells import Study
from mmkd.models.baselines import TITLES, TRAINED
from mmkd.models.features import FeatureTable
from mmkd.models.lightgcn import LightGCN
from mmkd.training.baseline_task import BaselineTask
from mmkd.training.checkpoint import load_checkpoint
from mmkd.training.tasks import LightGCNTask

HELD_BACK = 0.1


def before(dataset: Dataset, seed: int) -> Dataset:
    """The data set without a random tenth of its train interactions; users and items keep their ids."""
    train = dataset.train.tocoo()
    kept = np.random.Generator(np.random.Philox(seed)).random(train.nnz) >= HELD_BACK
    old = sp.csr_matrix((train.data[kept], (train.row[kept], train.col[kept])), shape=train.shape)
    return replace(dataset, name=f"{dataset.name}-before", train=old)


def adapt(study: Study) -> list[dict[str, Any]]:
    """One epoch of every model on the grown graph: metrics before (on the old graph) and after, seconds of the epoch."""
    new = study.dataset(0)
    past = Study(study.out / "before", study.config, seeds=1)
    past.datasets[0] = before(new, 0)
    part = "test" if new.test is not None and new.test.nnz else "val"
    records = []
    for name in ("lattice", "bm3", "mmkd"):
        cell = past.cell({"model": name})
        stage = "student" if name == "mmkd" else name
        task = _task(name, study, new)
        tensors, _ = load_checkpoint(cell.path / "checkpoints" / f"{stage}.safetensors")
        prefix = "best.student." if name == "mmkd" else "best."
        best = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        task.model.load_state_dict(best, strict=False)
        seconds = _one_epoch(task, new)
        after = evaluate(*task.tables(), new, part, (20,))
        records.append({
            "model": TITLES[name], "before": cell.results[TITLES[name]]["recall@20"], "recall@20": after["recall@20"],
            "ndcg@20": after["ndcg@20"], "seconds": seconds,
        })  # fmt: skip
    return records


def _task(name: str, study: Study, dataset: Dataset):
    config, graph = study.settings({"model": name}, 0), dataset.graph()
    if name == "mmkd":
        model = LightGCN(graph, torch.zeros(graph.num_nodes, config.dim), config.student.layers)
        return LightGCNTask(model, config.student, dataset, graph, config.seed + 9)
    kind = TRAINED[name]
    features = [FeatureTable(m, x, config.teacher.features) for m, x in dataset.features.items()]
    settings = kind.Settings.model_validate(config.models[name])
    model: nn.Module = kind(graph, features, config.dim, settings, torch.Generator().manual_seed(0))
    return BaselineTask(name, model, dataset, config.seed + 9)


def _one_epoch(task, dataset: Dataset) -> float:
    import time

    settings = task.model.settings if isinstance(task, BaselineTask) else task.settings
    optimizer, start = task.optimizer(), time.perf_counter()
    for step in range(-(-dataset.train.nnz // settings.batch_size)):
        optimizer.zero_grad(set_to_none=True)
        task.step(0, step)
        optimizer.step()
    return time.perf_counter() - start
