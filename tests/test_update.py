"""Incremental learning: new interactions, users and items join a run, which stays as it was."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import mmkd
from mmkd import ops
from mmkd.cli import app
from mmkd.config import ConfigError
from mmkd.data import DataError, Dataset, synthetic
from mmkd.data.joining import join
from mmkd.data.table import RawInteractions
from mmkd.evaluation import evaluate
from mmkd.serving import RunLoadError
from mmkd.training import RunError
from mmkd.training.incremental import FreshSampler, extend_table
from mmkd.training.run_folder import RunFolder

SETTINGS = {
    "dim": 16, "progress": False, "baselines": [], "checkpoint_every": 1, "evaluation": {"ks": [20]},
    "teacher": {"epochs": 12, "eval_every": 4, "batch_size": 512, "lr": 0.01, "layers": 2},
    "student": {"epochs": 2, "eval_every": 1, "batch_size": 512, "layers": 2, "init": "teacher"},
    "update": {"epochs": 6, "batch_size": 128, "lr": 0.01},
}  # fmt: skip
OLD_USERS, OLD_ITEMS = 180, 190
runner = CliRunner()


def digests(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run on the early part of a planted data set (text ids), and a file with what came later."""
    path = tmp_path_factory.mktemp("world")
    d = synthetic(
        200, 200, 6000, taste=8.0, zipf=0.0, noise=0.1, latent_dim=4, seed=5, val_fraction=0.1, test_fraction=0.15
    )
    users, items = np.char.add("u", d.user_ids.astype(str)), np.char.add("i", d.item_ids.astype(str))
    early = {p: getattr(d, p)[:OLD_USERS, :OLD_ITEMS] for p in ("train", "val")}
    base = Dataset(
        "early", early["train"], early["val"], None, {k: v[:OLD_ITEMS] for k, v in d.features.items()},
        users[:OLD_USERS], items[:OLD_ITEMS], np.char.add("Item ", items[:OLD_ITEMS]),
    )  # fmt: skip
    run = mmkd.train(SETTINGS, out=path / "run", dataset=base).path
    late = (d.train + d.val + d.test).tolil()
    late[:OLD_USERS, :OLD_ITEMS] = d.test[:OLD_USERS, :OLD_ITEMS]
    pairs = np.argwhere(late.toarray() > 0)
    lines = [f"{users[u]},{items[i]}" for u, i in np.random.default_rng(0).permutation(pairs)]
    known = base.train.tocoo()
    lines.append(f"{users[known.row[0]]},{items[known.col[0]]}")  # one pair the run knows
    (path / "new.csv").write_text("user,item\n" + "\n".join(lines) + "\n")
    return {"run": run, "new": path / "new.csv", "base": base, "pairs": len(pairs), "path": path}


@pytest.fixture(scope="module")
def updated(world):
    before = digests(world["run"])
    result = mmkd.update(world["run"], world["new"], out=world["path"] / "next")
    assert digests(world["run"]) == before, "the old run was changed"
    return result


def test_new_users_and_items_join_and_accuracy_rises(world, updated):
    info, base = json.loads((updated.path / "run.json").read_text()), world["base"]
    assert (info["data"]["users"], info["data"]["items"]) == (200, 200)
    assert sum(info["data"]["interactions"].values()) == base.train.nnz + base.val.nnz + world["pairs"]
    ids = np.load(updated.path / "ids.npz")
    assert (ids["user_ids"][:OLD_USERS] == base.user_ids).all() and (ids["item_ids"][:OLD_ITEMS] == base.item_ids).all()
    assert ids["item_names"][0] == "Item i0" and ids["item_names"][-1] == ids["item_ids"][-1]
    before, untouched, after = updated.rows.values()
    assert before["recall@20"] < untouched["recall@20"] < after["recall@20"]
    assert info["parent"]["student"] == digests(world["run"])["student.safetensors"]
    assert "20 new users, 10 new items" in updated.table and "1 more were known" in updated.table


def test_the_new_run_is_complete(updated):
    student = mmkd.load(updated.path)
    everything = RunFolder(updated.path).dataset()
    assert student.seen.nnz == everything.train.nnz + everything.val.nnz + everything.test.nnz
    assert len(student.recommend("u199", 5)[0]) == 5  # a user the old run did not know
    saved = load_file(updated.path / "student.safetensors")
    assert evaluate(saved["user_emb"], saved["item_emb"], everything, "test", (20,)) == updated.rows["fine-tuned"]
    layer0 = torch.cat([saved["user_emb0"], saved["item_emb0"]])
    final = torch.cat([saved["user_emb"], saved["item_emb"]])
    torch.testing.assert_close(ops.propagate(everything.graph(), layer0, 2), final)
    result = runner.invoke(app, ["eval", str(updated.path), "--part", "test"])
    assert result.exit_code == 0, result.output
    assert f"{updated.rows['fine-tuned']['recall@20']:.4f}" in result.stdout
    assert not [p for p in updated.path.rglob(".*") if p.is_file()], "a temporary file was left behind"


