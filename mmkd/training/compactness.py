"""Time per epoch, memory and parameters of teacher and student (paper, Tables 6 and 8), each stage in a process of its own."""

from __future__ import annotations

import gc
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmkd.config import Config, StageConfig, load_config
from mmkd.data import Dataset, load_configured, synthetic
from mmkd.files import write_text
from mmkd.graph import BipartiteGraph
from mmkd.training.run_folder import RunFolder, versions
from mmkd.training.stage import Stage
from mmkd.training.tasks import TeacherTask
from mmkd.training.trainer import Run

STAGES = ("teacher", "student")
WARMUP = 3
_STATUS, _PEAK_RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(which: str = "VmRSS") -> int:
    """Bytes of this process in memory now (`VmRSS`) or at most since :func:`reset_peak` (`VmHWM`); Linux only."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    """Starts the high-water mark of :func:`resident` anew."""
    gc.collect()
    _PEAK_RESET.write_text("5")


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of some tensors, shared memory once."""
    return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def graph_bytes(graph: BipartiteGraph) -> int:
    """Bytes of the three CSRs and the scale."""
    return nbytes(t for t in vars(graph).values() if isinstance(t, Tensor))


class Clock:
    """A task's `batch` that notes when it is asked for one: once a step, made or played back."""

    def __init__(self, batch: Callable[[int, int], Any]) -> None:
        self._batch, self.starts = batch, []

    def __call__(self, epoch: int, step: int) -> Any:
        self.starts.append(time.perf_counter())
        return self._batch(epoch, step)

    def seconds_per_step(self) -> float:
        """Median time from one step's start to the next one's (step, optimizer, loop), the first few left out."""
        gaps = np.diff(self.starts)[WARMUP:]
        return float(statistics.median(gaps)) if len(gaps) else math.nan


def measure_stage(stage: str, run: Run, steps: int) -> dict[str, Any]:
    """Runs `steps` steps (at most an epoch) of one stage with two looks at validation and a checkpoint, as a run does.

    The teacher is not trained before the student's stage: time and memory do not depend on its weights.

    Args:
        run: not yet run; the only holder of its data set, or the features stay in memory.

    Returns:
        `step_seconds`, `steps_per_epoch`, `epoch_seconds` (their product), `parameters` (name -> shape), `held` (bytes of
        what the stage cannot do without) and `memory`: bytes resident when the stage begins (`start`), and at most during it
        (`peak`). On anything but Linux `memory` is empty.
    """
    measured = _STATUS.exists() and _PEAK_RESET.exists()
    config = run.config
    teacher = run.build_teacher()
    features = {f"{name} (features, frozen)": list(x.shape) for name, x in run.dataset.features.items()}
    names = list(run.dataset.features)
    if stage == "teacher":
        task: Any = TeacherTask(teacher, config, run.dataset, run.graph)
        parameters, model = _shapes(teacher, names, run.graph), teacher
        del teacher
    else:
        task = run.student_task(teacher, torch.full((len(names),), 1 / len(names), device=run.device))
        del teacher  # as in a run, it goes before the memory that it held is given back
        run.release_features()
        parameters, model = _shapes(task.student, names, run.graph), task.student
    settings: StageConfig = getattr(config, stage)
    steps_per_epoch = run.steps(settings)
    steps = max(2, min(steps, steps_per_epoch))
    clock, start = Clock(task.batch), 0
    task.batch = clock
    if measured:
        reset_peak()
        start = resident()
    Stage(task, settings, config, run.dataset, run.folder, steps).run()
    peak = resident("VmHWM") if measured else 0
    held = {"graph": graph_bytes(run.graph), "weights": nbytes(task.model.parameters())}
    held["optimizer"] = 2 * held["weights"]  # AdamW's two moments
    if stage == "student":
        held["constants"] = nbytes([*task.teacher.buffers()])
    else:
        held["features"] = sum(math.prod(shape) for shape in features.values()) * 4
    step = clock.seconds_per_step()
    return {
        "stage": stage, "step_seconds": step, "steps": steps, "steps_per_epoch": steps_per_epoch,
        "epoch_seconds": step * steps_per_epoch, "parameters": parameters, "features": features,
        "trainable": sum(p.numel() for p in model.parameters()), "held": held,
        "memory": {"start": start, "peak": peak} if measured else {},
    }  # fmt: skip


def _shapes(model: nn.Module, modalities: list[str], graph: BipartiteGraph) -> dict[str, list[int]]:
    """Parameter names and shapes as in Table 8: the node table by users and items, lists by modality."""
    shapes: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        head, _, tail = name.partition(".")
        if name == "table":
            for side, rows in (("user", graph.num_users), ("item", graph.num_items)):
                shapes[f"{side}_id_embedding"] = [rows, parameter.shape[1]]
        elif tail.isdigit():
            shapes[f"{modalities[int(tail)]}_projection.{head}"] = list(parameter.shape)
        else:
            shapes[name] = list(parameter.shape)
    return shapes


def compactness(config: Config, steps: int = 20, stages: Iterable[str] = STAGES) -> dict[str, Any]:
    """:func:`measure_stage` of each stage in a fresh process, so that neither sees the other's memory.

    Args:
        config: settings; `config.data` says what is loaded. `epochs`, `baselines` and `progress` are set here.
        steps: timed steps (plus a few to warm up); at most an epoch. The time of an epoch is that of a step times their number.

    Raises:
        RuntimeError: a process failed; its last line of output is in the message.
    """
    if steps < 2:
        raise ValueError(f"steps: expected at least 2, got {steps}")
    results = {}
    with tempfile.TemporaryDirectory(prefix="mmkd-compactness-") as scratch:
        settings = config.model_copy(deep=True)
        settings.baselines, settings.progress = (), False
        for stage in STAGES:
            getattr(settings, stage).epochs = 1
        write_text(Path(scratch) / "config.yaml", settings.to_yaml())
        for stage in stages:
            command = [sys.executable, "-m", "mmkd.training.compactness", stage, scratch, str(steps + WARMUP + 1)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"measuring the {stage} failed: {(done.stderr.strip() or '?').splitlines()[-1]}")
            results[stage] = json.loads(done.stdout.splitlines()[-1])
    return {
        "data": _about(results),
        "machine": {**versions(), "device": config.device},
        "settings": {"dim": config.dim},
        **results,
    }


