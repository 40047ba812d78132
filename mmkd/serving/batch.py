"""Recommendations for a file of users: read, ranked and written block by block, so any number of users fits."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmkd.data import DataError
from mmkd.data.files import expect_kind
from mmkd.data.ids import ids_from_text, read_lines
from mmkd.data.parquet import check_parquet
from mmkd.data.table import ITEM_NAMES, USER_NAMES, read_columns
from mmkd.files import write_atomic
from mmkd.serving.explain import Explainer
from mmkd.serving.recommend import Recommender

SUFFIXES = (".parquet", ".csv", ".tsv")
BLOCK = 8192  # users ranked at once


@dataclass(frozen=True)
class Written:
    """What a file job did: users ranked, rows written, unknown users left out."""

    users: int
    rows: int
    skipped: int


def recommend_file(
    student: Recommender,
    users: str | Path,
    out: str | Path,
    *,
    k: int = 10,
    exclude_seen: bool = True,
    column: str | None = None,
    skip_unknown: bool = False,
    explainer: Explainer | None = None,
    reasons: int = 3,
) -> Written:
    """The `k` best items of every user of a file, written as rows `user, rank, item, score[, name]`, best first.

    Args:
        users: Parquet, CSV or TSV with a header and a column `user` or `user_id` of original ids; other columns are ignored.
        out: Parquet, CSV or TSV by its ending; replaced only once it is whole. Types of the ids are those of the run.
        k: at least 1; a user has fewer rows where fewer items are left.
        column: the user column, where it has another name.
        skip_unknown: leave out users the run does not know, instead of refusing the file.
        explainer: adds columns `because_n` (item id) and `because_n_score` for n = 1 .. `reasons`.

    Raises:
        DataError: the file is not what its name says, has no user column, an empty id, or an unknown user (file and row).
        ImportError: pyarrow is not installed.
    """
    _pyarrow()
    source, target = Path(users), Path(out)
    for name, path in (("users", source), ("out", target)):
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(f"{name}: expected a file ending in {', '.join(SUFFIXES)}, got {str(path)!r}")
    if k < 1:
        raise ValueError(f"k: expected >= 1, got {k}")
    if not target.parent.is_dir():
        raise DataError(f"out: folder {str(target.parent)!r} does not exist; make it first")
    job = _Job(student, k, exclude_seen, explainer, reasons)
    counts = [0, 0, 0]

    def write(temporary: Path) -> None:
        with _Writer(temporary, job.schema()) as writer, ThreadPoolExecutor(1) as beside:
            pending: Future | None = None
            for rows, skipped in _known(student, source, column, skip_unknown):
                scores, items = student.topk(rows, k, exclude_seen)
                if pending is not None:
                    counts[1] += pending.result()
                # written while the next block is ranked
                pending = beside.submit(lambda *block: writer.write(job.table(*block)), rows, scores, items)
                counts[0] += len(rows)
                counts[2] += skipped
            if pending is not None:
                counts[1] += pending.result()

    write_atomic(target, write)
    return Written(*counts)


def read_item_list(path: str | Path) -> np.ndarray:
    """Original item ids: a `.txt` with one a line, or the column `item` / `item_id` of a CSV, TSV or Parquet file.

    Raises:
        DataError: not what its name says, no such column, or an empty id.
    """
    path = Path(path)
    if path.suffix.lower() in SUFFIXES:
        table = read_columns(path)
        name = next((name for name in ITEM_NAMES if name in table.names), None)
        if name is None:
            raise DataError(f"{path}: no item column: expected item or item_id, found {', '.join(table.names)}")
        return table.ids(name)
    return ids_from_text([line.strip() for line in read_lines(path)], path)


def _pyarrow():
    try:
        import pyarrow
        import pyarrow.csv
        import pyarrow.parquet

        return pyarrow
    except ImportError as error:
        raise ImportError("recommending for a file of users needs pyarrow: pip install 'mmkd[serve]'") from error


class _Job:
    """From ranked rows to a table of the output file."""

    def __init__(self, student: Recommender, k: int, exclude_seen: bool, explainer: Explainer | None, reasons: int):
        self.k, self.explainer, self.count = k, explainer, reasons if explainer else 0
        arrow = _pyarrow()
        columns = {"user": student.user_ids, "item": student.item_ids}
        if student.item_names is not None:
            columns["name"] = student.item_names
        self.arrays = {name: arrow.array(values) for name, values in columns.items()}

    def schema(self):
        arrow = _pyarrow()
        fields = [("user", self.arrays["user"].type), ("rank", arrow.int32()), ("item", self.arrays["item"].type)]
        fields.append(("score", arrow.float32()))
        if "name" in self.arrays:
            fields.append(("name", self.arrays["name"].type))
        for n in range(1, self.count + 1):
            fields += [(f"because_{n}", self.arrays["item"].type), (f"because_{n}_score", arrow.float32())]
        return arrow.schema(fields)

    def table(self, rows: np.ndarray, scores: np.ndarray, items: np.ndarray):
        arrow = _pyarrow()
        there = (items >= 0).ravel()
        width = items.shape[1]
        item = items.ravel()[there]
        columns = [
            self.arrays["user"].take(arrow.array(np.repeat(rows, width)[there])),
            arrow.array(np.tile(np.arange(1, width + 1, dtype=np.int32), len(rows))[there]),
            self.arrays["item"].take(arrow.array(item)),
            arrow.array(scores.ravel()[there]),
        ]
        if "name" in self.arrays:
            columns.append(self.arrays["name"].take(arrow.array(item)))
        columns += self._because(rows, items, there)
        return arrow.Table.from_arrays(columns, schema=self.schema())

    def _because(self, rows: np.ndarray, items: np.ndarray, there: np.ndarray) -> list:
        if self.explainer is None:
            return []
        arrow = _pyarrow()
        item = np.full((*items.shape, self.count), -1, np.int64)
        score = np.full(item.shape, np.nan, np.float32)
        for at, (user, row) in enumerate(zip(rows.tolist(), items, strict=True)):
            near, parts, _ = self.explainer.contributions(user, row[row >= 0])
            best = np.argsort(-parts, axis=1, kind="stable")[:, : self.count]
            item[at, : len(best), : best.shape[1]] = near[best]
            score[at, : len(best), : best.shape[1]] = np.take_along_axis(parts, best, axis=1)
        columns = []
        for n in range(self.count):
            which, value = item[..., n].ravel()[there], score[..., n].ravel()[there]
            absent = which < 0
            columns.append(self.arrays["item"].take(arrow.array(which, mask=absent)))
            columns.append(arrow.array(value, mask=absent))
        return columns


class _Writer:
    def __init__(self, path: Path, schema) -> None:
        arrow = _pyarrow()
        if path.suffix.lower() == ".parquet":
            self._file = arrow.parquet.ParquetWriter(path, schema)
        else:
            options = arrow.csv.WriteOptions(delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            self._file = arrow.csv.CSVWriter(path, schema, write_options=options)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error) -> None:
        self._file.close()

    def write(self, table) -> int:
        self._file.write_table(table)
        return table.num_rows


def _known(
    student: Recommender, path: Path, column: str | None, skip_unknown: bool
) -> Iterator[tuple[np.ndarray, int]]:
    """Rows of the users of a file, a block at a time, and how many of the block were left out."""
    first = 1
    for ids in _blocks(path, column):
        rows = student.find(ids)
        unknown = rows < 0
        if unknown.any() and not skip_unknown:
            at = int(np.argmax(unknown))
            raise DataError(
                f"{path}: row {first + at}: user {student.unknown(ids[at])}. Leave it out, or pass skip_unknown (--skip-unknown)"
            )
        yield rows[~unknown], int(unknown.sum())
        first += len(ids)


def _blocks(path: Path, column: str | None) -> Iterator[list]:
    """Original user ids of a file, at most `BLOCK` at a time."""
    first = 1
    try:
        for batch in _batches(path, column):
            for start in range(0, len(batch), BLOCK):
                ids = _values(batch[start : start + BLOCK])
                bad = next((at for at, value in enumerate(ids) if value is None or value == ""), None)
                if bad is not None:
                    raise DataError(f"{path}: row {first + bad} has no user; expected an id, found nothing")
                first += len(ids)
                yield ids
    except DataError:
        raise
    except Exception as error:  # whatever Arrow says of a broken file
        raise DataError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error


def _values(block) -> list:
    """A block of a column as Python values; text that repeats is one object."""
    if not hasattr(block, "dictionary"):
        return block.to_pylist()
    known, where = np.unique(block.indices.fill_null(-1).to_numpy(zero_copy_only=False), return_inverse=True)
    texts = block.dictionary.take(_pyarrow().array(known, mask=known < 0)).to_pylist()
    return [texts[at] for at in where.tolist()]


def _batches(path: Path, column: str | None) -> Iterator:
    arrow = _pyarrow()
    if path.suffix.lower() == ".parquet":
        check_parquet(path)
        name = _user_column(path, arrow.parquet.read_schema(path).names, column)
        with arrow.parquet.ParquetFile(path, read_dictionary=[name]) as file:
            for batch in file.iter_batches(batch_size=BLOCK, columns=[name]):
                yield batch.column(0)
        return
    expect_kind(path, "text")
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with open(path, encoding="utf-8-sig") as file:
        header = [name.strip().strip('"') for name in file.readline().rstrip("\r\n").split(delimiter)]
    name = _user_column(path, header, column)
    # ids are text as they stand: a number would lose its leading zeros
    convert = arrow.csv.ConvertOptions(column_types={name: arrow.string()}, include_columns=[name])
    parse = arrow.csv.ParseOptions(delimiter=delimiter)
    read = arrow.csv.ReadOptions(column_names=header, skip_rows=1)
    with arrow.csv.open_csv(path, read_options=read, parse_options=parse, convert_options=convert) as reader:
        for batch in reader:
            yield batch.column(0)


def _user_column(path: Path, names: list[str], column: str | None) -> str:
    wanted = (column,) if column else USER_NAMES
    name = next((name for name in wanted if name in names), None)
    if name is None:
        raise DataError(f"{path}: no user column: expected {' or '.join(wanted)}, found {', '.join(names)}")
    return name