def test_an_update_can_be_updated_again_from_the_command_line(world, updated, tmp_path):
    new = tmp_path / "more.csv"
    student = mmkd.load(updated.path)
    unseen = [np.setdiff1d(student.item_ids, student.item_ids[student.seen[u].indices])[:3] for u in range(40)]
    rows = [
        f"{student.user_ids[u]},{item},2024-05-{1 + u % 28:02d}" for u, items in enumerate(unseen) for item in items
    ]
    new.write_text("customer,item,timestamp\n" + "\n".join([*rows, "later,brand-new,2024-05-01"]) + "\n")
    arguments = [
        "update",
        str(updated.path),
        "--new",
        str(new),
        "--out",
        str(tmp_path / "r"),
        "--column",
        "user=customer",
    ]
    result = runner.invoke(app, [*arguments, "--set", "update.epochs=2"])
    assert result.exit_code == 0, result.output
    assert "1 new users, 1 new items" in result.stdout and "fine-tuned" in result.stdout and "by time" in result.stdout
    data = RunFolder(tmp_path / "r").dataset()
    before = RunFolder(updated.path).dataset()
    assert data.train.nnz > before.train.nnz + before.val.nnz + before.test.nnz, "what was held out before is known now"
    assert runner.invoke(app, ["recommend", str(tmp_path / "r"), "--user", "later"]).exit_code == 0


