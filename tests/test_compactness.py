"""Teacher and student measured, and the features' memory given back when the student's stage begins."""

from __future__ import annotations

import json
import math
import weakref
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mmkd.cli import app
from mmkd.config import load_config
from mmkd.data import load, synthetic
from mmkd.data.npz import write_npz
from mmkd.data.synthesis import of_size
from mmkd.training.compactness import compactness, resident
from mmkd.training.run_folder import RunFolder
from mmkd.training.trainer import Run

runner = CliRunner()
needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")


def test_the_command_counts_what_is_trained(tmp_path):
    arguments = ["bench", "compactness", "--size", "300x200x3000:40,24", "--steps", "3", "--set", "dim=16"]
    arguments += ["--set", "student.batch_size=500", "--set", "teacher.batch_size=500", "--set", "threads=1"]
    files = ["--json", str(tmp_path / "c.json"), "--out", str(tmp_path / "c.md")]
    result = runner.invoke(app, [*arguments, *files])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "c.md").read_text() in result.stdout
    found = json.loads((tmp_path / "c.json").read_text())
    table, dense = 500 * 16, (40 + 24) * 16 + 2 * 16 + 16 * 16 + 16 + 2  # the last: omega
    assert found["student"]["trainable"] == table and found["teacher"]["trainable"] == table + dense
    for stage in ("teacher", "student"):
        assert sum(math.prod(shape) for shape in found[stage]["parameters"].values()) == found[stage]["trainable"]
        assert found[stage]["steps_per_epoch"] == 6 and found[stage]["epoch_seconds"] > 0
    assert found["student"]["parameters"] == {"user_id_embedding": [300, 16], "item_id_embedding": [200, 16]}
    paper = table / (table + dense + 200 * (40 + 24))
    assert f"{table / (table + dense):.2%} | {paper:.2%}" in result.stdout
    assert found["data"] == {"name": "random", "users": 300, "items": 200, "interactions": 3000}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "either --data or --size"), (["--size", "netflx"], "--size: expected tiktok"),
     (["--size", "30x20x200:40", "--steps", "1"], "steps: expected at least 2")],
)  # fmt: skip
def test_requests_are_refused(arguments, message):
    result = runner.invoke(app, ["bench", "compactness", *arguments])
    assert result.exit_code == 1 and message in " ".join(result.output.split())


def test_sized_data_has_the_size_and_survives_the_disk(tmp_path):
    made = of_size(200, 150, 4000, (12, 8), name="some")
    assert made.train.shape == (200, 150) and made.train.nnz == 4000 and made.val.nnz > 100
    assert load(write_npz(made, tmp_path / "some"), format="npz").fingerprint() == made.fingerprint()


def test_nothing_holds_teacher_or_features_in_the_students_stage(tmp_path):
    config = load_config({"dim": 8, "progress": False, "baselines": []})
    dataset = synthetic(60, 50, 600)
    run = Run(config, dataset, RunFolder.start(tmp_path / "r", config, dataset, resume=False))
    features = [weakref.ref(x) for x in dataset.features.values()]
    del dataset
    teacher = run.build_teacher()
    held = [weakref.ref(teacher), *(weakref.ref(table) for table in teacher.features), *features]
    task = run.student_task(teacher, torch.full((2,), 0.5))
    del teacher
    run.release_features()
    assert [ref() for ref in held] == [None] * len(held)
    assert math.isfinite(float(task.step(0, 0)["ranking"]))


@needs_proc
def test_the_students_stage_starts_without_the_features_memory(tmp_path):
    made = of_size(400, 12_000, 6000, (1100,))
    size = made.features["m0"].nbytes  # 53 MB
    path = write_npz(made, tmp_path / "wide")
    config = load_config({"dim": 8, "data": {"path": str(path), "format": "npz"}, "threads": 1})
    found = compactness(config, 2, ("student",))["student"]["memory"]
    assert found["start"] - found["base"] < size / 3
    assert found["peak"] >= found["start"] > 0 and resident() > 0
