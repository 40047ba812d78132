"""The paper's tables: written whole, resumed cell by cell, honest about significance."""

from __future__ import annotations

import csv
import json
import multiprocessing
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import mmkd
from mmkd.cli import app
from mmkd.config import load_config
from mmkd.experiments import cells as cells_module
from mmkd.experiments.cells import Study
from mmkd.experiments.figures import mixing
from mmkd.experiments.incremental import before, earlier
from mmkd.experiments.parallel import side_by_side
from mmkd.experiments.tables import ablation, significance
from mmkd.training import RunStopped
from mmkd.training.checkpoint import load_checkpoint
from mmkd.training.run_folder import code_fingerprint

DATA = {"path": "synthetic", "options": {"num_users": 80, "num_items": 70, "num_interactions": 1500}}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    config = load_config({"data": DATA, "progress": False, "threads": 1})
    return Study(tmp_path_factory.mktemp("study"), config, seeds=5, quick=True)


def test_table5_and_figure5_share_cells_and_are_read_back(study, monkeypatch):
    from mmkd.experiments import figure5, table5, table8

    path = table5(study)
    text = path.read_text()
    for word in ("w/o Prompt", "w/o PairKD", "w/o ListKD", "w/o disentangle", "w/o EmbKD", "MMKD", "What differs"):
        assert word in text
    rows = list(csv.DictReader((study.out / "table5.csv").read_text().splitlines()))
    assert {r["method"] for r in rows} >= {"MMKD", "teacher", "w/o Prompt"} and float(rows[0]["recall@20"]) > 0
    assert len(list((study.out / "teachers").iterdir())) == 4, (
        "a teacher each: whole, without prompt, without graphs, with shared negatives"
    )

    def refuse(*_, **__):
        raise AssertionError("a finished cell was trained again")

    monkeypatch.setattr(cells_module, "train", refuse)
    assert table5(study).read_text().split("## ")[0] == text.split("## ")[0]
    assert "student" in figure5(study).read_text() and (study.out / "figure5.png").stat().st_size > 5000
    assert "item_emb0" in table8(study).read_text()
    settings = [study.settings(changes, 0) for changes in ({}, ablation(study)["random start"])]
    assert [s.student.init for s in settings] == ["match", "xavier"]
    assert settings[0].student.lr != settings[1].student.lr == settings[1].lightgcn.lr
    assert settings[0].distill == settings[1].distill


def test_cells_of_other_code_are_named(study):
    from mmkd.experiments import figure5

    assert "another version" not in figure5(study).read_text()
    cell = study.cell()
    info = json.loads((cell.path / "run.json").read_text())
    assert info["code"] == code_fingerprint()
    (cell.path / "run.json").write_text(json.dumps(info | {"code": "0" * 12}))
    assert f"`{cell.path.name}`" in figure5(study).read_text()
    (cell.path / "run.json").write_text(json.dumps(info))
    assert "another version" not in figure5(study).read_text()


def test_jobs_side_by_side_leave_the_same_cells(study, tmp_path):
    wanted = [({"model": "bpr-mf"}, 0), ({"model": "bpr-mf"}, 1), ({"distill.pair": 0.0}, 0), ({}, 0), ({}, 0)]
    beside = Study(tmp_path, study.config, seeds=2, jobs=2)
    for one, other in zip(study.cells(wanted), beside.cells(wanted), strict=True):
        assert one.path.name == other.path.name and one.results == other.results
    assert len(list((tmp_path / "teachers").iterdir())) == 1, "cells that share a teacher waited for it"
    with pytest.raises(ValueError, match="jobs: expected at least 1"):
        Study(tmp_path, study.config, jobs=0)


def test_a_failure_side_by_side_stops_the_others(study, tmp_path):
    beside = Study(tmp_path, study.config, jobs=2)
    start = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        side_by_side(beside, _fail_or_wait, [(0,), (1,), (2,), (3,)])
    assert time.monotonic() - start < 40 and not multiprocessing.active_children()
    assert {p.name for p in tmp_path.iterdir()} <= {"began-1", "stopped-1"}, "calls that had not begun were dropped"


def _fail_or_wait(study, number):
    if number != 1:
        while not (study.out / "began-1").exists():
            time.sleep(0.01)
        raise ZeroDivisionError
    (study.out / "began-1").touch()
    try:
        time.sleep(60)
    except RunStopped:
        (study.out / "stopped-1").touch()
        raise


def _table4_in_jobs(tmp_path):
    command = [sys.executable, "-m", "mmkd", "reproduce", "table4", "--quick", "--jobs", "2", "--out", str(tmp_path)]
    return [*command, "--set", "threads=1"]


def _until_cells(process, tmp_path, count):
    while process.poll() is None and len(list((tmp_path / "cells").glob("*/summary.md"))) < count:
        time.sleep(0.05)


