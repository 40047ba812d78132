"""Steps of a stage: made one kernel launch after another, or, on a GPU, recorded once as CUDA graphs and played back.

A step of a small model is hundreds of kernels of a few microseconds; launching them from Python takes longer than they do.
A graph is replayed in one call, over the same memory, so what a step is given is copied into tensors that stay: batches
come in a few sizes (:func:`mmkd.training.stage.node_batch`), and each has a recording of its own.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from itertools import cycle
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from mmkd.graph import BipartiteGraph

log = logging.getLogger("mmkd")

WARMUP = 2  # steps of a size that are made as ever before it is recorded: kernels are compiled, caches filled
MOST = 16  # recordings; further sizes are made as ever
_ALIGNED = 16  # bytes, where a part of a packed batch begins

T = TypeVar("T")
Terms = dict[str, Tensor]


@dataclass(frozen=True)
class RandomBytes:
    """Uniform bytes, drawn on the device that uses them from a generator of their own.

    Attributes:
        shape: of the uint8 tensor. seed: of the generator, below 2^63.
    """

    shape: tuple[int, ...]
    seed: int

    def fill(self, out: Tensor) -> Tensor:
        """Draws them into `out`."""
        return out.random_(0, 256, generator=torch.Generator(out.device).manual_seed(self.seed))

    def to(self, device: torch.device) -> Tensor:
        return self.fill(torch.empty(self.shape, dtype=torch.uint8, device=device))


class Recordable(ABC):
    """A task whose step launches the same kernels for every batch of a size, and waits for none of them.

    Python runs while a step is recorded and not again: what :meth:`gradients` reads other than tensors stays what it was then, so
    what changes from step to step is part of the batch, or a tensor that is changed in place.
    """

    graph: BipartiteGraph
    batch: Callable[[int, int], Any]
    """`(epoch, step)` -> what the step is given: nested dataclasses of CPU tensors, :class:`RandomBytes` and plain values, with
    `to(device)`."""

    @abstractmethod
    def gradients(self, batch: Any) -> Terms:
        """The step, from such a batch on the device: leaves gradients, returns the terms of the loss, detached."""

    @abstractmethod
    def recordable(self, batch: Any) -> bool:
        """Whether the step can be recorded for this batch."""

    def step(self, epoch: int, step: int) -> Terms:
        """Draws the batch and makes the step. A subclass that has its own is not recorded."""
        return self.gradients(self.batch(epoch, step).to(self.graph.device))

    def in_parts(self, epoch: int, step: int) -> Terms:
        """The same step op by op, for who looks for where a number comes from."""
        return self.step(epoch, step)


class Steps:
    """What the loop makes: the gradients of a batch, then an update."""

    def __init__(self, task: Any, optimizer: torch.optim.Optimizer) -> None:
        self.task, self.optimizer = task, optimizer

    def gradients(self, epoch: int, step: int) -> Terms:
        """The terms of the loss, detached; gradients are in the parameters."""
        self.optimizer.zero_grad(set_to_none=True)
        return self.task.step(epoch, step)

    def update(self) -> None:
        self.optimizer.step()


@lru_cache
def _fields(kind: type) -> tuple[str, ...] | None:
    return tuple(field.name for field in fields(kind)) if is_dataclass(kind) and kind is not RandomBytes else None


def parts(tree: Any) -> list[Any]:
    """What nested dataclasses hold, in order."""
    names = _fields(type(tree))
    return [tree] if names is None else [part for name in names for part in parts(getattr(tree, name))]


def rebuilt(tree: T, replaced: Iterator[Any]) -> T:
    """The same dataclasses around other :func:`parts`."""
    names = _fields(type(tree))
    if names is None:
        return next(replaced)
    return type(tree)(**{name: rebuilt(getattr(tree, name), replaced) for name in names})


def size_of(held: list[Any]) -> tuple:
    """Shapes and plain values of a batch's :func:`parts`: what two batches have in common that one recording serves."""
    return tuple(
        (p.dtype, p.shape) if isinstance(p, Tensor) else p.shape if isinstance(p, RandomBytes) else p for p in held
    )


