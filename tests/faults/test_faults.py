"""Nothing is lost when things go wrong: kill -9, SIGTERM, full and read-only disks, NaN."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import mmkd
from mmkd.config import load_config
from mmkd.data import convert, load, synthetic
from mmkd.files import WriteError, append_line, sweep, write_atomic, write_folder, write_text
from mmkd.serving import load_export
from mmkd.training import RunError, RunStopped, Stop, TrainingError, stop_on_signals
from mmkd.training.checkpoint import load_checkpoint
from mmkd.training.run_folder import RunFolder
from tests.faults import jobs

KILLS = {
    "training, any moment": 22,
    "training, at a file": 16,
    "export, at a file": 12,
    "conversion, at a file": 5,
    "update, at a file": 8,
}


def run(job, *arguments, kill_after: float | None = None) -> tuple[int, float]:
    """Runs a job in a process of its own; returns exit code and seconds."""
    process = jobs.server.Process(target=job, args=arguments)
    start = time.perf_counter()
    process.start()
    if kill_after is not None:
        process.join(kill_after)
        process.kill()
    process.join(120)
    assert not process.is_alive()
    return process.exitcode, time.perf_counter() - start


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, int, float]:
    """A run nobody disturbed, its file operations and its seconds."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    report = folder.parent / "events"
    code, _ = run(jobs.killed_at, None, folder, report, jobs.train, folder)
    assert code == 0
    _, seconds = run(jobs.train, folder.parent / "again")
    return folder, json.loads(report.read_text()), seconds


TRAINED = ("student", "teacher", "checkpoints/student", "checkpoints/lightgcn")


def assert_same_end(folder: Path, whole: Path, names: tuple[str, ...] = TRAINED) -> None:
    for name in names:
        one, two = load_file(folder / f"{name}.safetensors"), load_file(whole / f"{name}.safetensors")
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one), name
    lines = [[{**line, "seconds": 0} for line in RunFolder(path).metrics()] for path in (folder, whole)]
    assert lines[0] == lines[1]
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == len(lines[0])