def _children(pid: int) -> list[int]:
    listed = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()]
    return [n for n in listed if _stat(n)[1:2] == [str(pid)]]


def _stat(pid: int) -> list[str]:
    """State and parent of a process; empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return []


def test_reproduce_goes_on_after_sigterm(tmp_path):
    command = _table4_in_jobs(tmp_path)
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _until_cells(first, tmp_path, 3)
    first.send_signal(signal.SIGTERM)
    out, err = first.communicate(timeout=120)
    assert first.returncode == 0 and "the same command goes on" in out, err
    cells = {p: p.stat().st_mtime_ns for p in (tmp_path / "cells").glob("*/summary.md")}
    assert 3 <= len(cells) < 13
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and "| MMKD student |" in again.stdout, again.stderr
    assert all(p.stat().st_mtime_ns == before for p, before in cells.items()), "a finished cell was trained again"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_the_workers_of_a_killed_parent_end(tmp_path):
    parent = subprocess.Popen(_table4_in_jobs(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _until_cells(parent, tmp_path, 1)
    workers = _children(parent.pid)
    parent.kill()
    parent.wait()
    assert len(workers) >= 2
    deadline = time.monotonic() + 30
    while (alive := [w for w in workers if _stat(w)[:1] not in ([], ["Z"])]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive


def test_a_search_in_jobs_sees_no_test_part_and_keeps_every_winner(study, tmp_path):
    from mmkd.experiments.search import tune

    alone, beside = (
        Study(tmp_path / "1", study.config, quick=True),
        Study(tmp_path / "2", study.config, quick=True, jobs=2),
    )
    assert alone.dataset(0).test is not None
    pages = [tune(s, ["bpr-mf", "lightgcn"]).read_text().split("## ")[0] for s in (alone, beside)]
    assert pages[0] == pages[1] and set(json.loads((tmp_path / "2" / "tuned.json").read_text())) == {
        "bpr-mf",
        "lightgcn",
    }
    parts = {json.loads(p.read_text())["part"] for p in (tmp_path / "2").glob("search/cells/*/run.json")}
    assert parts == {"val"}


def test_one_request_stops_the_search_between_steps(study, tmp_path, monkeypatch):
    """The signal handler asks the study it knows; the search's own study must hear of it."""
    from mmkd.experiments.search import tune
    from mmkd.training.stage import Stage

    outer, steps = Study(tmp_path, study.config, quick=True), []
    original = Stage._check_finite

    def check(self, epoch, unseen, optimizer):
        original(self, epoch, unseen, optimizer)
        steps.append(epoch)
        if len(steps) == 2:
            outer.stop.request()  # between the backward pass and the optimizer

    monkeypatch.setattr(Stage, "_check_finite", check)
    with pytest.raises(RunStopped):
        tune(outer, ["bpr-mf"])
    (saved,) = tmp_path.glob("search/cells/*/checkpoints/*.safetensors")
    tensors, state = load_checkpoint(saved)
    assert int(tensors["optimizer.table.step"]) == state["step"] == 2


def test_table6_measures_memory(study):
    from mmkd.experiments import table6

    rows = {r["model"]: r for r in csv.DictReader((table6(study).parent / "table6.csv").read_text().splitlines())}
    assert float(rows["MMKD student"]["peak memory, MB"]) > 0 and rows["LATTICE"]["peak memory, MB"] == "nan"


def test_figure3_and_table7_run(study):
    from mmkd.experiments import figure3, table7

    pytest.importorskip("sklearn")
    assert "f^m without prompt" in figure3(study).read_text() and (study.out / "figure3.png").stat().st_size > 5000
    text = table7(study).read_text()
    assert "LATTICE" in text and "`mmkd update`" in text
    (folder,) = (study.out / "before" / "cells").glob("mmkd-*-updated")
    data, old = study.dataset(0), before(study.dataset(0), 0)
    grown, later = mmkd.load(folder / "run").seen, (folder / "later.csv").read_text().splitlines()
    assert (grown != (data.train > 0)).nnz == 0, "the update saw all train pairs and nothing else"
    assert len(later) == 1 + data.train.nnz - old.train.nnz
    again = table7(study).read_text()
    rows = [[line for line in t.splitlines() if line.startswith("| MMKD")] for t in (text, again)]
    assert rows[0] == rows[1], "a finished update was not read back"


