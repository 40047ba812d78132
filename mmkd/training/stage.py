"""The loop every stage shares: batches, optimizer, validation, early stopping, checkpoints, progress."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Event
from typing import Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mmkd import _host, ops
from mmkd.config import Config, StageConfig
from mmkd.data import Dataset
from mmkd.data.sampling import Batch, Sampler
from mmkd.evaluation import evaluate
from mmkd.memory import release
from mmkd.training.best import BestWeights
from mmkd.training.checkpoint import (
    CheckpointError,
    load_checkpoint,
    restore_training,
    save_checkpoint,
    training_tensors,
)
from mmkd.training.finite import first_bad, origin
from mmkd.training.optim import Propagated
from mmkd.training.profile import StepProfiler
from mmkd.training.ranking import NO_SHARED_ITEMS, SharedItems
from mmkd.training.recorded import Steps, Terms, steps_of
from mmkd.training.run_folder import RunFolder
from mmkd.training.stop import Stop, StoppedAtStep

# The counters of a checkpoint; `step`: steps of epoch `epoch + 1` that are done.
_START = {
    "epoch": 0, "step": 0, "best_epoch": 0, "best_metric": None, "bad": 0, "seconds": 0.0, "finished": False,
}  # fmt: skip

SIZE = 1024  # users and items of a batch come in multiples of this on a GPU

T = TypeVar("T")


class TrainingError(RuntimeError):
    """Training cannot go on; the message names stage, epoch, step and term. The last good checkpoint is kept."""


@dataclass
class NodeBatch:
    """One batch as a step uses it: the nodes it touches, each once, and where its users and items are among them.

    Attributes:
        rows: int64 `[n]`, node ids: `num_users` users, then items; either ascending, each once, unless filled up.
        users: int64 `[B]`, positions among the users of `rows`.
        candidates: int64 `[B, K]`, positions among the items of `rows`; column 0 the observed item, 1 BPR's negative.
        extra: int64, positions in `rows` of the further nodes asked for, in their order.
        shared: int64 `[S]`, positions among the items of `rows` of the items all pairs are ranked against; empty for BPR.
        owned: int64 `[2, n]`, (b, s) where the user of pair b has item s of `shared` in train.
        touched, counts: node ids that stand in (user, observed, BPR's negative), and how often they do: the rows and weights of
            the L2 term. all_counts: the same for all of `rows`, 0 for the others.
    """

    rows: Tensor
    num_users: int
    users: Tensor
    candidates: Tensor
    extra: Tensor
    shared: Tensor
    owned: Tensor
    touched: Tensor
    counts: Tensor
    all_counts: Tensor

    @property
    def pos(self) -> Tensor:
        return self.candidates[:, 0]

    @property
    def neg(self) -> Tensor:
        return self.candidates[:, 1]

    def split(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """A table `[n, w]` of `rows` as its users and its items."""
        return table.split([self.num_users, table.shape[0] - self.num_users])

    def to(self, device: torch.device) -> NodeBatch:
        """The same batch on `device`."""
        if device.type == "cpu":
            return self
        moved = {name: t.to(device, non_blocking=True) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return NodeBatch(num_users=self.num_users, **moved)


def node_batch(
    users: Tensor, candidates: Tensor, num_users: int, num_items: int, extra: Tensor | None = None,
    shared: SharedItems = NO_SHARED_ITEMS, multiple: int = 1,
) -> NodeBatch:  # fmt: skip
    """Maps user and item ids (on the CPU) of a graph of `num_users` and `num_items` to the compact table of the nodes
    involved, on the CPU, so that no step waits for a GPU.

    Args:
        users: int64 `[B]`. candidates: int64 `[B, K]`. extra: further node ids. shared: see :class:`NodeBatch`.
        multiple: users, items and `touched` are filled up to multiples of this, by nodes that no loss looks at and no weight
            counts, behind the others: few sizes where there was one a step. `rows` no longer ascend then.

    Raises:
        ValueError: an id out of range.
    """
    further, known = (None, 0) if extra is None else (np.asarray(extra, np.int64), len(extra))
    if len(shared.items):
        asked = shared.items + num_users
        further = asked if further is None else np.concatenate([further, asked])
    found = _host.compact(users.numpy(), candidates.numpy(), num_users, num_items, further, multiple)
    first_item = found[1]
    rows, own, local, where, counts, touched, weights = map(torch.from_numpy, (found[0], *found[2:]))
    ranked = where[known:] - first_item if len(shared.items) else where[known:]
    return NodeBatch(
        rows, first_item, own, local, where[:known], ranked, torch.from_numpy(shared.owned), touched, weights, counts
    )


def l2_weights(batch: NodeBatch, weight: float, table: Tensor) -> Tensor | None:
    """What the L2 term `weight * 1/2 sum ||row||^2 / B` weighs each of the batch's rows with, `[n]`; None without it."""
    if not weight:
        return None
    return weight / batch.users.numel() * batch.all_counts.to(table.dtype)


def add_l2(model: Propagated, batch: NodeBatch, weight: float) -> Tensor:
    """The L2 term `weight * 1/2 sum ||row||^2 / B` over the batch's layer-0 rows; its gradient goes straight into the rows
    of the table's, so that no dense `[N, d]` gradient is made for it. Call after backward; returns the value."""
    table, held = model.table, model.held
    with torch.no_grad():
        share, counts = weight / batch.users.numel(), batch.counts.to(table.dtype)
        if weight and held is not None and held.grad is not None:
            held.l2 = l2_weights(batch, weight, table)
        elif weight:
            table.grad.index_add_(0, batch.touched, (share * counts)[:, None] * table.index_select(0, batch.touched))
        square = ops.list_scores(table, table, batch.touched, batch.touched[:, None])  # ||row||^2, [n, 1]
        return torch.dot(counts.to(square.dtype), square[:, 0]).mul_(0.5 * share)


class Ahead(Generic[T]):
    """What a step needs that does not depend on the weights, made one step ahead in a background thread.

    `make(epoch, step)` must be a pure function of its arguments: then the thread changes the time and nothing else, and
    a resumed run needs no state of it. Only plain indexing belongs there; torch's own thread pool is the step's.

    Args:
        make: `(epoch, step) -> T`.
        steps: per epoch; after the last comes the first of the next epoch.
        pause: seconds the thread waits before it begins, unless it is asked for the value before. On a CPU the step is given
            the time to get into its first kernel: both would want the interpreter until then, and handing it to and fro
            takes 0.4 ms.
    """

    def __init__(self, make: Callable[[int, int], T], steps: int, pause: float = 0.0) -> None:
        self._make, self._steps, self._pause = make, steps, pause
        self._pool = ThreadPoolExecutor(1, "mmkd-ahead")
        self._next: tuple[tuple[int, int], Future[T], Event] | None = None

    def __call__(self, epoch: int, step: int) -> T:
        ready = self._next
        if ready:
            ready[2].set()  # also where it is not wanted: the thread is needed for what follows
        value = ready[1].result() if ready and ready[0] == (epoch, step) else self._make(epoch, step)
        following, asked = (epoch, step + 1) if step + 1 < self._steps else (epoch + 1, 0), Event()
        self._next = (following, self._pool.submit(self._make_later, asked, *following), asked)
        return value

    def _make_later(self, asked: Event, epoch: int, step: int) -> T:
        if self._pause:
            asked.wait(self._pause)
        return self._make(epoch, step)


class Task(Protocol):
    """What a stage trains."""

    name: str
    model: nn.Module

    def optimizer(self) -> torch.optim.Optimizer: ...

    def step(self, epoch: int, step: int) -> dict[str, Tensor]:
        """Computes the loss of one batch and its gradients; returns the terms of the loss, detached."""

    def tables(self) -> tuple[Tensor, Tensor]:
        """What is evaluated: user and item embeddings."""


@runtime_checkable
class RemembersEpoch(Protocol):
    """A task whose epoch begins with a choice that its steps use: a run stopped within the epoch goes on with the same one."""

    def epoch_tensors(self) -> dict[str, Tensor]:
        """What was chosen."""

    def resume_epoch(self, epoch: int, tensors: dict[str, Tensor]) -> None:
        """Puts it back, epochs counted from 0. Raises ValueError for what it cannot be."""


@dataclass
class StageResult:
    """How a stage went."""

    best_epoch: int
    best_metric: float | None
    epochs: int
    seconds: float
    stopped_early: bool = False
    history: list[dict] = field(default_factory=list)


def mixed_seed(seed: int, epoch: int, step: int, tag: int = 0) -> int:
    """A seed that depends on the place in the run only, so that a resumed run draws the same numbers."""
    mixed = seed
    for word in (tag, epoch, step):
        mixed = ((mixed ^ (word + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9) & (2**63 - 1)
        mixed ^= mixed >> 29
    return mixed


def seeded(seed: int, epoch: int, step: int, tag: int = 0) -> torch.Generator:
    """A generator of :func:`mixed_seed`."""
    return torch.Generator().manual_seed(mixed_seed(seed, epoch, step, tag))


class Stage:
    """Trains a task until validation stops improving, or to the last epoch; the best weights are put back at the end."""

    def __init__(
        self, task: Task, settings: StageConfig, config: Config, dataset: Dataset, folder: RunFolder, steps: int,
        stop: Stop | None = None, before_look: Callable[[], object] | None = None,
    ) -> None:  # fmt: skip
        self.task, self.settings, self.config, self.before_look = task, settings, config, before_look
        self.dataset, self.folder, self.steps = dataset, folder, steps
        self.stop = stop or Stop()
        self.path = folder.checkpoint(task.name)
        self.best = BestWeights(self.path.parent, f"best weights of {task.name}")
        self.validate = dataset.val is not None and dataset.val.nnz > 0
        # Reading a loss from a GPU waits for it, so there it is done for 16 steps at a time.
        self.look_every = 1 if next(task.model.parameters()).device.type == "cpu" else 16
        self._unprofiled = True
        if not self.validate and config.evaluation.select == "best":
            raise TrainingError(
                f"data set {dataset.name!r} has no validation part to choose weights by; load it with a split that makes "
                "one, or set evaluation.select=last"
            )

    def run(self) -> StageResult:
        """Trains, or goes on from the stage's checkpoint.

        Raises:
            TrainingError: a loss or a weight is not finite. CheckpointError: the checkpoint is damaged or not this run's.
            WriteError: a checkpoint cannot be written. RunStopped: it was asked to stop, and a checkpoint was saved.
        """
        optimizer = self.task.optimizer()
        with self.stop.held():
            state, best, sums = self._restore(optimizer)
            self.folder.forget(self.task.name, after=state["epoch"])
            if not state["finished"]:
                if best:
                    self.best.keep(best.items())
                steps = steps_of(self.task, optimizer, self.config.cuda_graphs and not self.config.profile)
                self._epochs(steps, state, sums)
                del steps  # and the memory of its recordings
                self._save(optimizer, state)
                best = self.best.tensors()
                self.best.close()
            self._load(best)
        return StageResult(
            state["best_epoch"],
            state["best_metric"],
            state["epoch"],
            state["seconds"],
            state["bad"] >= self.settings.patience,
        )

    def _restore(self, optimizer) -> tuple[dict, dict[str, Tensor], dict[str, Tensor]]:
        """Counters, best weights so far and the sums of an epoch under way."""
        if not self.path.exists():
            return dict(_START), {}, {}
        tensors, state = load_checkpoint(self.path)
        state = {**_START, **state}
        wrong = [key for key, start in _START.items() if not _like(state[key], start)]
        if wrong or state["step"] > self.steps:
            raise CheckpointError(
                f"checkpoint {self.path}: its counters make no sense ({state}); remove it to start over"
            )
        best = restore_training(tensors, self.task.model, optimizer, self.path)
        if state["step"] and isinstance(self.task, RemembersEpoch):
            try:
                self.task.resume_epoch(state["epoch"], _under(tensors, "epoch."))
            except ValueError as error:
                raise CheckpointError(f"checkpoint {self.path}: {error}; remove it to start over") from error
        if state["finished"] and not best:
            raise CheckpointError(
                f"checkpoint {self.path}: finished, but without best weights; remove it to start over"
            )
        return state, best, _under(tensors, "sums.")

    def _check_weights(self, state: dict) -> None:
        name = first_bad(self.task.model.named_parameters())
        if name is not None:
            raise TrainingError(
                f"stage {self.task.name}, epoch {state['epoch'] + (state['step'] > 0)}: the weights {name} hold NaN or Inf "
                f"though the loss did not, so a gradient overflowed; {self._way_out()}"
            )

    def _save(self, optimizer, state: dict, sums: dict[str, Tensor] | None = None) -> None:
        self._check_weights(state)
        tensors = training_tensors(self.task.model, optimizer, self.best.tensors())
        tensors |= {f"sums.{key}": value for key, value in (sums or {}).items()}
        if state["step"] and isinstance(self.task, RemembersEpoch):
            tensors |= {f"epoch.{key}": value for key, value in self.task.epoch_tensors().items()}
        save_checkpoint(self.path, tensors, state)

    def _epochs(self, steps: Steps, state: dict, sums: dict[str, Tensor]) -> None:
        settings = self.settings
        if self.validate and state["epoch"] == 0 and state["step"] == 0:
            self._look(state)  # where the stage starts from (a student: its teacher) is a candidate too
        total, done = settings.epochs * self.steps, state["epoch"] * self.steps + state["step"]
        with tqdm(total=total, initial=done, desc=self.task.name, unit="step", disable=not self.config.progress,
                  mininterval=0.5, dynamic_ncols=True) as bar:  # fmt: skip
            while state["epoch"] < settings.epochs and state["bad"] < settings.patience:
                start = time.perf_counter()
                try:
                    losses = self._epoch(steps, state, sums, bar)
                except StoppedAtStep:
                    state["seconds"] += time.perf_counter() - start
                    self._save(steps.optimizer, state, sums)
                    raise
                sums = {}
                state.update(epoch=state["epoch"] + 1, step=0)
                line = {"stage": self.task.name, "epoch": state["epoch"], **losses}
                last = state["epoch"] == settings.epochs
                if self.validate and (state["epoch"] % settings.eval_every == 0 or last):
                    # A look needs the memory; the next step makes new ones. Those of recorded steps stay where they are.
                    steps.optimizer.zero_grad(set_to_none=True)
                    line |= self._look(state)
                state["seconds"] += time.perf_counter() - start
                self.folder.log(**line, seconds=round(state["seconds"], 3))
                metric = "" if state["best_metric"] is None else f"{state['best_metric']:.4f}"
                bar.set_postfix_str(f"loss {losses['loss']:.4f}, best {self.config.evaluation.metric} {metric}")
                if state["epoch"] % self.config.checkpoint_every == 0:
                    self._save(steps.optimizer, state)
        if not self.validate or self.config.evaluation.select == "last" or not self.best:
            self._keep()
            state["best_epoch"] = state["epoch"]
        state["finished"] = True

    def _epoch(self, steps: Steps, state: dict, sums: dict[str, Tensor], bar) -> dict[str, float]:
        epoch, unseen = state["epoch"], []
        with self._profiler() as profiler:
            for step in range(state["step"], self.steps):
                terms = steps.gradients(epoch, step)
                unseen.append((step, terms))
                last = step == self.steps - 1 or self.stop.requested
                if len(unseen) == self.look_every or last:
                    self._account(epoch, unseen, sums, steps.optimizer)
                    unseen = []
                steps.update()
                state["step"] = step + 1
                bar.update()
                profiler.step()
                if last and self.stop.requested:
                    raise StoppedAtStep(
                        f"stopped in stage {self.task.name}, epoch {epoch + 1}, after step {step + 1} of {self.steps}; saved. "
                        f"Go on with: mmkd train --resume --out {self.folder.path}"
                    )
        means = {name: float(value) / self.steps for name, value in sums.items()}
        return {"loss": math.fsum(means.values()), **means}  # a resumed epoch has its terms in another order

    def _profiler(self) -> StepProfiler:
        """The profiler of this stage's first epoch here, if one is asked for."""
        wanted, self._unprofiled = self.config.profile * self._unprofiled, False
        return StepProfiler(self.task.name, wanted, self.folder.path / f"profile-{self.task.name}.md")

    def _account(self, epoch: int, seen: list[tuple[int, Terms]], sums: Terms, optimizer) -> None:
        """Reads the losses of some steps at once, and adds them to the epoch's."""
        names = list(seen[0][1])
        values = torch.stack([terms[name] for _, terms in seen for name in names]).view(len(seen), len(names))
        numbers = [
            (step, dict(zip(names, row, strict=True))) for (step, _), row in zip(seen, values.tolist(), strict=True)
        ]
        self._check_finite(epoch, numbers, optimizer)
        for name, value in zip(names, values.sum(0).unbind(), strict=True):
            sums[name] = sums[name] + value if name in sums else value.clone()

    def _check_finite(self, epoch: int, steps: list[tuple[int, dict[str, float]]], optimizer) -> None:
        for step, terms in steps:
            for name, number in terms.items():
                if not math.isfinite(number):
                    optimizer.zero_grad(set_to_none=True)
                    again = getattr(self.task, "in_parts", self.task.step)
                    where = origin(self.task.model, lambda step=step, again=again: again(epoch, step))
                    raise TrainingError(
                        f"stage {self.task.name}, epoch {epoch + 1}, step {step + 1}: the term '{name}' is {number}, "
                        f"{where}; {self._way_out()}"
                    )

    def _way_out(self) -> str:
        return (
            f"the last good checkpoint is kept in {self.path.parent}. Lower the learning rate "
            f"({self.task.name}.lr={self.settings.lr:g}) or check the features"
        )

    def _look(self, state: dict) -> dict[str, float]:
        """Steps and looks use blocks of different sizes: neither keeps the other's."""
        release(collect=False)
        values = self._validate(state)
        release(collect=False)
        return values

    def _validate(self, state: dict) -> dict[str, float]:
        self._check_weights(state)
        if self.before_look is not None:
            self.before_look()
        metric = self.config.evaluation.metric
        cutoffs = sorted({20, int(metric.partition("@")[2])})
        tables = self.task.tables()
        release(collect=False)  # what propagation used; ranking takes other sizes
        values = evaluate(*tables, self.dataset, "val", cutoffs)
        if state["best_metric"] is None or values[metric] > state["best_metric"]:
            state.update(best_metric=values[metric], best_epoch=state["epoch"], bad=0)
            self._keep()
        else:
            state["bad"] += 1
        return {f"val_{name}": values[name] for name in dict.fromkeys((metric, "recall@20", "ndcg@20"))}

    def _keep(self) -> None:
        self.best.keep(self.task.model.named_parameters())

    def _load(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.task.model.named_parameters():
                parameter.copy_(weights[name])


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}


def _like(value: object, start: object) -> bool:
    """Whether a counter read from a file is of its kind: a flag, a number not below 0, or (where it starts empty) either."""
    if isinstance(start, bool):
        return isinstance(value, bool)
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
    if start is None:
        return value is None or number
    return number and (isinstance(start, float) or isinstance(value, int))


def batches(dataset: Dataset, settings: StageConfig, negatives: int, seed: int, draw: str = "users") -> Sampler:
    """The stage's sampler."""
    return Sampler(dataset.train, negatives, settings.batch_size, seed, draw=draw)


def to_tensors(batch: Batch) -> tuple[Tensor, Tensor]:
    """A sampled batch as users `[B]` and candidates `[B, K]` (observed item first), on the CPU."""
    return torch.from_numpy(batch.users), torch.from_numpy(batch.candidates)
