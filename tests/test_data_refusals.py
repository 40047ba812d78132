"""What is refused, and that the message says where, what was expected and what was found."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from mmkd.data import DataError, load


class Trap:
    """Unpickling this leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_the_trap_works(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


@pytest.fixture
def folder(tmp_path) -> Path:
    """A good npz folder: 3 users, 4 items, one modality."""
    matrix = sparse.csr_matrix((np.ones(4, np.float32), ([0, 1, 2, 2], [0, 1, 2, 3])), shape=(3, 4))
    sparse.save_npz(tmp_path / "train.npz", matrix)
    np.save(tmp_path / "image_feat.npy", np.ones((4, 5), np.float32))
    return tmp_path


@pytest.fixture
def csv_folder(tmp_path) -> Path:
    folder = tmp_path / "tables"
    folder.mkdir()
    (folder / "interactions.csv").write_text("user,item\nann,a\nann,b\nbob,a\n")
    np.savez(folder / "text_feat.npz", ids=np.array(["a", "b"]), features=np.ones((2, 3)))
    return folder


def refused(folder, *fragments: str, error=DataError, **options) -> None:
    with pytest.raises(error) as caught:
        load(folder, **options)
    for fragment in fragments:
        assert fragment in str(caught.value), str(caught.value)


def test_good_folders_load(folder):
    assert load(folder).train.nnz == 4


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_features_not_finite(folder, value, dtype):
    features = np.ones((4, 5), dtype)
    features[2, 3] = value
    np.save(folder / "image_feat.npy", features)
    refused(folder, "image_feat.npy: row 2, column 3 is", str(value), "finite")


def test_feature_not_finite_names_the_item(csv_folder):
    np.savez(csv_folder / "text_feat.npz", ids=np.array(["b", "a"]), features=np.array([[1.0], [np.nan]]))
    refused(csv_folder, "text_feat.npz: row 1 (item 'a'), column 0 is nan")


def test_item_outside_the_features(folder):
    np.save(folder / "image_feat.npy", np.ones((3, 5), np.float32))
    refused(folder, "image_feat.npy: item id 3 (train.npz, user 2)", "expected more than 3 rows, found 3")


def test_wrong_row_count(folder):
    np.save(folder / "image_feat.npy", np.ones((6, 5), np.float32))
    refused(folder, "image_feat.npy: wrong row count: expected 4 (one per column of train.npz), found 6")


@pytest.mark.parametrize("array", [np.ones(4), np.ones((4, 0)), np.ones((4, 2, 2)), np.array(["x"] * 4)[:, None]])
def test_features_of_another_shape_or_type(folder, array):
    np.save(folder / "image_feat.npy", array)
    refused(folder, "image_feat.npy: features must", "found")


def test_json_item_outside_the_features(tmp_path):
    (tmp_path / "train.json").write_text('{"u": [0, 7]}')
    np.save(tmp_path / "image_feat.npy", np.ones((5, 2)))
    refused(tmp_path, "image_feat.npy: item id 7 (train.json)", "expected more than 7 rows, found 5")


def test_json_modalities_of_different_length(tmp_path):
    (tmp_path / "train.json").write_text('{"u": [0, 1]}')
    np.save(tmp_path / "image_feat.npy", np.ones((5, 2)))
    np.save(tmp_path / "text_feat.npy", np.ones((4, 2)))
    refused(tmp_path, "text_feat.npy: wrong row count: expected 5", "found 4")


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("[[1, 2]]", "expected an object"),
        ("user,item", "expected JSON"),
        ('{"u": 3}', "user 'u': expected a list of items, found 3"),
        ('{"u": [1.5]}', "user 'u': expected an item id (a whole number or text), found 1.5"),
        ('{"u": [true]}', "found True"),
        ('{"u": [-1]}', "user 'u': item id -1 is negative"),
        ('{"u": ["B0"]}', "user 'u': item 'B0' is no row number"),
        ("{}", "train set is empty"),
        ('{"u": []}', "train set is empty"),
    ],
)
def test_json_of_another_shape(tmp_path, text, fragment):
    (tmp_path / "train.json").write_text(text)
    refused(tmp_path, "" if "empty" in fragment else "train.json", fragment)


def test_json_item_not_among_the_ids(tmp_path):
    (tmp_path / "train.json").write_text('{"u": ["a", "q"]}')
    (tmp_path / "item_ids.txt").write_text("a\nb\n")
    refused(tmp_path, "train.json: user 'u': item 'q' is not one of the 2 ids", "item_ids.txt")


def test_table_item_outside_the_features(csv_folder):
    (csv_folder / "interactions.csv").write_text("user,item\nann,a\nann,zebra\n")
    refused(csv_folder, "text_feat.npz: item 'zebra' of interactions.csv is outside the features", "1 of")