class _Outbox:
    """Memory of the host that the device copies from in its own time."""

    def __init__(self, like: Tensor, places: list[tuple[slice, Tensor]]) -> None:
        on_gpu = like.device.type == "cuda"
        self.flat = torch.empty(like.shape, dtype=like.dtype, pin_memory=on_gpu)
        self.parts = [self.flat[at].view(part.dtype).view(part.shape).numpy() for at, part in places]
        self._sent = torch.cuda.Event() if on_gpu else None

    def send(self, tensors: Iterable[Tensor], to: Tensor) -> None:
        if self._sent is not None:
            self._sent.synchronize()  # what was sent before has arrived
        for out, part in zip(self.parts, tensors, strict=True):
            out[...] = part.numpy()
        to.copy_(self.flat, non_blocking=True)
        if self._sent is not None:
            self._sent.record()


class Inputs(Generic[T]):
    """Tensors on a device that take one batch of a size after the other, each in one copy.

    Attributes:
        batch: of these tensors.
    """

    def __init__(self, like: T, device: torch.device) -> None:
        places, total = [], 0
        for part in parts(like):
            if isinstance(part, Tensor):
                places.append((slice(total, total + part.nbytes), part))
                total += -(-part.nbytes // _ALIGNED) * _ALIGNED
        self._flat = torch.empty(total, dtype=torch.uint8, device=device)
        there = iter([self._flat[at].view(part.dtype).view(part.shape) for at, part in places])
        drawn = [part for part in parts(like) if isinstance(part, RandomBytes)]
        self._random = [torch.empty(part.shape, dtype=torch.uint8, device=device) for part in drawn]
        random = iter(self._random)
        self.batch = rebuilt(
            like,
            iter(
                next(there) if isinstance(part, Tensor) else next(random) if isinstance(part, RandomBytes) else part
                for part in parts(like)
            ),
        )
        self._outboxes = cycle([_Outbox(self._flat, places) for _ in range(3)])  # the host runs ahead of the device

    def load(self, held: list[Any]) -> None:
        """Copies the :func:`parts` of a batch of the same size, without waiting for the device to make use of them."""
        next(self._outboxes).send((part for part in held if isinstance(part, Tensor)), self._flat)
        random = (part for part in held if isinstance(part, RandomBytes))
        for out, part in zip(self._random, random, strict=True):
            part.fill(out)


def cuda_graph() -> Callable[[Callable[[], T]], Callable[[], T]]:
    """A recorder of CUDA graphs that share memory: they must be played back one after the other."""
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def record(run: Callable[[], T]) -> Callable[[], T]:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # thread_local: what a logger or another user of the device does meanwhile is its own affair
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                result = run()
        finally:
            torch.cuda.set_stream(current)  # a recording that breaks off leaves its own

        def replay() -> T:
            graph.replay()
            return result

        return replay

    return record


@dataclass
class _Recording:
    """A step of one size."""

    inputs: Inputs
    gradients: Callable[[], tuple[list[str], Tensor, list[Tensor | None]]]
    update: Callable[[], object] | None = None
    rates: list | None = None  # that `update` was recorded with


class RecordedSteps(Steps):
    """Plays back the steps of a task; sizes that are new, or that cannot be recorded, are made as ever.

    Args:
        task, optimizer: of the stage. device: of the task's parameters.
        record: turns a function into one that does the same again with what its tensors then hold, :func:`cuda_graph` by
            default. Recording alone has no effect.
    """

    def __init__(
        self, task: Recordable, optimizer: torch.optim.Optimizer, device: torch.device,
        record: Callable[[Callable[[], T]], Callable[[], T]] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(task, optimizer)
        self.device, self._record = device, record or cuda_graph()
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._seen: Counter[tuple] = Counter()
        self._recordings: dict[tuple, _Recording] = {}
        self._playing: _Recording | None = None

    @property
    def recordings(self) -> int:
        """How many sizes are recorded."""
        return len(self._recordings)

    def gradients(self, epoch: int, step: int) -> Terms:
        batch = self.task.batch(epoch, step)
        self.optimizer.zero_grad(set_to_none=True)
        self._playing = self._recording_of(batch)
        if self._playing is None:
            return self.task.gradients(batch.to(self.device))
        names, values, grads = self._playing.gradients()
        for parameter, grad in zip(self._parameters, grads, strict=True):
            parameter.grad = grad
        return dict(zip(names, values.clone().unbind(), strict=True))  # the next step overwrites `values`

    def update(self) -> None:
        playing = self._playing
        if playing is None:
            self.optimizer.step()
            return
        rates = [(g["lr"], g["betas"], g["eps"], g["weight_decay"]) for g in self.optimizer.param_groups]
        if playing.update is None or playing.rates != rates:
            playing.update, playing.rates = self._recorded_update(), rates
        playing.update()

    def _recording_of(self, batch: Any) -> _Recording | None:
        """What plays back a step of this size, its inputs filled; made when the size is seen for the third time."""
        held = parts(batch)
        size = size_of(held)
        found = self._recordings.get(size)
        if found is None and self._worth(size, batch):
            found = self._tried(lambda: self._new(batch))
            if found is None:
                self.optimizer.zero_grad(set_to_none=True)  # of the attempt
                return None
            self._recordings[size] = found
        if found is not None:
            found.inputs.load(held)
        return found

    def _worth(self, size: tuple, batch: Any) -> bool:
        if self._record is None or len(self._recordings) >= MOST or not self.task.recordable(batch):
            return False
        self._seen[size] += 1
        return self._seen[size] > WARMUP

    def _new(self, batch: Any) -> _Recording:
        inputs = Inputs(batch, self.device)
        inputs.load(parts(batch))  # a graph is not run while it is recorded; whatever else records may be
        return _Recording(inputs, self._record(lambda: self._once(inputs.batch)))

    def _once(self, batch: Any) -> tuple[list[str], Tensor, list[Tensor | None]]:
        self.optimizer.zero_grad(set_to_none=True)
        terms = self.task.gradients(batch)
        return list(terms), torch.stack(list(terms.values())), [p.grad for p in self._parameters]

    def _recorded_update(self) -> Callable[[], object]:
        groups = self.optimizer.param_groups
        before = [group["capturable"] for group in groups]
        for group in groups:  # torch asks for it, and warns where it is set otherwise; fused, it changes nothing
            group["capturable"] = self.device.type == "cuda"
        replay = self._tried(lambda: self._record(self.optimizer.step))
        for group, was in zip(groups, before, strict=True):
            group["capturable"] = was
        return replay or self.optimizer.step

    def _tried(self, record: Callable[[], T]) -> T | None:
        """None, with a warning, where it cannot be; nothing more is recorded then, here or in a later stage: an attempt that
        breaks off leaves torch's allocator as it was in the middle of it."""
        global _refused
        if self._record is None:
            return None
        try:
            return record()
        except RuntimeError as error:  # something waits for the device, or there is no memory for it
            self._record, _refused = None, self.device.type == "cuda"
            log.warning(
                "stage %s: a step cannot be recorded, kernels are launched one by one: %s (cuda_graphs=false leaves it be)",
                self.task.name, error,
            )  # fmt: skip
            return None


_refused = False  # by a GPU, in this process


def steps_of(task: Any, optimizer: torch.optim.Optimizer, recorded: bool = True) -> Steps:
    """The steps of a task: played back where its parameters are on a GPU, the task allows it, and it is `recorded`."""
    device = next(task.model.parameters()).device
    can = isinstance(task, Recordable) and type(task).step is Recordable.step
    if recorded and can and device.type == "cuda" and not _refused:
        return RecordedSteps(task, optimizer, device)
    return Steps(task, optimizer)
