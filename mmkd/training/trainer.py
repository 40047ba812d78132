"""The main job: baselines, teacher, student, one run folder (paper, Algorithm 1)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mmkd.config import Config, ConfigError, StageConfig, load_config
from mmkd.data import Dataset, load_configured
from mmkd.evaluation import evaluate, evaluate_scores
from mmkd.files import write_atomic
from mmkd.graph import BipartiteGraph
from mmkd.memory import release
from mmkd.models.baselines import COUNTED, TITLES, TRAINED, ItemKNN
from mmkd.models.features import FeatureTable
from mmkd.models.lightgcn import LightGCN, initial_table, matching_table
from mmkd.models.neighbors import NeighborGraph, neighbor_graph, neighbor_vectors
from mmkd.models.prompt import Prompt, mean_components, principal_components
from mmkd.models.student import ENCODERS
from mmkd.models.teacher import Teacher
from mmkd.training.baseline_task import BaselineTask
from mmkd.training.collapse import FrozenTeacher
from mmkd.training.fusion import Gate, knows_taste
from mmkd.training.loggers import Logger, make_loggers
from mmkd.training.run_folder import RunFolder
from mmkd.training.stage import Stage, StageResult, seeded
from mmkd.training.stop import Stop
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
    loggers: Iterable[Logger] = (),
    stop: Stop | None = None,
) -> RunResult:
    """Trains the teacher, distils it into a LightGCN student, and compares with the baselines of the configuration.

    With `model` other than `mmkd` only that model is trained and compared; the run folder is the same.

    Args:
        config: settings, a mapping of some of them, or a YAML file; all have defaults.
        out: run folder, `runs/<data>-<time>` by default. Must not hold a run unless `resume`.
        resume: go on with an interrupted run; on a CPU the final weights equal those of an uninterrupted one bit for bit.
        dataset: a data set that is already loaded; otherwise `config.data` says what to load.
        overrides: `["teacher.lr=1e-3", ...]`, applied last.
        loggers: further receivers of the metrics, beside those that the setting `log` names.
        stop: `stop.request()`, from another thread or a signal handler, ends the run after the step at hand.

    Returns:
        RunResult. Weights are chosen on validation; the test part, where there is one, is read once, at the end.

    Raises:
        ConfigError, DataError, RunError, TrainingError, CheckpointError, WriteError: with the setting, file or term
            concerned. RunStopped: `stop` was requested; the checkpoint is saved.
    """
    settings = load_config(config, overrides)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if dataset is None:
        dataset = load_configured(settings.data, settings.seed)
    _check_features(settings, dataset)
    listening = [*make_loggers(settings.log), *loggers]
    folder = RunFolder.start(out, settings, dataset, resume)
    with folder.held(listening):
        run = Run(settings, dataset, folder, stop or Stop())
        del dataset  # the run lets go of the features when the student's stage begins; nothing else here may hold them
        return run.run()


def _check_features(settings: Config, dataset: Dataset) -> None:
    for name in (settings.model, *settings.baselines):
        needs = name in ("mmkd", "teacher") or (name in TRAINED and TRAINED[name].needs_features)
        if needs and not dataset.features:
            raise ConfigError(
                f"data set {dataset.name!r} has no item features, which {name} learns from; add <modality>_feat.npy, "
                "or train a model of ids alone, e.g. model=lightgcn"
            )


def pick_device(wanted: str) -> torch.device:
    """`auto`, `cpu` or `cuda` as a device; raises ConfigError where CUDA was asked for and torch has none."""
    has = torch.cuda.is_available()
    if wanted == "cuda" and not has:
        raise ConfigError("device=cuda: torch sees no CUDA device; use device=cpu, or install a CUDA build of torch")
    return torch.device("cuda" if wanted == "cuda" or (wanted == "auto" and has) else "cpu")


@dataclass(frozen=True)
class Trained:
    """One trained model of a run.

    Attributes:
        name: as in the registry. parameters: numbers stored. seconds: training time.
        score: metrics of a part, `"val"` or `"test"`.
        tables: final user and item embeddings; None for a model that has none.
        layer0: `[N, d]` table before propagation, where the model is one.
    """

    name: str
    parameters: int
    seconds: float
    score: Callable[[str], dict[str, float]]
    tables: tuple[Tensor, Tensor] | None = None
    layer0: Tensor | None = None


class Run:
    """Everything one run trains; `run` does all of it, the other public methods are its steps."""

    def __init__(self, config: Config, dataset: Dataset, folder: RunFolder, stop: Stop | None = None) -> None:
        self.config, self.dataset, self.folder, self.stop = config, dataset, folder, stop or Stop()
        self.device = pick_device(config.device)
        self.compute = torch.bfloat16 if config.amp == "bf16" else None
        self.graph: BipartiteGraph = dataset.graph().to(self.device)
        self.heads: dict[str, float] = {}

    def run(self) -> RunResult:
        self.folder.write_ids(self.dataset)
        model = self.config.model
        names = dict.fromkeys((*self.config.baselines, *(("teacher",) if model == "mmkd" else ()), model))
        trained = [self._train(name) for name in names]
        self._save_served(next(t for t in trained if t.name == model))
        return self._report(trained)

    def _train(self, name: str) -> Trained:
        if name == "mmkd":
            return self._mmkd()
        if name == "teacher":
            teacher, seconds = self._teacher
            return Trained(name, _count(teacher), seconds, *self._scored(teacher.tables()))
        if name == "lightgcn":
            model, result = self._lightgcn()
            tables = model.tables()
            return Trained(name, model.table.numel(), result.seconds, *self._scored(tables), model.table)
        return self._counted(name) if name in COUNTED else self._baseline(name)

    def _scored(self, tables: tuple[Tensor, Tensor]) -> tuple[Callable[[str], dict[str, float]], tuple[Tensor, Tensor]]:
        return lambda part: evaluate(*tables, self.dataset, part, self.config.evaluation.ks), tables

    def _counted(self, name: str) -> Trained:
        start, ks = time.perf_counter(), self.config.evaluation.ks
        model = (ItemKNN(metric="recall@20") if name == "item-knn" else COUNTED[name]()).fit(self.dataset)
        seconds = time.perf_counter() - start
        return Trained(
            name, model.num_parameters, seconds, lambda part: evaluate_scores(model.scores, self.dataset, part, ks)
        )

    def _baseline(self, name: str) -> Trained:
        start, kind = time.perf_counter(), TRAINED[name]
        settings = kind.Settings.model_validate(self.config.models[name])
        features = self._features() if kind.needs_features else []
        model = kind(self.graph, features, self.config.dim, settings, seeded(self.config.seed, 0, 0, tag=8)).to(
            self.device
        )
        preparation = time.perf_counter() - start
        result = self._stage(BaselineTask(name, model, self.dataset, self.config.seed + 3), settings)
        return Trained(name, _count(model), preparation + result.seconds, *self._scored(model.tables()))

    def _lightgcn(self) -> tuple[LightGCN, StageResult]:
        s = self.config.lightgcn
        table = initial_table(self.graph.num_nodes, self.config.dim, s.init, seeded(self.config.seed, 0, 0, tag=3))
        model = LightGCN(self.graph, table, s.layers, self.compute).to(self.device)
        task = LightGCNTask(model, s, self.dataset, self.graph, self.config.seed + 2)
        return model, self._stage(task, s)

    def steps(self, settings: StageConfig) -> int:
        """Batches in an epoch."""
        return -(-self.dataset.train.nnz // settings.batch_size)

    def _stage(self, task, settings: StageConfig, before_look: Callable[[], object] | None = None) -> StageResult:
        steps = self.steps(settings)
        result = Stage(task, settings, self.config, self.dataset, self.folder, steps, self.stop, before_look).run()
        best = (
            ""
            if result.best_metric is None
            else f", validation {self.config.evaluation.metric} {result.best_metric:.4f}"
        )
        log.info("%s: %d epochs, best %d%s, %.1f s", task.name, result.epochs, result.best_epoch, best, result.seconds)
        return result

    def _features(self) -> list[FeatureTable]:
        t = self.config.teacher
        return [
            FeatureTable(name, x, t.features, compute=t.feature_compute, loaded=t.feature_memory == "loaded").to(
                self.device
            )
            for name, x in self.dataset.features.items()
        ]

    def build_teacher(self) -> Teacher:
        """The untrained teacher with its prompt."""
        c, seed, tables = self.config, self.config.seed, self._features()
        components = [principal_components(table, c.dim, seed) for table in tables]  # [I, d] each
        prompt = Prompt(mean_components(components), seeded(seed, 0, 0, tag=4))
        return Teacher(
            self.graph, tables, prompt, layers=c.teacher.layers,
            feature_layers=c.teacher.feature_layers, feature_weight=c.teacher.feature_weight, strength=c.prompt.strength,
            norm=c.prompt.norm, init=c.teacher.init, generator=seeded(seed, 0, 0, tag=5), compute=self.compute,
            neighbors=self._neighbors(tables, components),
        ).to(self.device)  # fmt: skip

    def _neighbors(self, tables: list[FeatureTable], components: list[Tensor]) -> list[NeighborGraph]:
        """The neighbour graphs of the modalities, without those that know nothing."""
        k, metric = self.config.teacher.neighbors, self.config.evaluation.metric
        if not k:
            return []
        pairs = zip(tables, components, strict=True)
        graphs = [neighbor_graph(neighbor_vectors(*pair).to(self.device), k) for pair in pairs]
        if self._gated:
            graphs = [graph for graph in graphs if knows_taste(graph, self.dataset, metric)]
            log.info("teacher: the neighbour graphs of %d of %d modalities", len(graphs), len(components))
        return graphs

    @cached_property
    def _teacher(self) -> tuple[Teacher, float]:
        """The trained teacher and its training time; `heads` is filled in."""
        c, start = self.config, time.perf_counter()
        teacher = self.build_teacher()
        preparation = time.perf_counter() - start
        result = self._stage(TeacherTask(teacher, c, self.dataset, self.graph), c.teacher, self._gate(teacher))
        weights = {name: p.detach().cpu().contiguous() for name, p in teacher.named_parameters()}
        write_atomic(self.folder.path / "teacher.safetensors", lambda temporary: save_file(weights, temporary))
        self.heads = self._head_recall(teacher)
        return teacher, preparation + result.seconds

    @property
    def _gated(self) -> bool:
        """Whether validation says what a modality counts for."""
        part = self.dataset.val
        return self.config.teacher.fusion == "validation" and part is not None and part.nnz > 0

    def _gate(self, teacher: Teacher) -> Gate | None:
        t = self.config.teacher
        if not self._gated:
            return None
        return Gate(teacher, self.dataset, self.config.evaluation.metric, t.feature_weight, t.fusion_power)

    def _head_recall(self, teacher: Teacher) -> dict[str, float]:
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

    def _modality_weights(self) -> Tensor:
        d, names, heads = self.config.distill, list(self.dataset.features), self.heads
        weights = torch.full((len(names),), 1.0 / len(names))
        if d.modality_weights == "validation" and heads.get(""):
            share = torch.tensor([min(1.0, heads[name] / heads[""]) for name in names])
            weights *= share**d.modality_power
        return weights.to(self.device)

    def student_task(self, teacher: Teacher, modality_weights: Tensor) -> StudentTask:
        """What the second stage trains: the student, and the prompt through the frozen `teacher`."""
        c = self.config
        frozen = FrozenTeacher(teacher, learn_prompt=c.prompt.lr > 0).to(self.device)
        if c.student.init == "match" and c.student.encoder != "mlp":
            table = matching_table(self.graph, torch.cat(teacher.tables()), c.student.layers)
        elif c.student.init in ("match", "teacher"):
            table = torch.cat(teacher.tables())
        else:
            table = initial_table(self.graph.num_nodes, c.dim, c.student.init, seeded(c.seed, 0, 0, tag=6))
        student = ENCODERS[c.student.encoder](self.graph, table, c.student.layers, self.compute).to(self.device)
        return StudentTask(student, frozen, c, self.dataset, self.graph, modality_weights)

    def release_features(self) -> None:
        """Lets go of teacher and item features, mapped or not: the student's stage reads none."""
        self.__dict__.pop("_teacher", None)
        self.dataset = replace(self.dataset, features={})
        release()

    def _mmkd(self) -> Trained:
        task = self.student_task(self._teacher[0], self._modality_weights())
        self.release_features()  # the last model of a run
        seconds = self._stage(task, self.config.student).seconds
        student = task.student
        return Trained("mmkd", _count(student), seconds, *self._scored(student.tables()), student.table)

    def _save_served(self, model: Trained) -> None:
        if model.tables is not None:
            save_student(self.folder, model.tables, model.layer0)

    def _report(self, trained: list[Trained]) -> RunResult:
        # The only place where the test part is read.
        parts = [p for p in ("test", "val") if (m := getattr(self.dataset, p)) is not None and m.nnz]
        part = parts[0] if parts else "none"
        rows = [Row(TITLES[t.name], t.score(part) if parts else {}, t.parameters, t.seconds) for t in trained]
        table = write_summary(self.folder, self.dataset, rows, part, self.heads, self.config)
        metrics = {row.method: row.metrics for row in rows}
        self.folder.update_info(
            part=part, results=metrics, heads={k or "teacher": v for k, v in self.heads.items()},
            parameters={row.method: row.parameters for row in rows},
            seconds={row.method: round(row.seconds, 2) for row in rows}, finished=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        )  # fmt: skip
        return RunResult(self.folder.path, metrics, part, table)


def save_student(folder: RunFolder, tables: tuple[Tensor, Tensor], layer0: Tensor | None) -> Path:
    """Writes `student.safetensors`, what `mmkd recommend`, `eval`, `export` and `update` read: final rows, and layer-0
    rows where the model has them."""
    named = dict(zip(("user_emb", "item_emb"), tables, strict=True))
    if layer0 is not None:
        named |= dict(zip(("user_emb0", "item_emb0"), layer0.detach().split([len(t) for t in tables]), strict=True))
    ready = {name: t.cpu().contiguous().clone() for name, t in named.items()}
    path = folder.path / "student.safetensors"
    write_atomic(path, lambda temporary: save_file(ready, temporary))
    return path


def _count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