def assert_all_readable(folder: Path) -> None:
    """Every file that is not a hidden temporary can be read whole; a checkpoint that is there loads."""
    for path in (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
        if path.parent.name == "checkpoints":
            load_checkpoint(path)
        elif path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".npz":
            with np.load(path) as arrays:
                dict(arrays)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".yaml":
            load_config(path)
    if (folder / "student.safetensors").exists():
        assert mmkd.load(folder).recommend(3, 2)


def kill_often(places: Path, count: int, job, whole: Path, names: tuple[str, ...], kill) -> None:
    """Kills `job(folder)` and resumes it, `count` times, in a new folder each time one got to its end; every one must end
    the same. `kill(folder)` runs the job, kills it or not, and returns the exit code."""
    folders = (places / str(number) for number in range(1000))
    folder, done = next(folders), 0
    while done < count:
        code = kill(folder)
        if code == 0:
            assert_same_end(folder, whole, names)
            folder = next(folders)
            continue
        assert code == -signal.SIGKILL
        done += 1
        assert_all_readable(folder)
    assert run(*job(folder))[0] == 0
    assert_same_end(folder, whole, names)
    assert not [p for p in folder.rglob(".*")], "a temporary of a killed process was left behind"


@pytest.mark.slow
def test_training_killed_at_any_moment_ends_bit_equal(whole, tmp_path):
    path, _, seconds = whole
    rng, count = random.Random(1), KILLS["training, any moment"]

    def kill(folder):
        return run(jobs.train, folder, kill_after=rng.uniform(0.02, 0.6 * seconds))[0]

    kill_often(tmp_path, count, lambda folder: (jobs.train, folder), path, TRAINED, kill)


@pytest.mark.slow
def test_training_killed_at_a_file_operation_ends_bit_equal(whole, tmp_path):
    path, events, _ = whole
    rng, count = random.Random(2), KILLS["training, at a file"]

    def kill(folder):
        return run(jobs.killed_at, rng.randint(1, events // 2), folder, None, jobs.train, folder)[0]

    kill_often(tmp_path, count, lambda folder: (jobs.train, folder), path, TRAINED, kill)


@pytest.mark.slow
def test_an_update_killed_at_a_file_operation_ends_bit_equal(whole, tmp_path):
    if not hasattr(mmkd, "update"):
        pytest.skip("this version has no update")
    path, _, _ = whole
    new, report, sound = tmp_path / "new.csv", tmp_path / "events", tmp_path / "sound"
    rng, count = random.Random(4), KILLS["update, at a file"]
    rows = {(rng.randrange(70), rng.randrange(55)) for _ in range(300)}
    new.write_text("user,item\n" + "\n".join(f"{user},{item}" for user, item in sorted(rows)))
    assert run(jobs.killed_at, None, sound, report, jobs.update, path, new, sound)[0] == 0
    events, before = json.loads(report.read_text()), (path / "student.safetensors").read_bytes()

    def kill(folder):
        return run(jobs.killed_at, rng.randint(1, events), folder, None, jobs.update, path, new, folder)[0]

    names = ("student", "checkpoints/update")
    (tmp_path / "killed").mkdir()
    kill_often(tmp_path / "killed", count, lambda folder: (jobs.update, path, new, folder), sound, names, kill)
    assert (path / "student.safetensors").read_bytes() == before


def test_a_killed_export_leaves_the_one_before_or_the_new_one(whole, tmp_path):
    rng = random.Random(3)
    new, old = whole[0], tmp_path / "old"
    shutil.copytree(new, old)
    tables = load_file(old / "student.safetensors")
    tables["item_emb"] += 1
    from safetensors.torch import save_file

    save_file(tables, old / "student.safetensors")
    expected = {float(tables["item_emb"][0, 0]), float(tables["item_emb"][0, 0] - 1)}
    for number in range(KILLS["export, at a file"]):
        to = ("safetensors", "parquet", "faiss")[number % 3]
        place = tmp_path / f"{number}" / "shop"
        mmkd.serving.export(old, to, place)
        code, _ = run(jobs.killed_at, rng.randint(1, 8), place.parent, None, jobs.export_run, new, to, place)
        assert code in (0, -signal.SIGKILL)
        found = float(load_export(place).item_emb[0, 0])
        assert any(abs(found - value) < 1e-6 for value in expected)
        assert run(jobs.export_run, new, to, place)[0] == 0


def test_a_killed_conversion_leaves_nothing_or_all(tmp_path):
    rng, sound = random.Random(5), synthetic(30, 20, 300, seed=1)
    convert(sound, tmp_path / "source", "npz")
    for number in range(KILLS["conversion, at a file"]):
        to = ("npz", "json", "table", "mmrec", "recbole")[number % 5]
        out = tmp_path / f"{number}" / "shop"
        job = (jobs.converted, tmp_path / "source", to, out)
        code, _ = run(jobs.killed_at, rng.randint(1, 12), out.parent, None, *job)
        assert code in (0, -signal.SIGKILL)
        if out.exists():
            assert load(out).train.nnz == sound.train.nnz
            continue
        assert run(*job)[0] == 0
        assert load(out).train.nnz == sound.train.nnz


def test_fifty_kills():
    assert sum(KILLS.values()) - KILLS["update, at a file"] >= 50


@pytest.mark.parametrize("stage", ["lightgcn", "teacher", "student"])
def test_a_run_stopped_within_an_epoch_goes_on_bit_equal(whole, tmp_path, monkeypatch, stage):
    from mmkd.training.stage import Stage

    stop, original = Stop(), Stage._check_finite

    def request(self, epoch, steps, optimizer):
        original(self, epoch, steps, optimizer)
        if self.task.name == stage and (epoch, steps[-1][0]) == (1, 2):
            stop.request()

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "_check_finite", request)
        with pytest.raises(RunStopped, match=rf"stage {stage}, epoch 2, after step \d of \d; saved. Go on with: mmkd"):
            mmkd.train(jobs.SETTINGS, out=tmp_path / "r", stop=stop)
    state = load_checkpoint(tmp_path / "r" / "checkpoints" / f"{stage}.safetensors")[1]
    assert state["epoch"] == 1 and state["step"] >= 3 and not state["finished"]
    mmkd.train(jobs.SETTINGS, out=tmp_path / "r", resume=True)
    assert_same_end(tmp_path / "r", whole[0])


def test_sigterm_saves_and_exits_0(tmp_path):
    out = tmp_path / "run"
    words = [f"--set={name}" for name in ("teacher.epochs=500", "teacher.patience=500", "dim=8", "baselines=[]",
             "progress=false", "teacher.batch_size=64", "data.options.num_users=60", "data.options.num_items=50",
             "data.options.num_interactions=900")]  # fmt: skip
    process = jobs.server.Process(
        target=jobs.cli, args=(tmp_path, "train", "--data", "synthetic", "--out", str(out), *words)
    )
    process.start()
    until = time.monotonic() + 60
    while not (out / "metrics.jsonl").exists() and process.is_alive() and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    output = (tmp_path / "output.txt").read_text()
    assert process.exitcode == 0, output
    state = load_checkpoint(out / "checkpoints" / "teacher.safetensors")[1]
    assert not state["finished"] and state["epoch"] + state["step"] > 0
    assert "--resume --out" in " ".join(output.split())


def test_signals_outside_a_stage_stop_at_once_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RunStopped, match="last checkpoint holds"), stop_on_signals(signal.SIGTERM) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert stop.requested and signal.getsignal(signal.SIGTERM) is before
    stop = Stop()
    with pytest.raises(RunStopped, match="next step"), stop.held():
        stop.request()
        stop.request()


def test_a_full_disk_stops_the_run_keeps_the_checkpoint_and_the_run_goes_on(whole, tmp_path):
    out, report = tmp_path / "run", tmp_path / "report"
    settings = {**jobs.SETTINGS, "baselines": ["popularity", "lightgcn"]}
    with pytest.MonkeyPatch.context() as patch:  # a run that ends after the LightGCN
        patch.setattr("mmkd.training.trainer.Teacher", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            mmkd.train(settings, out=out)
    assert run(jobs.result_of, report, jobs.small_files, jobs.train, out)[0] == 0
    kind, text = json.loads(report.read_text())
    assert (
        kind == "WriteError"
        and "best weights of teacher cannot be written: File too large" in text
        and "--resume" in text
    )
    assert not list((out / "checkpoints").glob(".*"))
    assert_all_readable(out)
    mmkd.train(settings, out=out, resume=True)
    assert_same_end(out, whole[0])


def test_a_disk_that_is_full_at_the_sync_leaves_the_old_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path, folder = write_text(tmp_path / "a.txt", "old"), tmp_path / "folder"
    write_folder(folder, lambda temporary: (temporary / "a").write_text("old"))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match=r"a\.txt cannot be written: No space left on device.*Free space"):
        write_text(path, "new")
    with pytest.raises(WriteError, match="folder cannot be written"):
        write_folder(folder, lambda temporary: (temporary / "a").write_text("new"))
    assert path.read_text() == "old" and (folder / "a").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "folder"]


