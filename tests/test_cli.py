"""The command line, as a person uses it."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from typer.testing import CliRunner

import mmkd
from mmkd.cli import app
from mmkd.data import synthetic

runner = CliRunner()
SETTINGS = [
    "dim=8", "progress=false", "baselines=[popularity]", "teacher.epochs=1", "student.epochs=1",
    "teacher.batch_size=256", "student.batch_size=256",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "shop"
    path.mkdir()
    d = synthetic(80, 60, 1200, seed=1)
    for part in ("train", "val", "test"):
        sp.save_npz(path / f"{part}.npz", getattr(d, part))
    for name, x in d.features.items():
        np.save(path / f"{name}_feat.npy", x)
    return path


@pytest.fixture(scope="module")
def run(folder):
    out = folder.parent / "run"
    sets = [word for s in SETTINGS for word in ("--set", s)]
    result = runner.invoke(app, ["train", "--data", str(folder), "--out", str(out), "--seed", "4", *sets])
    assert result.exit_code == 0, result.output
    assert "MMKD student" in result.stdout and str(out) in result.stdout
    return out


def test_eval_agrees_with_the_summary(run):
    result = runner.invoke(app, ["eval", str(run), "--part", "test"])
    assert result.exit_code == 0, result.output
    value = next(line.split()[-1] for line in result.stdout.splitlines() if "recall@20 " in line)
    assert f"{float(value):.4f}" in (run / "summary.md").read_text()


def test_recommend(run):
    result = runner.invoke(app, ["recommend", str(run), "--user", "3", "--user", "5", "-k", "4"])
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 8
    unknown = runner.invoke(app, ["recommend", str(run), "--user", "nobody"])
    assert unknown.exit_code == 1 and "'nobody' is not among the 80 users" in unknown.output


def test_resume_of_a_finished_run_trains_nothing_more(run):
    before = (run / "student.safetensors").read_bytes()
    result = runner.invoke(app, ["train", "--resume", "--out", str(run)])
    assert result.exit_code == 0, result.output
    assert (run / "student.safetensors").read_bytes() == before


def test_data_and_info(folder):
    result = runner.invoke(app, ["data", str(folder)])
    assert result.exit_code == 0 and "80 users, 60 items" in result.stdout
    result = runner.invoke(app, ["info"])
    assert result.exit_code == 0
    for word in (mmkd.__version__, "torch", "spmm", "propagate", "cpp", "cuda"):
        assert word in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--set", "teacher.lrr=1"], "did you mean 'teacher.lr'"),
        (["train", "--set", "teachr.lr=1"], "did you mean 'teacher"),
        (["train", "--set", "teacher.lr"], "expected key=value"),
        (["train", "--set", "teacher.lr=-1"], "teacher.lr"),
        (["train", "--config", "/nowhere.yaml"], "does not exist"),
        (["train", "--data", "/nowhere"], "nowhere"),
        (["train", "--data", "synthetic", "--set", "data.options.users=9"], "data.options: expected arguments"),
        (["train", "--resume"], "name the run folder with --out"),
        (["eval", "/nowhere"], "it is no run folder"),
        (["recommend", "/nowhere", "--user", "1"], "it is no run folder"),
    ],
)  # fmt: skip
def test_mistakes_get_one_message_and_exit_code_1(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(app, arguments)
    assert result.exit_code == 1, result.output
    assert message in result.output.replace("\n", " ") and "Traceback" not in result.output


def test_show_settings_is_a_valid_config_file(tmp_path):
    from mmkd.config import Config, load_config

    result = runner.invoke(app, ["train", "--show-settings"])
    (tmp_path / "c.yaml").write_text(result.stdout)
    assert load_config(tmp_path / "c.yaml") == Config()


def test_help_of_train_groups_its_options_and_shows_defaults(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    text = runner.invoke(app, ["train", "--help"]).output
    panels = [line for line in text.splitlines() if line.startswith("╭")]
    for name in ("Data", "Settings", "Run folder, interruption, logging"):
        assert any(name in panel for panel in panels), panels
    for default in ("runs/<data>-<time>", "metrics.jsonl alone", "demo, or what --config says", "built-in defaults"):
        assert default in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [("mmkd tr", "train"), ("mmkd train --res", "--resume"), ("mmkd train --set teacher.l", "teacher.lr="), ("mmkd train --log t", "tensorboard")],
)  # fmt: skip
def test_shell_completion(words, expected, monkeypatch):
    monkeypatch.setenv("_MMKD_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
    assert expected in runner.invoke(app, [], prog_name="mmkd").stdout.split()


def test_resume_of_nothing_does_not_start_the_demo(tmp_path):
    result = runner.invoke(app, ["train", "--resume", "--out", str(tmp_path / "none")])
    assert result.exit_code == 1 and "start it without --resume" in " ".join(result.output.split())
