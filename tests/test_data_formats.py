"""The three formats lead to the same `Dataset`, and what is ambiguous in them is settled as documented."""

from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from mmkd.data import DataError, DataWarning, describe, load
from mmkd.data.ids import ids_from_text, locate, unify
from mmkd.data.pairs import k_core, merge_pairs

TRAIN = [(0, 0), (0, 1), (1, 1), (1, 2), (2, 3)]
VAL = [(0, 2), (1, 0)]


def pairs_of(matrix) -> set[tuple[int, int]]:
    coo = matrix.tocoo()
    return set(zip(coo.row.tolist(), coo.col.tolist(), strict=True))


def matrix_of(pairs, shape=(3, 4)) -> sparse.csr_matrix:
    rows, cols = zip(*pairs, strict=True)
    return sparse.csr_matrix((np.ones(len(pairs), np.float32), (rows, cols)), shape=shape)


def write_rows(path: Path, rows, delimiter=",") -> Path:
    with open(path, "w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


@pytest.fixture
def features() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((4, 5)).astype(np.float16)


@pytest.fixture
def npz_folder(tmp_path, features) -> Path:
    sparse.save_npz(tmp_path / "train.npz", matrix_of(TRAIN))
    sparse.save_npz(tmp_path / "val.npz", matrix_of(VAL))
    np.save(tmp_path / "image_feat.npy", features)
    return tmp_path


def test_npz_keeps_dtype_and_maps_the_file(npz_folder, features):
    data = load(npz_folder)
    assert pairs_of(data.train) == set(TRAIN) and pairs_of(data.val) == set(VAL) and data.test is None
    assert isinstance(data.features["image"], np.memmap) and data.features["image"].dtype == np.float16
    np.testing.assert_array_equal(data.features["image"], features)
    assert data.train.dtype == np.float32 and data.train.has_sorted_indices
    assert (data.num_users, data.num_items) == (3, 4)
    assert data.graph().num_edges == len(TRAIN)


@pytest.mark.parametrize("kind", ["csr", "csc", "coo"])
def test_npz_sparse_formats_and_values(tmp_path, kind):
    matrix = sparse.coo_matrix(([2.0, 1.0, 1.0, 0.0], ([0, 1, 1, 2], [3, 0, 0, 1])), shape=(3, 4))
    sparse.save_npz(tmp_path / "train.npz", matrix if kind == "coo" else matrix.asformat(kind))
    data = load(tmp_path / "train.npz")
    assert pairs_of(data.train) == {(0, 3), (1, 0)}  # a stored 0 is no interaction, a repeated pair is one
    assert set(data.train.data.tolist()) == {1.0}


def test_npz_ids_beside(npz_folder):
    (npz_folder / "item_ids.txt").write_text("B01\nB02\nB03\nB04\n")
    np.save(npz_folder / "user_ids.npy", np.array([70, 80, 90]))
    data = load(npz_folder)
    assert data.item_ids.tolist() == ["B01", "B02", "B03", "B04"] and data.user_ids.tolist() == [70, 80, 90]


def test_fingerprint_sees_every_part(npz_folder, features):
    before = load(npz_folder).fingerprint()
    assert load(npz_folder).fingerprint() == before and len(before) == 64
    changed = features.copy()
    changed[3, 4] += 1
    np.save(npz_folder / "image_feat.npy", changed)
    second = load(npz_folder).fingerprint()
    sparse.save_npz(npz_folder / "val.npz", matrix_of(VAL[:1]))
    third = load(npz_folder).fingerprint()
    (npz_folder / "user_ids.txt").write_text("a\nb\nc\n")
    assert len({before, second, third, load(npz_folder).fingerprint()}) == 4


def test_json_ids_are_text_and_rows_are_items(tmp_path, features):
    (tmp_path / "train.json").write_text('{"10": [0, 1, 1], "2": [1, "2"], "7": [3]}')
    (tmp_path / "val.json").write_text('{"2": [0], "7": []}')
    np.save(tmp_path / "image_feat.npy", features)
    np.save(tmp_path / "text_feat.npy", features.astype(np.float32))
    data = load(tmp_path)
    assert data.user_ids.tolist() == ["2", "7", "10"] and data.item_ids.tolist() == ["0", "1", "2", "3"]
    assert pairs_of(data.train) == {(2, 0), (2, 1), (0, 1), (0, 2), (1, 3)}
    assert pairs_of(data.val) == {(0, 0)} and set(data.features) == {"image", "text"}
    assert "1 duplicate pairs of train merged" in data.notes


def test_json_core_folder_and_item_ids(tmp_path, features):
    core = tmp_path / "5-core"
    core.mkdir()
    (core / "train.json").write_text('{"u": ["b", "d"], "u": ["a"]}')  # a user twice: both lists count
    np.save(tmp_path / "image_feat.npy", features)
    (tmp_path / "item_ids.txt").write_text("a\nb\nc\nd\n")
    data = load(tmp_path)
    assert data.name == tmp_path.name and pairs_of(data.train) == {(0, 0), (0, 1), (0, 3)}


def as_table(tmp_path, suffix, header, rows) -> Path:
    path = tmp_path / f"interactions{suffix}"
    if suffix != ".parquet":
        return write_rows(path, [header, *rows], "\t" if suffix == ".tsv" else ",")
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = [list(column) for column in zip(*rows, strict=True)]
    pq.write_table(pa.table(dict(zip(header, columns, strict=True))), path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
@pytest.mark.parametrize("ids", ["int", "text", "zeros"])
def test_table_ids_of_any_type(tmp_path, suffix, ids):
    name = {"int": int, "text": lambda n: f"item é{n}", "zeros": lambda n: f"{n:03d}"}[ids]
    rows = [(name(user + 5), name(item), 100 + item) for user, item in TRAIN for _ in range(2)]
    data = load(as_table(tmp_path, suffix, ("user_id", "item_id", "time"), rows), split="random", test_fraction=0)
    assert data.item_ids.tolist() == sorted({row[1] for row in rows}) and data.test is None
    assert data.user_ids.tolist() == [name(5), name(6), name(7)]
    assert pairs_of(data.train) | pairs_of(data.val) == set(TRAIN)


@pytest.mark.parametrize("kind", ["npy", "npy_shared_ids", "npz", "csv", "parquet"])
def test_keyed_features_follow_the_items(tmp_path, features, kind):
    names = np.array(["d", "a", "x", "b", "c"])  # x is described but never bought: a cold item
    rows = np.concatenate([features[[3, 0]], np.full((1, 5), 7, np.float16), features[[1, 2]]])
    write_rows(tmp_path / "interactions.csv", [("user", "item"), *((f"u{u}", "abcd"[i]) for u, i in TRAIN)])
    if kind.startswith("npy"):
        np.save(tmp_path / "text_feat.npy", rows)
        ids_name = "text_ids.txt" if kind == "npy" else "item_ids.txt"
        (tmp_path / ids_name).write_text("\n".join(names))
    elif kind == "npz":
        np.savez(tmp_path / "text_feat.npz", ids=names, features=rows)
    elif kind == "csv":
        cells = [(name, *map(float, row)) for name, row in zip(names, rows, strict=True)]
        write_rows(tmp_path / "text_feat.csv", [("item", *"vwxyz"), *cells])
    else:
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        columns = {"item": names.tolist()} | {f"v{i}": rows[:, i].astype(np.float32) for i in range(5)}
        pq.write_table(pa.table(columns), tmp_path / "text_feat.parquet")
    data = load(tmp_path, split="random")
    assert data.item_ids.tolist() == ["a", "b", "c", "d", "x"]
    np.testing.assert_array_equal(data.features["text"], np.concatenate([features, np.full((1, 5), 7)]))
    assert load(tmp_path, split="random", features={}).num_items == 4


def test_integer_items_match_ids_written_as_text(tmp_path):
    write_rows(tmp_path / "interactions.csv", [("user", "item"), (1, 10), (1, 9), (2, 10)])
    np.savez(tmp_path / "a_feat.npz", ids=np.array(["9", "10", "z"]), features=np.eye(3))
    data = load(tmp_path, split="random")
    assert data.item_ids.tolist() == ["10", "9", "z"]
    assert data.features["a"].argmax(1).tolist() == [1, 0, 2]


def test_table_given_parts_and_file_list(tmp_path):
    for part, rows in (("train", TRAIN), ("validation", VAL)):
        write_rows(tmp_path / f"{part}.csv", [("user", "item"), *rows])
    np.savez(tmp_path / "a_feat.npz", ids=np.arange(4), features=np.eye(4))
    folder = load(tmp_path)
    files = load([tmp_path / "train.csv", tmp_path / "validation.csv", tmp_path / "a_feat.npz"])
    assert pairs_of(folder.train) == set(TRAIN) and pairs_of(folder.val) == set(VAL) and folder.test is None
    assert folder.fingerprint() == files.fingerprint() and folder.notes == ("split: given",)


def test_columns_and_ignore(tmp_path):
    rows = [("buyer", "item", "rating"), ("u", "a", 3), ("u", "b", 4)]
    path = write_rows(tmp_path / "sales.csv", rows)
    data = load(path, columns={"user": "buyer"}, ignore=["rating"])
    assert data.name == "sales" and data.train.nnz == 2


def test_json_and_csv_of_the_same_pairs_agree(tmp_path, npz_folder):
    lists: dict[str, list[int]] = {}
    for user, item in TRAIN:
        lists.setdefault(str(user), []).append(item)
    other = tmp_path / "other"
    other.mkdir()
    (other / "train.json").write_text(json.dumps(lists))
    assert pairs_of(load(other).train) == pairs_of(load(npz_folder, features={}).train)


def test_pair_in_two_parts_counts_for_the_earlier(npz_folder):
    sparse.save_npz(npz_folder / "val.npz", matrix_of([*VAL, TRAIN[0]]))
    with pytest.warns(DataWarning, match="1 pairs of val are also in train"):
        data = load(npz_folder)
    assert pairs_of(data.val) == set(VAL)


def test_user_without_train_items_is_kept_and_warned_once(tmp_path):
    sparse.save_npz(tmp_path / "train.npz", matrix_of(TRAIN[:2]))
    sparse.save_npz(tmp_path / "val.npz", matrix_of([(1, 0), (2, 0), (0, 3)]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = load(tmp_path)
    assert [str(one.message) for one in caught if "no train item" in str(one.message)] == [
        f"{tmp_path}: 2 users in val have no train item; they are kept, but nothing about them can be learned"
    ]
    assert data.val.nnz == 3 and data.num_users == 3


def test_describe_says_what_was_understood(npz_folder):
    text = describe(load(npz_folder))
    for expected in ("3 users, 4 items", "sparsity 58.3333%", "image", "float16", "50%", "items 0 of 4"):
        assert expected in text
    bare = describe(load(npz_folder, features={}))
    assert "none" in bare


def test_resplit_of_given_data(npz_folder):
    first, again = load(npz_folder, split="random", seed=3), load(npz_folder, split="random", seed=3)
    assert first.fingerprint() == again.fingerprint()
    assert pairs_of(first.train) | pairs_of(first.val) | pairs_of(first.test) == {*TRAIN, *VAL}
    with pytest.raises(DataError, match="timestamp"):
        load(npz_folder, split="time")


def test_min_count_and_core(tmp_path):
    rows = [(u, i, t) for t in (1, 2) for u in range(4) for i in range(4)]
    rows += [(9, 0, 3), (9, 0, 4), (0, 9, 5), (1, 1, 0)]
    path = write_rows(tmp_path / "x.csv", [("user", "item", "timestamp"), *rows])
    data = load(path, min_count=2, core=3, split="random")
    assert data.user_ids.tolist() == [0, 1, 2, 3] and data.item_ids.tolist() == [0, 1, 2, 3]


def test_development_data(shared_data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        data = load(shared_data / "tiktok")
    assert (data.num_users, data.num_items, data.train.nnz, data.val.nnz) == (9308, 6710, 59541, 3051)
    assert {name: array.shape for name, array in data.features.items()} == {
        "audio": (6710, 128),
        "image": (6710, 128),
    }
    assert all(isinstance(array, np.memmap) and array.dtype == np.float16 for array in data.features.values())


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1), unique=True))
def test_text_ids_never_merge(values):
    ids = ids_from_text(values)
    assert len(np.unique(ids)) == len(values) and [str(one) for one in ids.tolist()] == values


@given(st.lists(st.integers(-50, 50), unique=True), st.lists(st.integers(-60, 60)), st.booleans(), st.booleans())
def test_locate_is_a_dictionary(universe, wanted, text_here, text_there):
    here = np.asarray(universe, np.int64).astype(str if text_here else np.int64)
    there = np.asarray(wanted, np.int64).astype(str if text_there else np.int64)
    position = {value: index for index, value in enumerate(universe)}
    assert locate(here, there).tolist() == [position.get(value, -1) for value in wanted]
    assert len({array.dtype.kind for array in unify(here, there)}) == 1


EVENTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 9)), max_size=60)