def test_a_folder_is_exchanged_in_one_step_or_put_back(tmp_path, monkeypatch):
    from mmkd import files

    folder = tmp_path / "folder"
    for text in ("one", "two"):
        write_folder(folder, lambda temporary, text=text: (temporary / "a").write_text(text))
        assert (folder / "a").read_text() == text
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: object())  # a libc without renameat2
    write_folder(folder, lambda temporary: (temporary / "a").write_text("three"))
    assert (folder / "a").read_text() == "three" and [p.name for p in tmp_path.iterdir()] == ["folder"]
    with pytest.raises(ZeroDivisionError):
        write_folder(folder, lambda temporary: 1 / 0)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_read_only_folder_is_refused_before_training():
    with tempfile.TemporaryDirectory() as base:
        os.chmod(base, 0o755)
        place = Path(base) / "readonly"
        place.mkdir(mode=0o555)
        report = Path(base) / "report"
        assert run(jobs.result_of, report, jobs.as_nobody, jobs.train, place / "run")[0] == 0
        kind, text = json.loads(report.read_text())
    assert kind == "WriteError" and "cannot be written: Permission denied" in text and "--out" in text


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="cannot be written: Not a directory"):
        mmkd.train(jobs.SETTINGS, out=tmp_path / "file" / "run")