def test_keyed_features_row_count_and_twice(csv_folder):
    np.savez(csv_folder / "text_feat.npz", ids=np.array(["a", "b", "c"]), features=np.ones((2, 3)))
    refused(csv_folder, "text_feat.npz: wrong row count: expected 3 (one per item id), found shape (2, 3)")
    np.savez(csv_folder / "text_feat.npz", ids=np.array(["a", "b", "a"]), features=np.ones((3, 3)))
    refused(csv_folder, "text_feat.npz: item 'a' is there twice, in rows 1 and 3")
    np.savez(csv_folder / "text_feat.npz", keys=np.array(["a"]), features=np.ones((1, 3)))
    refused(csv_folder, "expected the arrays 'ids' and 'features', found ['features', 'keys']")


def test_npy_beside_a_table_needs_ids(csv_folder):
    (csv_folder / "text_feat.npz").unlink()
    np.save(csv_folder / "text_feat.npy", np.ones((2, 3)))
    refused(csv_folder, "text_feat.npy", "text_ids.txt", "item_ids.npy")


def test_feature_table_cells(csv_folder):
    (csv_folder / "text_feat.npz").unlink()
    (csv_folder / "text_feat.csv").write_text("item,x\na,1.0\nb,tall\n")
    refused(csv_folder, "text_feat.csv: row 2, column 'x': expected a number, found 'tall'")
    (csv_folder / "text_feat.csv").write_text("product,x\na,1.0\n")
    refused(csv_folder, "expected an item id column named item or item_id, found product, x")


def test_one_modality_in_two_files(csv_folder):
    (csv_folder / "text_feat.csv").write_text("item,x\na,1\nb,2\n")
    refused(csv_folder, "modality 'text' is in two files", "text_feat.csv", "text_feat.npz")


def test_feature_file_of_another_format(folder):
    (folder / "text_feat.csv").write_text("item,x\n0,1\n")
    refused(folder, "text_feat.csv", ".npy")


def test_empty_train_set(folder):
    sparse.save_npz(folder / "train.npz", sparse.csr_matrix((3, 4), dtype=np.float32))
    refused(folder, str(folder), "the train set is empty", "found none")


def test_empty_table(csv_folder):
    (csv_folder / "interactions.csv").write_text("user,item\n")
    refused(csv_folder, "interactions.csv: no rows after the header")


@pytest.mark.parametrize(
    ("header", "fragments"),
    [
        ("user,item,rating", ("unknown column 'rating'", "expected user, item[, timestamp]", "ignore=['rating']")),
        ("user,item,timestmp", ("unknown column 'timestmp'", "did you mean 'timestamp'")),
        ("usr,item,timestamp", ("no user column", "found usr, item, timestamp", "columns=")),
        ("1,2,3", ("no user column", "without a header")),
        ("user,item,user", ("column 'user' is there twice",)),
    ],
)
def test_unknown_columns(tmp_path, header, fragments):
    path = tmp_path / "x.csv"
    path.write_text(f"{header}\n1,2,3\n")
    refused(path, "x.csv", *fragments)


@pytest.mark.parametrize(
    ("rows", "fragments"),
    [
        ("1,2,3\n1,2\n", ("row 2 has 2 fields, expected 3",)),
        ("1,,3\n", ("row 1 has no 'item'",)),
        ("1,2,2020-01-01\n1,3,yesterday\n", ("row 2, column 'timestamp'", "found 'yesterday'")),
        ("1,2,3\n1,3,inf\n", ("row 2", "finite time")),
        ('1,"2,3\n', ("cannot be read",)),
    ],
)
def test_bad_rows(tmp_path, rows, fragments):
    path = tmp_path / "x.csv"
    path.write_text("user,item,timestamp\n" + rows)
    refused(path, "x.csv", *fragments)


def test_missing_values_in_parquet(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for users in ([1, None], ["a", None], [1.0, float("nan")]):
        pq.write_table(pa.table({"user": users, "item": [1, 2]}), tmp_path / "x.parquet")
        refused(tmp_path / "x.parquet", "x.parquet: row 2 has no 'user'")


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("train.npz", b"user,item\n1,2\n", "text"),
        ("train.npz", gzip.compress(b"x"), "gzip"),
        ("train.json", b"PAR1\x00\x00PAR1", "Parquet"),
        ("interactions.csv", b"\x93NUMPY\x01\x00v\x00", ".npy"),
        ("interactions.csv", b"\x00\x01\x02\x03", "binary"),
        ("interactions.csv", b"", "empty"),
        ("interactions.parquet", b"user,item\n1,2\n", "text"),
        ("interactions.parquet", b"PK\x05\x06" + bytes(18), "zip"),
    ],
)
def test_not_what_its_name_says(tmp_path, name, content, found):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path, f"{name}: not what its name says", found)


def test_feature_file_not_what_its_name_says(folder):
    (folder / "image_feat.npy").write_text("1,2,3")
    refused(folder, "image_feat.npy: not what its name says", "found text")


