"""Where the numbers of a run go besides `metrics.jsonl`: TensorBoard, Weights & Biases, MLflow, or an object of yours.

A logger only looks on. One that fails is reported once and dropped; training goes on, and `metrics.jsonl` has every line.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

LOGGERS = ("tensorboard", "wandb", "mlflow")


class Logger(Protocol):
    """What :func:`mmkd.train` calls, in this order; a resumed run starts again, under the same `key`."""

    def start(self, folder: Path, key: str, settings: Mapping[str, Any]) -> None:
        """A run begins or goes on.

        Args:
            folder: its run folder. key: hex text, the same for every resumption of this run and for no other.
            settings: every setting with its dotted name.
        """

    def metrics(self, stage: str, epoch: int, values: Mapping[str, float]) -> None:
        """One epoch (from 1) of a stage: the loss, its terms, seconds, and validation metrics where they were computed."""

    def finish(self, results: Mapping[str, Mapping[str, float]] | None) -> None:
        """The run is over: method -> metric -> value, or None where it stopped before the end."""


class Loggers:
    """Some loggers as one that never raises."""

    def __init__(self, loggers: Iterable[Logger] = ()) -> None:
        self.active = list(loggers)

    def start(self, folder: Path, started: str, settings: Mapping[str, Any]) -> None:
        """Starts all; `started` is when the run began for the first time."""
        key = hashlib.sha256(f"{Path(folder).resolve()}|{started}".encode()).hexdigest()[:16]
        self._call("start", folder, key, dict(_dotted(settings)))

    def metrics(self, stage: str, epoch: int, values: Mapping[str, float]) -> None:
        """Passes one epoch on."""
        self._call("metrics", stage, epoch, values)

    def finish(self, results: Mapping[str, Mapping[str, float]] | None) -> None:
        """Ends all of them; later calls do nothing."""
        self._call("finish", results)
        self.active = []

    def _call(self, name: str, *args: Any) -> None:
        for logger in list(self.active):
            try:
                getattr(logger, name)(*args)
            except Exception as error:
                self.active.remove(logger)
                what = f"{type(error).__name__}: {error}"
                warnings.warn(f"{type(logger).__name__} is dropped: {name}() failed with {what}", stacklevel=2)


class TensorBoardLogger:
    """Event files in `<run folder>/tensorboard`; needs tensorboard (extra `log`)."""

    def __init__(self) -> None:
        with _needed("tensorboard", "log"):
            from torch.utils.tensorboard import SummaryWriter
        self._open = SummaryWriter

    def start(self, folder: Path, key: str, settings: Mapping[str, Any]) -> None:
        self.writer = self._open(str(folder / "tensorboard"))
        rows = "".join(f"| {name} | {value} |\n" for name, value in settings.items())
        self.writer.add_text("settings", f"| setting | value |\n| --- | --- |\n{rows}")

    def metrics(self, stage: str, epoch: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(f"{stage}/{name}", value, epoch)
        self.writer.flush()

    def finish(self, results: Mapping[str, Mapping[str, float]] | None) -> None:
        for tag, value in _flat(results):
            self.writer.add_scalar(tag, value, 0)
        self.writer.close()


class WandbLogger:
    """One Weights & Biases run; project, entity and mode come from W&B's own environment variables. Extra `wandb`."""

    def __init__(self) -> None:
        with _needed("wandb", "wandb"):
            import wandb
        self.wandb = wandb

    def start(self, folder: Path, key: str, settings: Mapping[str, Any]) -> None:
        self.run = self.wandb.init(
            dir=str(folder), id=key, name=folder.name, config=dict(settings), resume="allow", reinit="finish_previous"
        )

    def metrics(self, stage: str, epoch: int, values: Mapping[str, float]) -> None:
        self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/epoch")
        self.run.log({f"{stage}/epoch": epoch, **{f"{stage}/{name}": value for name, value in values.items()}})

    def finish(self, results: Mapping[str, Mapping[str, float]] | None) -> None:
        self.run.summary.update(dict(_flat(results)))
        self.run.finish(exit_code=int(results is None))


class MlflowLogger:
    """One MLflow run, found again by its tag `mmkd` when resumed; MLFLOW_TRACKING_URI says where. Extra `mlflow`."""

    def __init__(self) -> None:
        with _needed("mlflow", "mlflow"):
            from mlflow import MlflowClient
        self._client = MlflowClient

    def start(self, folder: Path, key: str, settings: Mapping[str, Any]) -> None:
        import os

        self.client = self._client()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "mmkd")
        known = self.client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self.client.create_experiment(name)
        before = self.client.search_runs([experiment], f"tags.mmkd = '{key}'")
        run = before[0] if before else self.client.create_run(experiment, run_name=folder.name, tags={"mmkd": key})
        self.id = run.info.run_id
        self.client.update_run(self.id, status="RUNNING")
        for setting, value in settings.items():
            if setting not in run.data.params:  # MLflow does not let a parameter change
                self.client.log_param(self.id, setting, str(value)[:500])

    def metrics(self, stage: str, epoch: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.client.log_metric(self.id, _mlflow_name(f"{stage}/{name}"), value, step=epoch)

    def finish(self, results: Mapping[str, Mapping[str, float]] | None) -> None:
        for tag, value in _flat(results):
            self.client.log_metric(self.id, _mlflow_name(tag), value)
        self.client.set_terminated(self.id, "KILLED" if results is None else "FINISHED")


def make_loggers(names: Iterable[str]) -> list[Logger]:
    """The built-in loggers by name.

    Raises:
        ImportError: the package of one is missing; names what to install.
    """
    kinds = {"tensorboard": TensorBoardLogger, "wandb": WandbLogger, "mlflow": MlflowLogger}
    return [kinds[name]() for name in dict.fromkeys(names)]


class _needed:
    """Turns a failed import into one that names the extra to install."""

    def __init__(self, package: str, extra: str) -> None:
        self.package, self.extra = package, extra

    def __enter__(self) -> None: ...

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, ImportError):
            raise ImportError(
                f"log={self.package} needs {self.package}; type: pip install 'mmkd[{self.extra}]'"
            ) from error


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _flat(results: Mapping[str, Mapping[str, float]] | None) -> list[tuple[str, float]]:
    rows = (results or {}).items()
    return [(f"result/{method}/{name}", value) for method, metrics in rows for name, value in metrics.items()]


def _mlflow_name(tag: str) -> str:
    return tag.replace("@", "_at_")  # MLflow takes no @ in a name