def test_two_runs_in_one_folder_are_refused(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    with (
        RunFolder(tmp_path / "run").held(),
        pytest.raises(RunError, match="another process is training"),
        RunFolder(tmp_path / "run").held(),
    ):
        pass
    with RunFolder(tmp_path / "run").held():
        pass


def test_temporaries_are_swept_and_torn_lines_closed(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_atomic(
            tmp_path / "a.json", lambda temporary: (temporary.write_text("x"), (_ for _ in ()).throw(KeyboardInterrupt))
        )
    assert not list(tmp_path.iterdir())
    for name in (".a.0123abcd.part.json", ".shop.0123abcd.part"):
        (tmp_path / name).write_text("half")
    (tmp_path / ".keep").write_text("")
    assert len(sweep(tmp_path)) == 2 and [p.name for p in tmp_path.iterdir()] == [".keep"]
    lines = tmp_path / "l.jsonl"
    append_line(lines, '{"stage": "t", "epoch": 1}')
    lines.write_text(lines.read_text() + '{"stage": "t", "ep')
    append_line(lines, '{"stage": "t", "epoch": 2}')
    assert lines.read_text().splitlines()[-1] == '{"stage": "t", "epoch": 2}'
    (tmp_path / "metrics.jsonl").write_bytes(lines.read_bytes() + b'5\n[1]\n{"stage": 1}\n\xff\n')
    assert [line["epoch"] for line in RunFolder(tmp_path).metrics()] == [1, 2]


def test_a_nan_names_step_term_and_op_and_the_checkpoint_is_kept(tmp_path, monkeypatch):
    from mmkd.training.tasks import TeacherTask

    original = TeacherTask._mask

    def poisoned(self, epoch, step):
        mask = original(self, epoch, step)
        return mask + torch.log(-torch.ones(1)) if (epoch, step) == (1, 2) else mask

    monkeypatch.setattr(TeacherTask, "_mask", poisoned)
    with pytest.raises(
        TrainingError,
        match=r"stage teacher, epoch 2, step 3: the term '\w+' is nan, first seen in the result of aten::log",
    ):
        mmkd.train({**jobs.SETTINGS, "baselines": []}, out=tmp_path / "r")
    assert load_checkpoint(tmp_path / "r" / "checkpoints" / "teacher.safetensors")[1]["epoch"] == 1


def test_weights_that_a_gradient_made_infinite_are_not_saved(tmp_path, monkeypatch):
    from mmkd.training.tasks import TeacherTask

    original = TeacherTask.step

    def poisoned(self, epoch, step):
        terms = original(self, epoch, step)
        if epoch == 1 and step == self.last:
            self.model.held.grad[0, 0] = float("inf")
        return terms

    TeacherTask.last = -(-synthetic(60, 50, 900).train.nnz // 128) - 1
    monkeypatch.setattr(TeacherTask, "step", poisoned)
    with pytest.raises(TrainingError, match=r"epoch 2: the weights table hold NaN or Inf"):
        mmkd.train({**jobs.SETTINGS, "baselines": []}, out=tmp_path / "r")
    assert load_checkpoint(tmp_path / "r" / "checkpoints" / "teacher.safetensors")[1]["epoch"] == 1
    del TeacherTask.last