@given(EVENTS, st.integers(1, 3))
def test_merge_pairs_against_a_dictionary(events, min_count):
    times: dict[tuple[int, int], list[int]] = {}
    for user, item, time in events:
        times.setdefault((user, item), []).append(time)
    expected = {pair: sorted(seen)[min_count - 1] for pair, seen in times.items() if len(seen) >= min_count}
    columns = [np.asarray([event[i] for event in events], np.int64) for i in range(3)]
    users, items, known = merge_pairs(*columns, min_count)
    assert list(zip(users.tolist(), items.tolist(), strict=True)) == sorted(expected)
    assert known.tolist() == [expected[pair] for pair in sorted(expected)]


@settings(max_examples=50)
@given(st.sets(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=50), st.integers(0, 4))
def test_k_core_is_the_largest(pairs, k):
    rest = set(pairs)
    while True:  # drop one node at a time
        low = [p for p in rest if any(sum(q[i] == p[i] for q in rest) < k for i in (0, 1))]
        if not low:
            break
        rest.discard(low[0])
    users, items = (np.asarray([pair[i] for pair in sorted(pairs)], np.int64) for i in (0, 1))
    keep = k_core(users, items, k)
    assert set(zip(users[keep].tolist(), items[keep].tolist(), strict=True)) == rest
