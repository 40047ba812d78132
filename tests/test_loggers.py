"""Where the numbers of a run go: metrics.jsonl always, TensorBoard, W&B and MLflow where asked, an object of yours."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import mmkd
from mmkd.config import Config
from mmkd.training.loggers import Loggers, make_loggers
from mmkd.training.run_folder import RunFolder

SETTINGS = {
    "dim": 8, "progress": False, "baselines": [], "evaluation": {"ks": [20]},
    "teacher": {"epochs": 2, "eval_every": 1}, "student": {"epochs": 2, "eval_every": 2},
    "data": {"path": "synthetic", "options": {"num_users": 60, "num_items": 50, "num_interactions": 900}},
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Recorder:
    """A logger of a user."""

    def __init__(self) -> None:
        self.calls = []

    def start(self, folder, key, settings):
        self.calls.append(("start", folder, key, settings["teacher.lr"]))

    def metrics(self, stage, epoch, values):
        self.calls.append((stage, epoch, dict(values)))

    def finish(self, results):
        self.calls.append(("finish", results))


class Broken(Recorder):
    def metrics(self, stage, epoch, values):
        raise OSError("the network is gone")


def test_an_own_logger_sees_what_metrics_jsonl_holds_and_a_broken_one_harms_nobody(tmp_path):
    recorder, broken = Recorder(), Broken()
    with pytest.warns(UserWarning, match=r"Broken is dropped: metrics\(\) failed with OSError: the network is gone"):
        result = mmkd.train(SETTINGS, out=tmp_path / "r", loggers=[broken, recorder])
    assert [call[0] for call in broken.calls] == ["start"]
    (start, *epochs, finish), lines = recorder.calls, RunFolder(tmp_path / "r").metrics()
    assert start[:2] == ("start", tmp_path / "r") and start[3] == Config().teacher.lr
    assert [{"stage": s, "epoch": e, **values} for s, e, values in epochs] == lines and len(lines) == 4
    assert finish == ("finish", result.rows)
    again = Recorder()
    mmkd.train(SETTINGS, out=tmp_path / "r", resume=True, loggers=[again])
    assert again.calls[0] == start, "a resumed run keeps its key"


def test_a_failed_run_is_told(tmp_path, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr("mmkd.training.trainer.FrozenTeacher", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mmkd.train(SETTINGS, out=tmp_path / "r", loggers=[recorder])
    assert recorder.calls[-1] == ("finish", None)


def test_tensorboard_holds_the_curves(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = mmkd.train({**SETTINGS, "log": ["tensorboard"]}, out=tmp_path / "r")
    events = EventAccumulator(str(tmp_path / "r" / "tensorboard")).Reload()
    lines = [line for line in RunFolder(result.path).metrics() if line["stage"] == "teacher"]
    curve = [(event.step, event.value) for event in events.Scalars("teacher/loss")]
    assert curve == [(line["epoch"], pytest.approx(line["loss"], rel=1e-6)) for line in lines]
    assert events.Scalars("result/MMKD student/recall@20")[0].value == pytest.approx(
        result.rows["MMKD student"]["recall@20"], rel=1e-6
    )


def test_mlflow_holds_the_run_once_even_when_resumed(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for resume in (False, True):
        mmkd.train({**SETTINGS, "log": ["mlflow"]}, out=tmp_path / "r", resume=resume)
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("mmkd").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["teacher.epochs"] == "2"
    losses = client.get_metric_history(run.info.run_id, "teacher/loss")
    assert [metric.step for metric in losses] == [1, 2]
    assert "result/MMKD student/recall_at_20" in run.data.metrics


def test_wandb_gets_every_epoch(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    rows, summary = [], {}
    original = wandb.Run.log
    monkeypatch.setattr(
        wandb.Run, "log", lambda self, data, **kwargs: (rows.append(data), original(self, data, **kwargs))[1]
    )
    finish = wandb.Run.finish
    monkeypatch.setattr(
        wandb.Run, "finish", lambda self, **kwargs: (summary.update(dict(self.summary)), finish(self, **kwargs))[1]
    )
    result = mmkd.train({**SETTINGS, "log": ["wandb"]}, out=tmp_path / "r")
    assert [row["teacher/epoch"] for row in rows if "teacher/epoch" in row] == [1, 2]
    assert summary["result/MMKD student/recall@20"] == result.rows["MMKD student"]["recall@20"]
    assert list((tmp_path / "r" / "wandb").glob("offline-run-*/*.wandb")), "nothing was written"


def test_the_numbers_do_not_depend_on_who_looks(tmp_path):
    plain = mmkd.train(SETTINGS, out=tmp_path / "a")
    logged = mmkd.train(SETTINGS, out=tmp_path / "b", loggers=[Recorder()])
    one, two = (load_file(run.path / "student.safetensors") for run in (plain, logged))
    assert all((one[name] == two[name]).all() for name in one)
    assert json.loads((tmp_path / "a" / "run.json").read_text())["results"] == plain.rows


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_is_named_before_training(name, tmp_path, monkeypatch):
    import sys

    for module in (name, "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"log={name} needs {name}; type: pip install"):
        mmkd.train({**SETTINGS, "log": [name]}, out=tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_no_logger_is_no_work():
    loggers = Loggers(make_loggers([]))
    assert loggers.active == [] and loggers.metrics("teacher", 1, {}) is None