def test_an_interrupted_cell_goes_on(study, monkeypatch):
    from mmkd.training import stage

    original, seen = stage.Stage._epoch, []

    def stop(self, optimizer, state, *rest):
        seen.append((self.task.name, state["epoch"]))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return original(self, optimizer, state, *rest)

    changes = {"model": "lightgcn", "lightgcn.lr": 0.004, "checkpoint_every": 1}
    with monkeypatch.context() as patch:
        patch.setattr(stage.Stage, "_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            study.cell(changes)
    seen.clear()
    monkeypatch.setattr(stage.Stage, "_epoch", lambda *a: seen.append(a[2]["epoch"]) or original(*a))
    assert study.cell(changes).results["LightGCN"]["recall@20"] > 0
    assert seen == [1], "the first epoch was not repeated"


def test_the_search_decides_on_validation_and_later_cells_use_it(study, monkeypatch):
    from mmkd.experiments import search as module

    tried = []
    fake = {"l2": {1e-3: 0.15, 1e-2: 0.2, 1e-1: 0.12}, "lr": {1e-3: 0.0, 3e-3: 0.05}}

    def cell(self, changes, seed=0):
        assert self.dataset(0).test is None, "the search could see the test part"
        tried.append(changes)
        settings = {k.rsplit(".", 1)[-1]: v for k, v in changes.items()}
        value = fake["l2"].get(settings["l2"], 0.0) + fake["lr"].get(settings["lr"], 0.0)
        results = {title: {"recall@20": value} for title in module.TITLES.values()}
        return cells_module.Cell(study.out, "val", results, {}, {})

    alone = Study(study.out / "alone", study.config, seeds=1)
    with monkeypatch.context() as patch:
        patch.setattr(Study, "cell", cell)
        module.tune(alone, ["bm3"])
        assert len(tried) == module.TRIALS and "bm3" in (alone.out / "tuned.json").read_text()
        tried.clear()
        assert "lr 0.003, l2 0.01 | **0.2500**" in module.tune(alone, ["ngcf", "mmkd"]).read_text()
        assert len(tried) == 2 * module.TRIALS, "the same budget for both"
        with pytest.raises(ValueError, match="models: expected some of"):
            module.tune(alone, ["ngfc"])
    # every trial after the three of L2 changes the best so far
    assert [c["models.ngcf.l2"] for c in tried[:3]] == [1e-3, 1e-2, 1e-1]
    assert study.config.models["ngcf"]["epochs"] == 2 < module.SHORT["epochs"]
    short = {"models.ngcf.epochs": 2, "models.ngcf.patience": module.SHORT["patience"]}
    assert tried[3] == {"model": "ngcf", "models.ngcf.lr": 3e-3, "models.ngcf.l2": 1e-2, **short}
    assert tried[4] == tried[3] | {"models.ngcf.draw": "pairs"} and tried[5] == tried[3] | {"models.ngcf.layers": 2}
    assert set(module.OWN) == set(module.SECTION), "a model without trials of its own"
    tuned = alone.settings({"model": "ngcf"}, 0)
    assert (tuned.models["ngcf"]["lr"], tuned.models["ngcf"]["l2"]) == (3e-3, 1e-2)
    assert tuned.models["ngcf"]["patience"] > short["models.ngcf.patience"], "a trial's bound is not the winner's"
    assert "bm3" in json.loads((alone.out / "tuned.json").read_text()), "a later search kept the earlier winners"
    assert alone.settings({}, 0).teacher.lr == 3e-3 and alone.settings({"teacher.lr": 0.5}, 0).teacher.lr == 0.5


def test_the_grown_graph_only_adds(study):
    data = study.dataset(0)
    old = before(data, 0)
    assert 0.8 < old.train.nnz / data.train.nnz < 0.97
    assert (old.train.multiply(data.train)).nnz == old.train.nnz and old.val is data.val


def test_the_earlier_study_has_the_searched_settings_and_less_data_in_every_process(study, tmp_path):
    now = Study(tmp_path, study.config, seeds=1, jobs=2)
    (tmp_path / "tuned.json").write_text('{"bm3": {"models.bm3.l2": 0.5}}')
    past, kept = earlier(now), before(study.dataset(0), 0).train.nnz
    assert past.settings({"model": "bm3"}, 0).models["bm3"]["l2"] == 0.5
    for cell in past.cells([({"model": "popularity"}, 0), ({"model": "item-knn"}, 0)]):
        assert json.loads((cell.path / "run.json").read_text())["data"]["interactions"]["train"] == kept


def test_significance_and_mixing():
    from scipy.stats import ttest_rel

    a, b = np.array([0.30, 0.31, 0.33]), np.array([0.28, 0.30, 0.29])
    assert significance(a, b) == f"{100 * (a.mean() / b.mean() - 1):+.2f} % (p = {ttest_rel(a, b).pvalue:.2g})"
    assert "no test" in significance(a[:1], b[:1]) and "no test" in significance(a, a)
    rng = np.random.default_rng(0)
    apart = [rng.normal(size=(60, 5)) * 0.01 + np.eye(5)[k] for k in range(2)]
    assert mixing(apart) == 0 and 0.4 < mixing([rng.normal(size=(60, 5)) for _ in range(2)]) < 0.6


def test_the_command_names_what_it_knows():
    result = CliRunner().invoke(app, ["reproduce", "table9"])
    assert result.exit_code == 1
