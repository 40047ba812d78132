"""Training tasks at the sizes of the paper's data sets, on the graphs of `cases.py`, and their eager twins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from cases import BATCH, DIM, NUM_CANDIDATES, SIZES, graph
from eager import EagerTeacher, student_loss, teacher_loss
from torch import Tensor

from mmkd.config import Config
from mmkd.data import Dataset
from mmkd.models.features import FeatureTable
from mmkd.models.lightgcn import LightGCN
from mmkd.models.prompt import Prompt
from mmkd.models.teacher import Teacher
from mmkd.training.collapse import FrozenTeacher
from mmkd.training.tasks import StudentTask, TeacherTask

LAYERS = 2


def config(**distill) -> Config:
    """Defaults, with the depth, batch and list of the spec's benches."""
    return Config.model_validate(
        {
            "dim": DIM,
            "teacher": {"layers": LAYERS, "batch_size": BATCH},
            "student": {"layers": LAYERS, "batch_size": BATCH},
            "distill": {"negatives": NUM_CANDIDATES - 1, **distill},
        }
    )


@lru_cache(maxsize=1)
def dataset(name: str) -> Dataset:
    """The graph of `cases.graph` as a data set; one held-out item for every user; standard normal features."""
    g, rng = graph(name), np.random.default_rng(1)
    num_users, num_items, _, widths = SIZES[name]
    train = g.to_scipy()
    held = train.copy()
    held.data[:] = 0
    held = held + _one_each(num_users, num_items, rng)
    held = (held - held.multiply(train > 0)).tocsr()
    held.eliminate_zeros()
    features = {f"m{i}": rng.standard_normal((num_items, w), dtype=np.float32) for i, w in enumerate(widths)}
    return Dataset(name, train, held, None, features, np.arange(num_users), np.arange(num_items))


def _one_each(num_users: int, num_items: int, rng):
    from scipy import sparse

    columns = rng.integers(0, num_items, num_users)
    return sparse.csr_matrix(
        (np.ones(num_users, np.float32), columns, np.arange(num_users + 1)), (num_users, num_items)
    )


@lru_cache(maxsize=1)
def teacher(name: str, norm: str = "mean", device: str = "cpu") -> Teacher:
    """An untrained teacher; `H` is random, for its values do not matter to the time of a step."""
    data, g, generator, c = dataset(name), graph(name).to(device), torch.Generator().manual_seed(0), config()
    tables = [FeatureTable(m, x, c.teacher.features).to(device) for m, x in data.features.items()]
    prompt = Prompt(torch.randn(data.num_items, DIM, generator=generator), generator)
    return Teacher(
        g, tables, prompt, layers=LAYERS, feature_layers=1, feature_weight=c.teacher.feature_weight,
        strength=c.prompt.strength, norm=norm, generator=generator,
    ).to(device)  # fmt: skip


@dataclass
class Pair:
    """One step of ours, and the loss of its eager twin for the batch of `(epoch, step)`, with the twin's parameters."""

    ours: Callable[[int, int], Tensor]
    parameters: list[Tensor]
    eager: Callable[[str], tuple[Callable[[int, int], Tensor], list[Tensor]]]
    task: object
    optimizer: torch.optim.Optimizer


def _pair(task, eager) -> Pair:
    optimizer = task.optimizer()

    def ours(epoch: int, step: int) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        return torch.stack(list(task.step(epoch, step).values())).sum()

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return Pair(ours, parameters, eager, task, optimizer)


def student(name: str, norm: str = "mean", device: str = "cpu", compute: torch.dtype | None = None, **distill) -> Pair:
    """The student's step: collapsed frozen teacher, compact tables; `compute` as `--amp` has it."""
    frozen, c, data = teacher(name, norm, device), config(**distill), dataset(name)
    g, weights = frozen.graph, torch.full((len(frozen.features),), 1.0 / len(frozen.features), device=device)
    table = torch.cat(frozen.tables())
    task = StudentTask(LightGCN(g, table, LAYERS, compute), FrozenTeacher(frozen), c, data, g, weights)

    def eager(layout: str):
        twin, leaf = EagerTeacher(frozen, layout).freeze(), torch.nn.Parameter(table.clone())

        def loss(epoch: int, step: int) -> Tensor:
            batch = task.sampler.batch(epoch, step)
            candidates = torch.from_numpy(np.concatenate([batch.pos[:, None], batch.neg], 1)).to(device)
            nodes, users = task._emb_nodes(epoch, step).to(device), torch.from_numpy(batch.users).to(device)
            return student_loss(leaf, twin, users, candidates, nodes, c, weights)

        return loss, [leaf, twin.prompt_weight, twin.prompt_bias]

    return _pair(task, eager)


def teacher_step(name: str, device: str = "cpu") -> Pair:
    """The teacher's step."""
    model, c, data = teacher(name, device=device), config(), dataset(name)
    task = TeacherTask(model, c, data, model.graph)

    def eager(layout: str):
        twin = EagerTeacher(model, layout)

        def loss(epoch: int, step: int) -> Tensor:
            batch = task.sampler.batch(epoch, step)
            candidates = torch.from_numpy(np.concatenate([batch.pos[:, None], batch.neg], 1)).to(device)
            drawn = task._mask(epoch, step)
            mask = None if drawn is None else task.mask_of(drawn.to(torch.device(device)))
            masks = None if mask is None else list(mask.split(DIM, 1))
            return teacher_loss(twin, torch.from_numpy(batch.users).to(device), candidates, masks, c)

        leaves = [twin.table, *twin.weights, *twin.biases, twin.prompt_weight, twin.prompt_bias]
        return loss, leaves

    return _pair(task, eager)


def gemms(name: str) -> Callable[[], None]:
    """The products a teacher step cannot avoid: `X W` and `G^T X` of every modality, float32, in the order of factors that is
    quickest (`X^T G` takes up to a quarter longer with MKL)."""
    tables = [torch.from_numpy(x) for x in dataset(name).features.values()]
    weights = [torch.randn(x.shape[1], DIM) for x in tables]
    grads = [torch.randn(x.shape[0], DIM) for x in tables]

    def run() -> None:
        for x, w, g in zip(tables, weights, grads, strict=True):
            x @ w
            g.T @ x

    return run


def assert_close(pair: Pair, layout: str = "csr") -> None:
    """The same loss and the same gradients from the same weights and batch."""
    loss, leaves = pair.eager(layout)
    mine, theirs = pair.ours(0, 0), loss(0, 0)
    theirs.backward()
    pair.optimizer.materialize()
    torch.testing.assert_close(mine, theirs.detach(), rtol=1e-4, atol=1e-5)
    for ours, truth in zip(pair.parameters, leaves, strict=True):
        error = (ours.grad - truth.grad).norm() / truth.grad.norm()
        assert error < 1e-3, f"gradient of shape {tuple(ours.shape)} differs by {error:.2e} of its norm"