def test_cut_short(folder):
    content = (folder / "image_feat.npy").read_bytes()
    (folder / "image_feat.npy").write_bytes(content[:-8])
    refused(folder, "image_feat.npy: cannot be read", "cut short")
    content = (folder / "train.npz").read_bytes()
    (folder / "train.npz").write_bytes(content[: len(content) // 2])
    refused(folder, "train.npz: cannot be read")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", ["train.npz", "train.json", "interactions.csv", "interactions.parquet", "train.pkl"])
def test_pickles_are_never_opened(tmp_path, name, protocol):
    mark = tmp_path / "mark"
    (tmp_path / name).write_bytes(pickle.dumps(Trap(mark), protocol))
    refused(tmp_path, name)
    refused(tmp_path / name, name)
    assert not mark.exists()


def test_pickles_as_features(folder):
    mark = folder / "mark"
    objects = np.empty((4, 1), object)
    objects[:] = [[Trap(mark)]] * 4
    np.save(folder / "image_feat.npy", objects)
    refused(folder, "image_feat.npy", "pickle", "never unpickles")
    (folder / "image_feat.npy").write_bytes(pickle.dumps(Trap(mark)))
    refused(folder, "image_feat.npy", "pickle")
    (folder / "image_feat.npy").unlink()
    (folder / "image_feat.pkl").write_bytes(pickle.dumps(Trap(mark)))
    refused(folder, "image_feat.pkl", "pickle")
    assert not mark.exists()


def test_pickle_inside_an_npz(folder):
    mark = folder / "mark"
    np.savez(folder / "train.npz", data=np.array([Trap(mark)], dtype=object))
    refused(folder, "train.npz", "pickle")
    assert not mark.exists()


def test_npz_that_is_no_sparse_matrix(folder):
    np.savez(folder / "train.npz", users=np.arange(3))
    refused(folder, "train.npz: expected a csr, csc or coo matrix", "['users']")
    sparse.save_npz(folder / "train.npz", sparse.bsr_matrix(np.eye(4)))
    refused(folder, "of format 'bsr'")


def test_npz_with_broken_indices(folder):
    good = dict(format=b"csr", shape=np.array([3, 4]), data=np.ones(2), indptr=np.array([0, 1, 2, 2]))
    np.savez(folder / "train.npz", **good, indices=np.array([0, 9]))
    refused(folder, "train.npz: item id 9 (user 1) is outside the matrix: expected 0 to 3")
    np.savez(folder / "train.npz", **{**good, "indptr": np.array([0, 2, 1, 2])}, indices=np.array([0, 1]))
    refused(folder, "train.npz: broken 'indptr'")
    for value in (np.nan, -1.0):
        np.savez(folder / "train.npz", **{**good, "data": np.array([1.0, value])}, indices=np.array([0, 1]))
        refused(folder, f"train.npz: entry of user 1, item 1 is {value}")


def test_parts_of_different_shape(folder):
    sparse.save_npz(folder / "val.npz", sparse.csr_matrix(np.eye(3, 5, dtype=np.float32)))
    refused(folder, "val.npz: shape (3, 5), expected (3, 4) as in train.npz")


def test_ids_of_the_wrong_length_or_twice(folder):
    (folder / "item_ids.txt").write_text("a\nb\nc\n")
    refused(folder, "item_ids.txt: wrong row count: expected 4 item ids, found 3")
    (folder / "item_ids.txt").write_text("a\nb\nb\nc\n")
    refused(folder, "item_ids.txt: id 'b' is there twice, in rows 2 and 3")


def test_nothing_to_load(tmp_path):
    refused(tmp_path / "absent", "no such file or folder")
    refused(tmp_path, "found an empty folder")
    (tmp_path / "notes.txt").write_text("hello")
    refused(tmp_path, "found notes.txt")
    refused(tmp_path / "notes.txt", "expected a file ending in")


def test_two_formats_in_one_folder(folder):
    (folder / "train.json").write_text('{"u": [0]}')
    refused(folder, "holds the formats npz and json", "format=")
    assert load(folder, format="npz").train.nnz == 4


def test_arguments_that_do_not_fit(folder, csv_folder):
    path = csv_folder / "interactions.csv"
    for options, fragment in (
        ({"split": "tme"}, "split must be one of given, random, leave-last-out, time, got 'tme'"),
        ({"val_fraction": 0.6, "test_fraction": 0.5}, "below 1"),
        ({"format": "xml"}, "format must be one of"),
        ({"split": "random", "columns": {"buyer": "user"}}, "unknown role 'buyer'"),
        ({"split": "time"}, "needs a timestamp column"),
        ({"split": "given"}, "needs train and val or test files"),
        ({"core": 50}, "no pair is left"),
    ):
        refused(path, fragment, error=ValueError, **options)
    refused(path, "unknown argument 'sed'", error=TypeError, sed=3)
    refused(folder, "core has no effect on the npz format", error=ValueError, core=5, format="npz")
    refused("synthetic", "ignore has no effect", error=ValueError, ignore=["x"])
