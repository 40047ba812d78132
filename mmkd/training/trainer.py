"""The main job: baselines, teacher, student, one run folder (paper, Algorithm 1)."""

from __future__ import annotations

import ctypes
import gc
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmkd.config import Config, ConfigError, StageConfig, load_config
from mmkd.data import Dataset, load
from mmkd.evaluation import evaluate, evaluate_scores
from mmkd.files import write_atomic
from mmkd.graph import BipartiteGraph
from mmkd.models.baselines import ItemKNN, Popularity
from mmkd.models.features import FeatureTable
from mmkd.models.lightgcn import LightGCN, initial_table
from mmkd.models.prompt import Prompt, prompt_basis
from mmkd.models.teacher import Teacher
from mmkd.training.collapse import FrozenTeacher
from mmkd.training.run_folder import RunFolder
from mmkd.training.stage import Stage, StageResult, seeded
from mmkd.training.summary import Row, write_summary
from mmkd.training.tasks import LightGCNTask, StudentTask, TeacherTask

log = logging.getLogger("mmkd")


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder, the rows of its summary (method -> metrics) and the text of the table."""

    path: Path
    rows: dict[str, dict[str, float]]
    part: str
    table: str

    def recommend(self, users, k: int = 10) -> list:
        """`mmkd.load(path).recommend(users, k)`."""
        from mmkd.serving import load as load_run

        return load_run(self.path).recommend(users, k)


def train(
    config: Config | Mapping[str, Any] | str | Path | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    dataset: Dataset | None = None,
    overrides: list[str] | tuple[str, ...] = (),
) -> RunResult:
    """Trains the teacher, distils it into a LightGCN student, and compares with the baselines of the configuration.

    Args:
        config: settings, a mapping of some of them, or a YAML file; all have defaults.
        out: run folder, `runs/<data>-<time>` by default. Must not hold a run unless `resume`.
        resume: go on with an interrupted run; on a CPU the final weights equal those of an uninterrupted one bit for bit.
        dataset: a data set that is already loaded; otherwise `config.data` says what to load.
        overrides: `["teacher.lr=1e-3", ...]`, applied last.

    Returns:
        RunResult. Weights are chosen on validation; the test part, where there is one, is read once, at the end.

    Raises:
        ConfigError, DataError, RunError, TrainingError, CheckpointError: with the setting, file or term concerned.
    """
    settings = load_config(config, overrides)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if dataset is None:
        d = settings.data
        dataset = load(d.path, format=d.format, split=d.split, seed=settings.seed, **d.options)
    if not dataset.features:
        raise ConfigError(
            f"data set {dataset.name!r} has no item features, so there is no teacher to learn from; add <modality>_feat.npy"
        )
    run = TwoStages(settings, dataset, RunFolder.start(out, settings, dataset, resume))
    del dataset  # the run lets go of the features when the student's stage begins; nothing else here may hold them
    return run.run()


def pick_device(wanted: str) -> torch.device:
    """`auto`, `cpu` or `cuda` as a device; raises ConfigError where CUDA was asked for and torch has none."""
    has = torch.cuda.is_available()
    if wanted == "cuda" and not has:
        raise ConfigError("device=cuda: torch sees no CUDA device; use device=cpu, or install a CUDA build of torch")
    return torch.device("cuda" if wanted == "cuda" or (wanted == "auto" and has) else "cpu")


class TwoStages:
    """Baselines, teacher and student of one run; `run` does all of it, the other methods are its steps."""

    def __init__(self, config: Config, dataset: Dataset, folder: RunFolder) -> None:
        self.config, self.dataset, self.folder = config, dataset, folder
        self.device = pick_device(config.device)
        self.graph: BipartiteGraph = dataset.graph().to(self.device)
        self.rows: list[Row] = []

    def steps(self, settings: StageConfig) -> int:
        """Batches in an epoch."""
        return -(-self.dataset.train.nnz // settings.batch_size)

    def run(self) -> RunResult:
        self.folder.write_ids(self.dataset)
        final: list[tuple[str, int, float, Callable[[str], dict[str, float]]]] = []
        for name in self.config.baselines:
            final.append(self._baseline(name))
        teacher, seconds = self._teacher()
        final.append(("teacher", _count(teacher), seconds, self._scorer(self._keep("teacher", teacher.tables()))))
        heads = self._heads(teacher)
        task = self.student_task(teacher, self._modality_weights(heads))
        del teacher
        self.release_features()
        stage = self._stage(task, self.config.student)
        path = save_student(self.folder, task.student, task.tables())
        final.append(("MMKD student", task.student.table.numel(), stage.seconds, self._scorer(path)))
        return self._report(final, heads)

    def release_features(self) -> None:
        """Lets go of the item features, mapped or not: the student's stage reads none."""
        self.dataset = replace(self.dataset, features={})
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps freed blocks below 32 MB otherwise
        if trim is not None:
            trim(0)

    def _keep(self, name: str, tables: tuple[Tensor, Tensor]) -> Path:
        """Writes a model's final tables, so that they need not stay in memory until the end."""
        path = self.folder.path / "checkpoints" / f"{name}-tables.safetensors"
        ready = {f"{side}_emb": t.cpu().contiguous().clone() for side, t in zip(("user", "item"), tables, strict=True)}
        write_atomic(path, lambda temporary: save_file(ready, temporary))
        return path

    def _scorer(self, path: Path) -> Callable[[str], dict[str, float]]:
        """Evaluates the tables in a file when it is called."""

        def score(part: str) -> dict[str, float]:
            saved = load_file(path, device=str(self.device))
            return evaluate(saved["user_emb"], saved["item_emb"], self.dataset, part, self.config.evaluation.ks)

        return score

    def _baseline(self, name: str) -> tuple[str, int, float, Callable[[str], dict[str, float]]]:
        start, ks = time.perf_counter(), self.config.evaluation.ks
        if name == "lightgcn":
            model, result = self._lightgcn()
            return "LightGCN", model.table.numel(), result.seconds, self._scorer(self._keep(name, model.tables()))
        model = (Popularity() if name == "popularity" else ItemKNN(metric="recall@20")).fit(self.dataset)
        seconds = time.perf_counter() - start
        return name, model.num_parameters, seconds, lambda part: evaluate_scores(model.scores, self.dataset, part, ks)

    def _lightgcn(self) -> tuple[LightGCN, StageResult]:
        s = self.config.lightgcn
        table = initial_table(self.graph.num_nodes, self.config.dim, s.init, seeded(self.config.seed, 0, 0, tag=3))
        model = LightGCN(self.graph, table, s.layers).to(self.device)
        task = LightGCNTask(model, s, self.dataset, self.graph, self.config.seed + 2)
        return model, self._stage(task, s)

    def _stage(self, task, settings: StageConfig) -> StageResult:
        result = Stage(task, settings, self.config, self.dataset, self.folder, self.steps(settings)).run()
        best = (
            ""
            if result.best_metric is None
            else f", validation {self.config.evaluation.metric} {result.best_metric:.4f}"
        )
        log.info("%s: %d epochs, best %d%s, %.1f s", task.name, result.epochs, result.best_epoch, best, result.seconds)
        return result

    def build_teacher(self) -> Teacher:
        """The untrained teacher with its prompt."""
        c, seed = self.config, self.config.seed
        tables = [FeatureTable(name, x, c.teacher.features) for name, x in self.dataset.features.items()]
        prompt = Prompt(prompt_basis(tables, c.dim, seed), seeded(seed, 0, 0, tag=4))
        return Teacher(
            self.graph, [t.to(self.device) for t in tables], prompt, layers=c.teacher.layers,
            feature_layers=c.teacher.feature_layers, feature_weight=c.teacher.feature_weight, strength=c.prompt.strength,
            norm=c.prompt.norm, init=c.teacher.init, generator=seeded(seed, 0, 0, tag=5),
        ).to(self.device)  # fmt: skip

    def _teacher(self) -> tuple[Teacher, float]:
        c = self.config
        start = time.perf_counter()
        teacher = self.build_teacher()
        preparation = time.perf_counter() - start
        result = self._stage(TeacherTask(teacher, c, self.dataset, self.graph), c.teacher)
        weights = {name: p.detach().cpu().contiguous() for name, p in teacher.named_parameters()}
        write_atomic(self.folder.path / "teacher.safetensors", lambda temporary: save_file(weights, temporary))
        return teacher, preparation + result.seconds

    def _heads(self, teacher: Teacher) -> dict[str, float]:
        """Validation recall@20 of every modality's own head `F_u^m . F_i^m`, and of the whole teacher under ''."""
        if self.dataset.val is None or not self.dataset.val.nnz:
            return {}
        with torch.no_grad():
            out = teacher()
        recall = {"": evaluate(*teacher.tables(), self.dataset, "val", (20,))["recall@20"]}
        for name, users, items in zip(self.dataset.features, out.users, out.items, strict=True):
            recall[name] = evaluate(users, items, self.dataset, "val", (20,))["recall@20"]
            log.info("modality head %s: validation recall@20 %.4f", name, recall[name])
        return recall

    def _modality_weights(self, heads: dict[str, float]) -> Tensor:
        d, names = self.config.distill, list(self.dataset.features)
        weights = torch.full((len(names),), 1.0 / len(names))
        if d.modality_weights == "validation" and heads.get(""):
            share = torch.tensor([min(1.0, heads[name] / heads[""]) for name in names])
            weights *= share**d.modality_power
        return weights.to(self.device)

    def student_task(self, teacher: Teacher, modality_weights: Tensor) -> StudentTask:
        """What trains the student; of the teacher it keeps the collapsed constants and the prompt only."""
        c = self.config
        if c.student.init == "teacher":
            table = torch.cat(teacher.tables())
        else:
            table = initial_table(self.graph.num_nodes, c.dim, c.student.init, seeded(c.seed, 0, 0, tag=6))
        student = LightGCN(self.graph, table, c.student.layers).to(self.device)
        frozen = FrozenTeacher(teacher).to(self.device)
        return StudentTask(student, frozen, c, self.dataset, self.graph, modality_weights)

    def _report(self, final: list, heads: dict[str, float]) -> RunResult:
        # The only place where the test part is read.
        part = "test" if self.dataset.test is not None and self.dataset.test.nnz else "val"
        if part == "val" and not heads:
            part = "none"
        self.rows = [Row(name, score(part) if part != "none" else {}, params, s) for name, params, s, score in final]
        table = write_summary(self.folder, self.dataset, self.rows, part, heads, self.config)
        metrics = {row.method: row.metrics for row in self.rows}
        self.folder.update_info(
            part=part, results=metrics, heads={k or "teacher": v for k, v in heads.items()},
            seconds={row.method: round(row.seconds, 2) for row in self.rows}, finished=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        )  # fmt: skip
        return RunResult(self.folder.path, metrics, part, table)


def save_student(folder: RunFolder, student: LightGCN, tables: tuple[Tensor, Tensor]) -> Path:
    """`student.safetensors`: final tables `user_emb`, `item_emb` and the layer-0 rows `user_emb0`, `item_emb0`."""
    layer0 = student.table.detach().split([student.graph.num_users, student.graph.num_items])
    named = dict(zip(("user_emb", "item_emb", "user_emb0", "item_emb0"), (*tables, *layer0), strict=True))
    ready = {name: t.cpu().contiguous().clone() for name, t in named.items()}
    return write_atomic(folder.path / "student.safetensors", lambda temporary: save_file(ready, temporary))


def _count(teacher: Teacher) -> int:
    return sum(p.numel() for p in teacher.parameters())