def _about(results: dict[str, Any]) -> dict[str, Any]:
    first = next(iter(results.values()), {})
    return {key: first.pop(key) for key in ("name", "users", "items", "interactions") if key in first}


def table6(result: dict[str, Any]) -> str:
    """The paper's Table 6 as markdown: a line per model, ratio of trainable parameters to the teacher's, and, as the paper
    counts, to the teacher's with its feature tables."""
    lines = [
        "| model | time per epoch, s | peak memory, MB | of it for the run, MB | parameters | with features | ratio | ratio as in the paper |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    teacher = result.get("teacher")
    for name, label in (("teacher", "teacher"), ("student", "MMKD student")):
        if name not in result:
            continue
        r, memory = result[name], result[name]["memory"]
        own = r["trainable"]
        full = own + sum(math.prod(shape) for shape in r["features"].values()) if name == "teacher" else own
        ratios = ["-", "-"] if name == "teacher" or teacher is None else [
            f"{own / teacher['trainable']:.2%}",
            f"{own / (teacher['trainable'] + sum(math.prod(s) for s in teacher['features'].values())):.2%}",
        ]  # fmt: skip
        peaks = [f"{memory[k] / 1e6:,.0f}" for k in ("peak", "run")] if memory else ["?", "?"]
        lines.append(
            "| " + " | ".join([label, f"{r['epoch_seconds']:.2f}", *peaks, f"{own:,}", f"{full:,}", *ratios]) + " |"
        )
    return "\n".join(lines)


def table8(result: dict[str, Any]) -> str:
    """The paper's Table 8 as markdown: every tensor of teacher and student with its shape and number of entries."""
    blocks = []
    for name in STAGES:
        if name not in result:
            continue
        r = result[name]
        rows = {**r["parameters"], **(r["features"] if name == "teacher" else {})}
        lines = [f"| {name} | shape | number |", "| --- | --- | ---: |"]
        lines += [
            f"| {tensor} | {' x '.join(map(str, shape))} | {math.prod(shape):,} |" for tensor, shape in rows.items()
        ]
        lines.append(f"| total, trained | | {r['trainable']:,} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def memory_table(result: dict[str, Any]) -> str:
    """What the student's stage has to hold, and what it held."""
    held, memory = result["student"]["held"], result["student"]["memory"]
    total = sum(held.values())
    lines = ["| the student's stage holds | MB |", "| --- | ---: |"]
    lines += [f"| {name} | {size / 1e6:,.1f} |" for name, size in held.items()]
    lines.append(f"| together | {total / 1e6:,.1f} |")
    if memory:
        lines.append(
            f"| peak of the run, above interpreter and libraries | {memory['run'] / 1e6:,.1f} ({memory['run'] / total:.2f}x) |"
        )
    return "\n".join(lines)


def report(result: dict[str, Any]) -> str:
    """Tables 6 and 8 and the memory of the student's stage as one markdown text."""
    d, machine, student = result["data"], result["machine"], result.get("student") or result["teacher"]
    head = (
        f"{d['name']}: {d['users']:,} users, {d['items']:,} items, {d['interactions']:,} train interactions; "
        f"d = {result['settings']['dim']}; {machine['threads']} threads, torch {machine['torch']}, {machine['platform']}. An epoch is "
        f"{student['steps_per_epoch']} steps (student); its time is the median of {student['steps'] - WARMUP - 1} timed steps "
        "times their number, without validation."
    )
    parts = [head, table6(result), table8(result)] + ([memory_table(result)] if "student" in result else [])
    return "\n\n".join(parts) + "\n"


def _open(config: Config, folder: Path, dataset: Dataset | None = None) -> Run:
    dataset = dataset or load_configured(config.data, config.seed)
    return Run(config, dataset, RunFolder.start(folder, config, dataset, resume=False))


def _warm(config: Config, folder: Path) -> None:
    """Loads and starts what any run needs (libraries, thread pool), so that it is not counted as the run's memory."""
    tiny = config.model_copy(update={"dim": 8}, deep=True)
    for stage in STAGES:
        measure_stage(stage, _open(tiny, folder / f"warm-{stage}", synthetic(60, 50, 600)), 2)


def main(stage: str, scratch: str, steps: str) -> None:
    """The measured process: `python -m mmkd.training.compactness STAGE FOLDER STEPS` prints one line of JSON."""
    config = load_config(Path(scratch) / "config.yaml")
    if config.threads:
        torch.set_num_threads(config.threads)
    _warm(config, Path(scratch) / stage)
    base = resident() if _STATUS.exists() else 0
    run = _open(config, Path(scratch) / stage / "run")
    d = run.dataset
    about = {"name": d.name, "users": d.num_users, "items": d.num_items, "interactions": int(d.train.nnz)}
    del d
    result = measure_stage(stage, run, int(steps))
    if result["memory"]:
        result["memory"] |= {"base": base, "run": result["memory"]["peak"] - base}
    print(json.dumps({**about, **result}))


if __name__ == "__main__":
    main(*sys.argv[1:])
