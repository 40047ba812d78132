"""Whole epochs of both stages, and the evaluation of all users, at the sizes of the paper's three data sets.

An epoch is `Stage`'s own loop: batches drawn, steps, sums of the losses, checks for NaN. The figures it is held to are
the paper's seconds an epoch of the student (Table 6, an RTX 3090).
"""

from __future__ import annotations

import time

import pytest
import steps
import torch
from harness import ROWS, Row

from mmkd.evaluation import evaluate
from mmkd.training.recorded import steps_of
from mmkd.training.run_folder import RunFolder
from mmkd.training.stage import Stage

STUDENT_SECONDS = {"netflix": 23.3, "electronics": 13.9}
EVALUATION_SECONDS = {"netflix": 2.0}


class _NoBar:
    def update(self) -> None: ...


def record(op: str, case: str, seconds: float, limit: float | None) -> None:
    # The limit stands where a rival's time does: a ratio above 1 is within it.
    rivals = {} if limit is None else {"limit": limit * 1e3}
    ratios = {} if limit is None else {"limit": limit / seconds}
    ROWS.append(Row(op, case, seconds * 1e3, 0.0, rivals, ratios, target={name: 1.0 for name in rivals}))


def epoch_seconds(pair: steps.Pair, name: str, tmp_path, stage: str, warmup: int = 3) -> float:
    """Seconds of an epoch by the stage's loop, after `warmup` steps of another."""
    config = steps.config()
    folder, count = RunFolder(tmp_path), pair.task.sampler.num_steps
    loop = Stage(pair.task, getattr(config, stage), config, steps.dataset(name), folder, count)
    made = steps_of(pair.task, pair.optimizer)
    for step in range(warmup):
        made.gradients(0, step)
        made.update()
    start = time.perf_counter()
    losses = loop._epoch(made, {"epoch": 1, "step": 0}, {}, _NoBar())
    seconds = time.perf_counter() - start
    assert all(value == value for value in losses.values())
    return seconds


@pytest.mark.parametrize("name", ["tiktok", "netflix", "electronics"])
def bench_student_epoch(tmp_path, name):
    seconds = epoch_seconds(steps.student(name), name, tmp_path, "student")
    record("student epoch", f"{name} L=2 B=1024", seconds, STUDENT_SECONDS.get(name))


@pytest.mark.parametrize("name", ["tiktok", "netflix", "electronics"])
def bench_teacher_epoch(tmp_path, name):
    seconds = epoch_seconds(steps.teacher_step(name), name, tmp_path, "teacher")
    record("teacher epoch", f"{name} L=2 B=1024", seconds, None)


@pytest.mark.parametrize("name", ["tiktok", "netflix", "electronics"])
def bench_evaluation(name):
    data = steps.dataset(name)
    users, items = (torch.randn(n, steps.DIM) for n in (data.num_users, data.num_items))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        evaluate(users, items, data, "val", (10, 20, 50))
        times.append(time.perf_counter() - start)
    record("evaluation", f"{name} all users, cut-offs to 50", sorted(times)[1], EVALUATION_SECONDS.get(name))
