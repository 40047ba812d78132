"""RecBole, MMRec, rows and tuples: what is read, what is refused, and conversion there and back."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from mmkd.cli import app
from mmkd.data import CONVERTERS, DataError, Dataset, convert, from_rows, from_tuples, load, synthetic
from mmkd.data.assemble import to_csr


def named_pairs(data: Dataset, part: str) -> set[tuple[str, str]]:
    coo = getattr(data, part).tocoo()
    return set(
        zip(data.user_ids[coo.row].astype(str).tolist(), data.item_ids[coo.col].astype(str).tolist(), strict=True)
    )


def small(ids: str = "text", names: bool = True, features: bool = True) -> Dataset:
    made = synthetic(30, 20, 200, seed=3, modalities={"image": 5, "text": 3} if features else {})
    user_ids, item_ids = made.user_ids * 7, made.item_ids + 100
    if ids == "text":
        user_ids, item_ids = (
            np.array([f"{mark} é{one:03d}" for one in some]) for mark, some in (("u", user_ids), ("i", item_ids))
        )
    texts = np.array([f"Item {i}" for i in range(20)]) if names else None
    return Dataset("small set", made.train, made.val, made.test, made.features, user_ids, item_ids, texts)


@pytest.mark.parametrize("ids", ["text", "int"])
@pytest.mark.parametrize("to", CONVERTERS)
def test_conversion_there_and_back(tmp_path, to, ids):
    data = small(ids)
    folder, lost = convert(data, tmp_path / "out", to)
    back = load(folder)
    for part in ("train", "val", "test"):
        assert named_pairs(back, part) == named_pairs(data, part)
    assert back.features.keys() == data.features.keys()
    order = [back.item_ids.astype(str).tolist().index(str(one)) for one in data.item_ids.tolist()]
    for name, array in data.features.items():
        np.testing.assert_array_equal(np.asarray(back.features[name])[order], array)
    if to == "recbole":
        assert back.item_names[order].tolist() == data.item_names.tolist()
    else:
        assert any("item names" in sentence for sentence in lost)
    if to == "npz":
        assert back.fingerprint() == data.fingerprint()
    if to != "json":
        assert back.user_ids.dtype.kind == data.user_ids.dtype.kind
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_conversion_says_what_it_cannot_keep_and_refuses(tmp_path):
    data = small(features=False, names=False)
    lonely = Dataset(
        "x",
        to_csr(np.array([0]), np.array([0]), 3, 4),
        None,
        None,
        {},
        np.array(["a", "b", "c"]),
        np.array(list("wxyz")),
    )
    assert convert(lonely, tmp_path / "one", "recbole")[1] == [
        "2 users without any interaction: the recbole format has no row for them",
        "3 items without interaction or features: the recbole format has no row for them",
    ]
    with pytest.raises(DataError, match="to: expected one of npz, json, table, mmrec, recbole, got 'csv'"):
        convert(data, tmp_path / "two", "csv")
    with pytest.raises(DataError, match="is already there"):
        convert(data, tmp_path / "one", "npz")
    torn = Dataset("x", lonely.train, None, None, {}, np.array(["a\tb", "b", "c"]), lonely.item_ids)
    for to in ("recbole", "mmrec", "table"):
        with pytest.raises(DataError, match=r"user id 'a\\tb': the .* format cannot hold"):
            convert(torn, tmp_path / "three", to)
    assert not (tmp_path / "three").exists()
    half = Dataset("x", lonely.train, None, None, {"v": np.ones((4, 2), np.float16)}, lonely.user_ids, lonely.item_ids)
    assert "dtype of v: float16 becomes float32" in convert(half, tmp_path / "four", "recbole")[1]


def test_command_line_converts(tmp_path):
    convert(small("int", names=False), tmp_path / "a", "mmrec")
    arguments = ["data", str(tmp_path / "a"), "--convert", str(tmp_path / "b"), "--to", "npz"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert named_pairs(load(tmp_path / "a"), "test") == named_pairs(load(tmp_path / "b"), "test")
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 1 and "already there" in " ".join(again.output.split())


INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\nu1\ta\t3\t30\nu1\tb\t1\t10\nu2\ta\t5\t20\nu2\tc\t4\t40\n"
ITEM = 'item_id:token\ttitle:token_seq\tyear:token\tvec:float_seq\na\tThe "A"\t1990\t1 2\nb\tB\t\t3 4\nc\tC\t2000\t5 6.5\nd\tD\t1\t7 8\n'


def recbole_folder(path: Path, inter: str = INTER, item: str = ITEM) -> Path:
    (path / "shop.inter").write_text(inter)
    (path / "shop.item").write_text(item)
    return path


def test_recbole_files_typed_headers(tmp_path):
    data = load(recbole_folder(tmp_path), split="random", val_fraction=0, test_fraction=0)
    assert data.name == "shop" and named_pairs(data, "train") == {("u1", "a"), ("u1", "b"), ("u2", "a"), ("u2", "c")}
    assert data.item_ids.tolist() == ["a", "b", "c", "d"] and data.item_names.tolist() == ['The "A"', "B", "C", "D"]
    assert data.features["vec"].tolist() == [[1, 2], [3, 4], [5, 6.5], [7, 8]]
    assert "fields of shop.inter left out: rating; every row is an interaction" in data.notes
    assert "fields of shop.item left out: year" in data.notes
    by_time = load(tmp_path / "shop.inter", val_fraction=0.25, test_fraction=0.25)
    assert named_pairs(by_time, "test") == {("u2", "c")} and named_pairs(by_time, "val") == {("u1", "a")}


def test_ml_100k_of_the_recbole_wheel_loads():
    spec = find_spec("recbole")
    if spec is None:
        pytest.skip("recbole is not installed; its wheel holds ml-100k")
    data = load(Path(next(iter(spec.submodule_search_locations))) / "dataset_example" / "ml-100k")
    assert (data.num_users, data.num_items) == (943, 1682)
    assert sum(getattr(data, part).nnz for part in ("train", "val", "test")) == 100_000
    assert data.item_names[data.item_ids.tolist().index(1)] == "Toy Story"


@pytest.mark.parametrize(
    ("inter", "item", "fragments"),
    [
        (INTER.replace("rating:float", "rating:int"), ITEM, ["shop.inter: header field 'rating:int'", "token_seq"]),
        (
            INTER.replace("item_id:token", "thing:token"),
            ITEM,
            ["no item field: expected item_id:token", "found user_id"],
        ),
        (INTER + "u3\ta\t1\n", ITEM, ["shop.inter: row 5 has 3 fields, expected 4"]),
        (INTER + "\ta\t1\t2\n", ITEM, ["shop.inter: row 5 has no 'user_id'"]),
        (INTER + "u3\ta\t1\tnow\n", ITEM, ["shop.inter: row 5, column 'timestamp'", "found 'now'"]),
        (INTER.splitlines()[0] + "\n", ITEM, ["shop.inter: no rows after the header"]),
        (INTER, ITEM.replace("3 4", "3"), ["shop.item: row 2 (item 'b'), field 'vec': expected 2 numbers", "found 1"]),
        (INTER, ITEM.replace("3 4", "3 x"), ["shop.item: row 2, field 'vec': expected numbers, found 'x'"]),
        (INTER, ITEM.replace("3 4", "3 nan"), ["shop.item: row 1 (item 'b'), column 1 is nan"]),
        (INTER, ITEM.replace("\nd\t", "\na\t"), ["shop.item: item 'a' is there twice, in rows 1 and 4"]),
        (INTER + "u3\tq\t1\t50\n", ITEM, ["shop.item: item 'q' of shop.inter is outside the features"]),
    ],
)
def test_recbole_refusals(tmp_path, inter, item, fragments):
    with pytest.raises(DataError) as caught:
        load(recbole_folder(tmp_path, inter, item), split="random")
    for fragment in fragments:
        assert fragment in str(caught.value), str(caught.value)


def test_recbole_files_that_are_not_one_data_set(tmp_path):
    recbole_folder(tmp_path)
    (tmp_path / "other.inter").write_text(INTER)
    with pytest.raises(DataError, match=r"expected one NAME\.inter, or .* found other\.inter, shop\.inter"):
        load(tmp_path)


MMREC = "userID\titemID\trating\tx_label\n0\t0\t5\t0\n0\t2\t5\t1\n1\t1\t5\t0\n1\t3\t5\t2\n"


def mmrec_folder(path: Path, text: str = MMREC, rows: int = 4) -> Path:
    (path / "baby.inter").write_text(text)
    np.save(path / "image_feat.npy", np.arange(rows * 2, dtype=np.float32).reshape(rows, 2))
    return path


def test_mmrec_files(tmp_path):
    data = load(mmrec_folder(tmp_path))
    assert [named_pairs(data, part) for part in ("train", "val", "test")] == [
        {("0", "0"), ("1", "1")}, {("0", "2")}, {("1", "3")},
    ]  # fmt: skip
    assert data.features["image"].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert "fields of baby.inter left out: rating" in data.notes
    (tmp_path / "i_id_mapping.csv").write_text("asin\titemID\nB03\t3\nB00\t0\nB02\t2\nB01\t1\n")
    (tmp_path / "u_id_mapping.csv").write_text("user\tuserID\nZed\t1\nAnn\t0\n")
    data = load(tmp_path)
    assert named_pairs(data, "test") == {("Zed", "B03")} and data.item_ids.tolist() == ["B00", "B01", "B02", "B03"]
    assert data.features["image"][3].tolist() == [6, 7]


@pytest.mark.parametrize(
    ("text", "rows", "fragments"),
    [
        (MMREC.replace("5\t2", "5\t3"), 4, ["baby.inter: row 4, column x_label: expected 0, 1 or 2, found 3"]),
        (MMREC.replace("0\t2\t5", "0\t-2\t5"), 4, ["baby.inter: row 2, column itemID: expected a whole number >= 0, found '-2'"]),
        (MMREC.replace("userID", "who"), 4, ["expected a column userID or user_id or user, found who"]),
        (MMREC, 3, ["image_feat.npy: item id 3 (baby.inter, row 4) is outside the features"]),
        (MMREC + "1\n", 4, ["baby.inter: row 5 has 1 fields, expected 4"]),
        (MMREC.splitlines()[0] + "\n", 4, ["no rows after the header"]),
    ],
)  # fmt: skip
def test_mmrec_refusals(tmp_path, text, rows, fragments):
    with pytest.raises(DataError) as caught:
        load(mmrec_folder(tmp_path, text, rows))
    for fragment in fragments:
        assert fragment in str(caught.value), str(caught.value)


def test_mmrec_mapping_refusals(tmp_path):
    mmrec_folder(tmp_path)
    for text, fragment in (
        ("asin\titemID\nB0\t0\nB1\t1\n", "number 3 of baby.inter has no id; expected 4 rows, found 2"),
        ("asin\titemID\nB0\t0\nB1\t0\nB2\t2\nB3\t3\n", "expected every number from 0 to 3 once"),
        ("asin\titemID\nB0\t0\nB0\t1\nB2\t2\nB3\t3\n", "id 'B0' is there twice"),
    ):
        (tmp_path / "i_id_mapping.csv").write_text(text)
        with pytest.raises(DataError, match=rf"i_id_mapping\.csv: .*{fragment}"):
            load(tmp_path)


class Columns:
    """The part of `datasets.Dataset` that is used: named columns."""

    def __init__(self, **columns):
        self._columns, self.column_names = columns, list(columns)

    def __getitem__(self, name):
        return self._columns[name]


ROWS = [{"user": "ann", "item": i, "timestamp": t} for i, t in ((1, 5), (2, 6))] + [
    {"user": "bob", "item": 1, "timestamp": 9}
]
VECTORS = [{"item": i, "title": f"T{i}", "image": [i, 0.5]} for i in (3, 2, 1)]


def test_rows_and_columns_and_tuples_agree():
    options = {"split": "random", "val_fraction": 0, "test_fraction": 0}
    first = from_rows(iter(ROWS), items=VECTORS, **options)
    columns = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    second = from_rows(Columns(**columns), items=VECTORS, **options)
    third = from_tuples(
        [(row["user"], row["item"], 4.0, row["timestamp"]) for row in ROWS],
        features={"image": ([3, 2, 1], np.array([[3, 0.5], [2, 0.5], [1, 0.5]], np.float32))}, **options,
    )  # fmt: skip
    assert first.fingerprint() == second.fingerprint() == third.fingerprint()
    assert first.item_names.tolist() == ["T1", "T2", "T3"] and first.features["image"][:, 0].tolist() == [1, 2, 3]
    parts = from_rows({"train": ROWS[:2], "validation": Columns(**{n: [ROWS[2][n]] for n in ROWS[2]})})
    assert named_pairs(parts, "val") == {("bob", "1")} and parts.train.nnz == 2
    renamed = from_rows([{"who": 1, "what": 2, "stars": 3}], columns={"user": "who", "item": "what"}, ignore=["stars"], **options)  # fmt: skip
    assert named_pairs(renamed, "train") == {("1", "2")}


def test_a_real_datasets_object():
    datasets = pytest.importorskip("datasets")
    options = {"split": "random", "val_fraction": 0, "test_fraction": 0}
    rows, vectors = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(VECTORS)
    expected = from_rows(ROWS, items=VECTORS, **options).fingerprint()
    assert from_rows(rows, items=vectors, **options).fingerprint() == expected
    assert from_rows(datasets.DatasetDict(train=rows), items=vectors, **options).fingerprint() == expected


@pytest.mark.parametrize(
    ("make", "fragment"),
    [
        (lambda: from_rows([{"user": 1, "item": 2}, {"user": 3}]), "rows: row 2: expected the fields user, item, found user"),
        (lambda: from_rows([{"user": 1, "item": None}]), "rows: row 1 has no 'item'"),
        (lambda: from_rows([{"user": "", "item": 1}]), "rows: row 1 has no 'user'"),
        (lambda: from_rows([(1, 2)]), "rows: row 1: expected a dictionary, found tuple"),
        (lambda: from_rows([]), "rows: no rows"),
        (lambda: from_rows([{"user": 1, "item": 2, "stars": 3}]), "unknown column 'stars'"),
        (lambda: from_rows({"test": ROWS}), "expected the parts train, validation, test, found test"),
        (lambda: from_rows({"train": ROWS[:1], "test": [{"user": 1}]}), "rows['test']: no item column"),
        (lambda: from_rows(ROWS, items=[{"item": 1, "v": [1, 2]}, {"item": 2, "v": [1]}]),
         "items of rows: row 2 (item 2), field 'v': expected 2 numbers as in row 1, found 1"),
        (lambda: from_rows(ROWS, items=[{"item": 1, "v": ["x"]}]), "field 'v': expected lists of numbers"),
        (lambda: from_rows(ROWS, items=[{"item": 1, "v": [float("nan")]}]), "row 0 (item 1), column 0 is nan"),
        (lambda: from_rows(ROWS, items=[{"item": 1, "price": 3}]), "field 'price': expected a list of numbers"),
        (lambda: from_rows(ROWS, items=[{"item": 1, "v": [1]}]), "item 2 of rows is outside the features"),
        (lambda: from_tuples([(1, 2, 3), (1, 2)]), "tuples: tuple 2 has 2 entries, expected 3"),
        (lambda: from_tuples([(1,)]), "tuples: tuple 1 has 1 entries"),
        (lambda: from_tuples([]), "no tuples"),
        (lambda: from_tuples([(1, 2)], features={"v": ([2, 2], np.ones((2, 1)))}), "features['v']: item 2 is there twice"),
        (lambda: from_tuples([(1, 2)], features={"v": ([2], np.ones((2, 1)))}), "expected an array [1, d]"),
    ],
)  # fmt: skip
def test_refusals_in_memory_name_row_and_field(make, fragment):
    with pytest.raises(DataError) as caught:
        make()
    assert fragment in str(caught.value), str(caught.value)