def test_a_resumed_update_ends_bit_equal(world, updated, tmp_path, monkeypatch):
    from mmkd.training import stage

    original = stage.Stage._epoch

    def stop(self, optimizer, state, *rest):
        if state["epoch"] == 2:
            raise KeyboardInterrupt
        return original(self, optimizer, state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(stage.Stage, "_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            mmkd.update(world["run"], world["new"], out=tmp_path / "r")
    with pytest.raises(RunLoadError, match="has not finished"):
        mmkd.load(tmp_path / "r")
    with pytest.raises(RunError, match="already holds a run"):
        mmkd.update(world["run"], world["new"], out=tmp_path / "r")
    with pytest.raises(RunError, match=r"other settings \(update.lr\)"):
        mmkd.update(world["run"], world["new"], out=tmp_path / "r", resume=True, overrides=["update.lr=0.1"])
    again = mmkd.update(world["run"], world["new"], out=tmp_path / "r", resume=True)
    one, two = (load_file(p / "student.safetensors") for p in (updated.path, again.path))
    assert all(torch.equal(one[name], two[name]) for name in one) and again.rows == updated.rows


def test_test_pairs_choose_nothing(world, updated, tmp_path, monkeypatch):
    """Other test pairs, the same train and validation: the same weights."""
    from mmkd.training import incremental

    original = incremental.join

    def shuffled(*args, **kwargs):
        joined = original(*args, **kwargs)
        test = sp.csr_matrix(joined.dataset.test[::-1])
        test = sp.csr_matrix(test - test.multiply(joined.dataset.train + joined.dataset.val))
        test.eliminate_zeros()
        return replace(joined, dataset=replace(joined.dataset, test=test))

    monkeypatch.setattr(incremental, "join", shuffled)
    other = mmkd.update(world["run"], world["new"], out=tmp_path / "r")
    one, two = (load_file(p / "student.safetensors") for p in (updated.path, other.path))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert other.rows["fine-tuned"] != updated.rows["fine-tuned"]


def test_everything_may_train_unmeasured(world, tmp_path):
    few = tmp_path / "few.csv"
    few.write_text("user,item\nsomebody,i3\n")
    with pytest.raises(DataError, match=r"1 new pairs are too few .* update.val_fraction=0"):
        mmkd.update(world["run"], few, out=tmp_path / "r")
    settings = ["update.val_fraction=0", "update.test_fraction=0", "update.epochs=2"]
    result = mmkd.update(world["run"], few, out=tmp_path / "r", overrides=settings)
    assert result.part == "none" and len(mmkd.load(result.path).recommend("somebody", 3)[0]) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.csv", None, "no such file"),
        ("empty.csv", b"", "found an empty file"),
        ("header.csv", b"user,item\n", "no rows after the header"),
        ("names.csv", b"usr,item\nu1,i1\n", "no user column"),
        ("extra.csv", b"user,item,colour\nu1,i1,red\n", "unknown column 'colour'"),
        ("hole.csv", b"user,item\nu1,\n", "row 1 has no 'item'"),
        ("pickled.csv", b"\x80\x04\x95\x00", "this is a pickle"),
        ("new.pkl", b"x", "this is a pickle"),
        ("zip.parquet", b"PK\x03\x04", "not what its name says"),
        ("time.csv", b"user,item,timestamp\nu1,i1,soon\n", "expected a number or an ISO 8601 time"),
    ],
)  # fmt: skip
def test_files_are_refused_by_name(world, tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        mmkd.update(world["run"], path, out=tmp_path / "r")
    assert str(path) in str(caught.value) and not (tmp_path / "r").exists()


def test_requests_are_refused(world, tmp_path):
    run, new, out = world["run"], world["new"], tmp_path / "r"
    with pytest.raises(ConfigError, match=r"'student' belongs to the run"):
        mmkd.update(run, new, out=out, overrides=["student.layers=1"])
    with pytest.raises(ConfigError, match=r"did you mean 'update.lr'"):
        mmkd.update(run, new, out=out, overrides=["update.lrr=1"])
    with pytest.raises(RunError, match="is the run that is updated"):
        mmkd.update(run, new, out=run)
    with pytest.raises(RunLoadError, match="it is no run folder"):
        mmkd.update(tmp_path, new, out=out)
    known = tmp_path / "known.csv"
    known.write_text(f"user,item\nu0,i{world['base'].train[0].indices[0]}\n")
    with pytest.raises(DataError, match="all 1 pairs are known"):
        mmkd.update(run, known, out=out)
    assert not out.exists()
    result = runner.invoke(app, ["update", str(run), "--new", str(tmp_path / "no.csv"), "--out", str(out)])
    assert result.exit_code == 1 and "no such file" in " ".join(result.output.split())
    result = runner.invoke(app, ["update", str(run), "--new", str(new), "--column", "user"])
    assert result.exit_code == 1 and "expected role=name" in result.output


def test_ids_keep_their_type(tmp_path):
    known, path = sp.csr_matrix(np.eye(3, 4, dtype=np.float32)), tmp_path / "new.csv"
    options = {"val_fraction": 0, "test_fraction": 0}
    text = RawInteractions(np.array(["7", "07"]), np.array([9, 8]), None)
    with pytest.raises(DataError, match=r"new.csv: row 2, user '07': expected a whole number"):
        join("d", known, np.arange(3), np.arange(4), text, path, **options)
    joined = join("d", known, np.array(["a", "b", "7"]), np.arange(4), text, path, **options)
    assert joined.dataset.user_ids.tolist() == ["a", "b", "7", "07"]
    assert joined.dataset.item_ids.tolist() == [0, 1, 2, 3, 8, 9]
    assert joined.dataset.train[2].indices.tolist() == [2, 5] and joined.fresh.nnz == 2


def test_random_split_keeps_the_only_trace_of_a_newcomer_in_train(tmp_path):
    known = sp.csr_matrix(np.eye(30, dtype=np.float32))
    users, items = np.divmod(np.arange(60), 30)  # users 0 and 1 take in every known item,
    users, items = (
        np.append(users, [0] * 30 + list(range(100, 130))),
        np.append(items, list(range(100, 130)) + [1] * 30),
    )
    rows = RawInteractions(users, items, None)  # and 30 new items and 30 new users have one pair each
    joined = join("d", known, np.arange(30), np.arange(30), rows, tmp_path, val_fraction=0, test_fraction=0.3)
    assert joined.dataset.test.nnz > 5
    degree = np.diff(joined.dataset.train.indptr)
    assert degree.min() >= 1 and np.bincount(joined.dataset.train.indices).min() >= 1


def test_new_rows_are_the_mean_of_their_neighbours():
    #            items: 0 1 | 2 3 4       users: 0 1 | 2 3 4
    pairs = [(0, 0), (1, 1), (2, 0), (2, 1), (0, 2), (3, 2), (3, 3), (4, 4)]
    matrix = sp.csr_matrix((np.ones(8, np.float32), tuple(np.array(pairs).T)), shape=(5, 5))
    users, items = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, 4.0]])
    table = extend_table(users, items, matrix)
    expected_users = [
        [1, 0],
        [0, 1],
        [1, 2],
        [1, 0],
        [0.5, 0.5],
    ]  # 3: through item 2, found a round before; 4: unreachable
    expected_items = [[2, 0], [0, 4], [1, 0], [1, 0], [1, 2]]
    torch.testing.assert_close(table, torch.tensor(expected_users + expected_items).float())


def test_fresh_sampler_draws_what_it_says():
    train = synthetic(40, 60, 900, seed=2).train
    fresh = train.copy()
    fresh.data[np.random.default_rng(0).random(fresh.nnz) < 0.9] = 0
    fresh.eliminate_zeros()
    batch = FreshSampler(train, fresh, 20_000, 0.5, seed=3).batch(1, 2)
    assert set(batch.users.tolist()) == set(np.flatnonzero(np.diff(fresh.indptr)).tolist())
    assert (np.asarray(train[batch.users, batch.pos]) == 1).all() and (
        np.asarray(train[batch.users, batch.neg[:, 0]]) == 0
    ).all()
    is_new = np.asarray(fresh[batch.users, batch.pos]).ravel()
    degree = np.diff(train.indptr)[batch.users]
    share = 0.5 + 0.5 * (np.diff(fresh.indptr)[batch.users] / degree).mean()
    assert abs(is_new.mean() - share) < 0.02
    assert (FreshSampler(train, fresh, 500, 1.0, seed=3).batch(0, 0).pos[:5] >= 0).all()
    everything_new = FreshSampler(train, fresh, 500, 1.0, seed=3).batch(0, 0)
    assert (np.asarray(fresh[everything_new.users, everything_new.pos]) == 1).all()
