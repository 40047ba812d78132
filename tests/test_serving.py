"""A run folder served: original ids in and out, seen items left out, damage refused."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from safetensors.torch import save_file

import mmkd
from mmkd.serving import Recommender, RunLoadError, load

USERS, ITEMS, WIDTH = 30, 40, 8
IDS = {
    "text": (np.array([f"user-{u:03d}" for u in range(USERS)]), np.array([f"i{i}é" for i in range(ITEMS)])),
    "int": (np.arange(USERS) * 7 + 1000, np.arange(ITEMS)[::-1] - 5),
}


def write_run(path, kind: str = "text", names: bool = True):
    """A run folder as training leaves it; integer tables, so that scores are exact and have ties."""
    path.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    tables = {
        name: torch.randint(-2, 3, (n, WIDTH), generator=generator).float()
        for name, n in (("user_emb", USERS), ("item_emb", ITEMS))
    }
    seen = sp.random(USERS, ITEMS, 0.3, format="csr", dtype=np.float32, rng=np.random.default_rng(0))
    seen = sp.vstack([sp.csr_matrix(np.ones((1, ITEMS), dtype=np.float32)), seen[1:]]).tocsr()  # user 0 has everything
    user_ids, item_ids = IDS[kind]
    extra = {"item_names": np.array([f"Item {i}" for i in range(ITEMS)])} if names else {}
    save_file(tables, path / "student.safetensors")
    np.savez(path / "ids.npz", user_ids=user_ids, item_ids=item_ids, **extra)
    sp.save_npz(path / "seen.npz", seen)
    return tables["user_emb"].numpy(), tables["item_emb"].numpy(), seen.toarray() > 0


@pytest.mark.parametrize("kind", ["text", "int"])
@pytest.mark.parametrize("exclude_seen", [True, False])
def test_equals_sorting_all_scores(tmp_path, kind, exclude_seen):
    user_emb, item_emb, seen = write_run(tmp_path, kind)
    user_ids, item_ids = IDS[kind]
    rows = [4, 29, 4, 0]
    got = load(tmp_path).recommend(user_ids[rows], 10, exclude_seen)
    for row, items in zip(rows, got, strict=True):
        scores = user_emb[row] @ item_emb.T
        order = sorted(range(ITEMS), key=lambda i, s=scores: (-s[i], i))
        order = [i for i in order if not (exclude_seen and seen[row, i])][:10]
        assert [r.item for r in items] == item_ids[order].tolist()
        assert [r.score for r in items] == scores[order].tolist()
        assert [r.name for r in items] == [f"Item {i}" for i in order]
    assert (len(got[3]) == 0) == exclude_seen  # user 0 has every item


def test_public_door_single_user_and_more_than_there_is(tmp_path):
    write_run(tmp_path, "int", names=False)
    student = mmkd.load(str(tmp_path))
    assert student.recommend(1007, 3) == student.recommend([1007], 3) == student.recommend("1007", 3)
    assert student.recommend(np.int64(1007), 3) == student.recommend(["1007"], 3)
    everything = student.recommend(1007, 1000, exclude_seen=False)[0]
    assert sorted(r.item for r in everything) == sorted(IDS["int"][1].tolist())
    assert everything[0].name is None
    assert student.recommend([], 3) == []
    with pytest.raises(ValueError, match="k: expected >= 1, got 0"):
        student.recommend(1007, 0)


def test_an_unknown_user_is_named_with_the_nearest(tmp_path):
    write_run(tmp_path / "a", "text")
    write_run(tmp_path / "b", "int")
    with pytest.raises(
        ValueError, match=r"users: 'user-04' is not among the 30 users of this run; near it: .*user-004"
    ):
        load(tmp_path / "a").recommend(["user-003", "user-04"], 3)
    with pytest.raises(ValueError, match=r"users: 1008 is not among .* near it: .*1007"):
        load(tmp_path / "b").recommend([1008], 3)


def _tables(**change):
    tables = {"user_emb": torch.zeros(USERS, WIDTH), "item_emb": torch.zeros(ITEMS, WIDTH)}
    return lambda path: save_file({**tables, **change}, path / "student.safetensors")


def _ids(**change):
    user_ids, item_ids = IDS["text"]
    return lambda path: np.savez(path / "ids.npz", **{"user_ids": user_ids, "item_ids": item_ids, **change})


def _bad_columns(path):
    seen = sp.csr_matrix(np.eye(USERS, ITEMS, dtype=np.float32))
    seen.indices[3] = 99
    np.savez(
        path / "seen.npz", format=b"csr", shape=seen.shape, data=seen.data, indices=seen.indices, indptr=seen.indptr
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "student.safetensors").unlink(), "no student.safetensors: it is no run folder"),
        (lambda p: (p / "student.safetensors").write_bytes(b"\x00" * 100), "damaged or missing"),
        (lambda p: (p / "ids.npz").unlink(), "ids.npz"),
        (lambda p: (p / "ids.npz").write_bytes((p / "ids.npz").read_bytes()[:200]), "damaged or missing"),
        (lambda p: (p / "seen.npz").write_bytes(b"PK\x03\x04junk"), "damaged or missing"),
        (_tables(user_emb=torch.full((USERS, WIDTH), float("nan"))), "user_emb: holds NaN"),
        (_tables(user_emb=torch.zeros(USERS, WIDTH + 1)), "item_emb: expected width and dtype of user_emb"),
        (_tables(item_emb=torch.zeros(ITEMS)), r"item_emb: expected a floating \[n, d\] table"),
        (_tables(item_emb=torch.zeros(ITEMS + 1, WIDTH)), "item_ids: expected 41 ids"),
        (_ids(user_ids=np.array(["same"] * USERS)), "user_ids: 'same' is there twice, at rows 0 and 1"),
        (_ids(user_ids=np.arange(USERS) * 0.5), "user_ids: expected integers or text, got dtype float64"),
        (_ids(user_ids=np.array([{"a": 1}] * USERS)), "damaged or missing"),  # objects: a pickle, never opened
        (_ids(item_names=np.array(["x"])), "item_names: expected 40 entries"),
        (lambda p: sp.save_npz(p / "seen.npz", sp.csr_matrix((3, 3))), r"seen: expected shape \(30, 40\)"),
        (_bad_columns, "seen.npz: not a valid sparse matrix"),
    ],
)
def test_damage_is_refused_by_name(tmp_path, damage, message):
    write_run(tmp_path)
    damage(tmp_path)
    with pytest.raises(RunLoadError, match=message) as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_seen_may_have_unsorted_columns():
    user_ids, item_ids = np.arange(1), np.arange(4)
    seen = sp.csr_matrix((np.ones(2), np.array([3, 1]), np.array([0, 2])), shape=(1, 4))
    student = Recommender(torch.ones(1, 2), torch.ones(4, 2), user_ids, item_ids, seen)
    assert [r.item for r in student.recommend(0, 4)[0]] == [0, 2]
    assert seen.indices.tolist() == [3, 1]
