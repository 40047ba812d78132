"""CSV, TSV and Parquet with a header, and interactions kept in them.

Rows are counted from 1 after the header. Ids may be of any type. A path is one of

- a file of interactions: columns ``user``, ``item`` and optionally ``timestamp`` (also ``user_id``,
  ``item_id``, ``time``);
- a folder with ``interactions.csv`` (or ``.tsv``, ``.parquet``), or with ``train``, ``val`` and ``test``
  files;

with feature files ``NAME_feat.*`` beside it (see `mmkd.data.features`).
"""

from __future__ import annotations

import csv
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from .errors import DataError
from .files import MOST_EXPANSION, SMALL, expect_kind
from .ids import as_ids, ids_from_text, text_array
from .parquet import check_parquet

__all__ = [
    "ITEM_NAMES",
    "TABLE_SUFFIXES",
    "RawInteractions",
    "Table",
    "interactions_of",
    "read_columns",
    "read_interactions",
]

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")
USER_NAMES = ("user", "user_id")
ITEM_NAMES = ("item", "item_id")
TIME_NAMES = ("timestamp", "time")
_ROLES = {"user": USER_NAMES, "item": ITEM_NAMES, "timestamp": TIME_NAMES}


@dataclass(frozen=True)
class Table:
    """Named columns of one file; text lists from CSV, arrays from Parquet."""

    path: Path
    columns: Mapping[str, list[str] | np.ndarray]

    @property
    def names(self) -> list[str]:
        """Column names in file order."""
        return list(self.columns)

    def ids(self, name: str) -> np.ndarray:
        """A column as ids; a missing one is refused with its row."""
        values = self.columns[name]
        if isinstance(values, list):
            if "" in values:
                raise DataError(
                    f"{self.path}: row {values.index('') + 1} has no {name!r}; expected an id, found nothing"
                )
            return ids_from_text(values, self.path)
        self._refuse_missing(name, values)
        return as_ids(values, self.path)

    def numbers(self, name: str) -> np.ndarray:
        """A column of numbers (float32; a Parquet column keeps its dtype)."""
        values = self.columns[name]
        if isinstance(values, np.ndarray):
            if values.dtype.kind not in "fiu":
                raise DataError(f"{self.path}: column {name!r} must hold numbers, found {values.dtype}")
            return values
        try:
            return np.asarray(values, dtype=np.float32)
        except ValueError:
            row, value = next((row, value) for row, value in enumerate(values, 1) if not is_number(value))
            raise DataError(f"{self.path}: row {row}, column {name!r}: expected a number, found {value!r}") from None

    def times(self, name: str) -> np.ndarray:
        """A column of times: numbers as they are (float64 or int64), ISO 8601 text as int64 microseconds
        (UTC)."""
        values = self.columns[name]
        if isinstance(values, list):
            return _times_from_text(values, self.path, name)
        self._refuse_missing(name, values)
        if values.dtype.kind == "M":
            return values.astype("datetime64[us]").astype(np.int64)
        if values.dtype.kind in "iuf":
            return values.astype(np.float64 if values.dtype.kind == "f" else np.int64)
        return _times_from_text([str(value) for value in values.tolist()], self.path, name)

    def _refuse_missing(self, name: str, values: np.ndarray) -> None:
        if values.dtype.kind == "f":
            missing = ~np.isfinite(values)
        elif values.dtype.kind == "M":
            missing = np.isnat(values)
        elif values.dtype.kind == "O":
            missing = np.fromiter((value is None or value == "" for value in values), bool, len(values))
        else:
            return
        if missing.any():
            row = int(np.flatnonzero(missing)[0]) + 1
            raise DataError(f"{self.path}: row {row} has no {name!r}; expected a value, found nothing")


def is_number(text: str) -> bool:
    """Whether `float` reads it."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _times_from_text(values: Sequence[str], path: Path, name: str) -> np.ndarray:
    for kind in (np.int64, np.float64):
        try:
            times = text_array(values, path).astype(kind)
        except (ValueError, OverflowError):
            continue
        if not np.isfinite(times).all():
            row = int(np.flatnonzero(~np.isfinite(times))[0]) + 1
            raise DataError(f"{path}: row {row}, column {name!r}: expected a finite time, found {values[row - 1]!r}")
        return times
    return np.fromiter(
        (_microseconds(value, path, row, name) for row, value in enumerate(values, 1)), np.int64, len(values)
    )


def _microseconds(value: str, path: Path, row: int, name: str) -> int:
    try:
        moment = datetime.fromisoformat(value[:-1] + "+00:00" if value.endswith("Z") else value)
    except ValueError:
        raise DataError(
            f"{path}: row {row}, column {name!r}: expected a number or an ISO 8601 time in every row, found {value!r}"
        ) from None
    moment = moment.replace(tzinfo=timezone.utc) if moment.tzinfo is None else moment
    delta = moment - datetime(1970, 1, 1, tzinfo=timezone.utc)
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds


def read_columns(path: Path) -> Table:
    """Read a CSV, TSV or Parquet file with a header.

    Raises:
        DataError: not what its name says, no rows, a row with the wrong number of fields, a column name
            twice.
        ImportError: Parquet without pyarrow; names what to install.
    """
    return _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_text(path)


def _read_text(path: Path) -> Table:
    expect_kind(path, "text")
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, delimiter=delimiter, skipinitialspace=True, strict=True)
            header = [name.strip() for name in next(rows, [])]
            records = [row for row in rows if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text with {delimiter!r} between fields ({error})") from None
    _check_header(path, header)
    for number, row in enumerate(records, 1):
        if len(row) != len(header):
            raise DataError(f"{path}: row {number} has {len(row)} fields, expected {len(header)} ({', '.join(header)})")
    columns = zip(*records, strict=True) if records else [()] * len(header)
    return Table(path, {name: list(column) for name, column in zip(header, columns, strict=True)})


def _check_header(path: Path, header: list[str]) -> None:
    seen: set[str] = set()
    twice = next((name for name in header if name in seen or seen.add(name)), None)
    if twice is not None:
        raise DataError(f"{path}: column {twice!r} is there twice; expected each name once")


def _read_parquet(path: Path) -> Table:
    check_parquet(path)
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        text = [field.name for field in pq.read_schema(path) if _is_text(pa, field.type)]
        # text that repeats is kept once: otherwise a small file can unpack to any size
        table = pq.read_table(path, read_dictionary=text)
        _check_header(path, table.column_names)
        columns = {
            name: _to_numpy(pa, column, max(SMALL, MOST_EXPANSION * path.stat().st_size))
            for name, column in zip(table.column_names, table.columns, strict=True)
        }
    except DataError:
        raise
    except Exception as error:  # whatever Arrow says of a broken file
        raise DataError(f"{path}: cannot be read as Parquet ({type(error).__name__}: {error})") from error
    return Table(path, columns)


def _is_text(pa, kind) -> bool:
    types = pa.types
    return types.is_string(kind) or types.is_binary(kind) or types.is_large_string(kind) or types.is_large_binary(kind)


def _to_numpy(pa, column, most: int) -> np.ndarray:
    """A column as an array; text as objects, one for all its repetitions, of at most `most` characters in all."""
    if not pa.types.is_dictionary(column.type):
        return column.to_numpy()
    whole = column.unify_dictionaries().combine_chunks()
    if isinstance(whole, pa.ChunkedArray):  # none, or more than one after all
        return whole.to_numpy()
    values = np.empty(len(whole.dictionary) + 1, object)
    values[:-1] = whole.dictionary.to_pylist()  # and None at -1
    rows = whole.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    lengths = np.asarray([0 if value is None else len(value) for value in values.tolist()])
    if (total := int(lengths[rows].sum())) > most:
        raise ValueError(f"its text unpacks to {total:,} characters; expected at most {most:,} in a file of this size")
    return values[rows]


@dataclass(frozen=True)
class RawInteractions:
    """Rows of one interaction file, as they are: ids not yet mapped, duplicates not yet merged."""

    users: np.ndarray
    items: np.ndarray
    times: np.ndarray | None


def read_interactions(
    path: Path, columns: Mapping[str, str] | None = None, ignore: Sequence[str] = ()
) -> RawInteractions:
    """Read (user, item[, timestamp]) rows.

    Args:
        columns: role -> column name, where a file names its columns otherwise: ``{"user": "household_id"}``.
        ignore: columns to leave out.

    Raises:
        DataError: a column missing or unknown, an empty id, a time that is none, or what `read_columns`
            refuses.
    """
    return interactions_of(read_columns(path), columns, ignore)


def interactions_of(
    table: Table, columns: Mapping[str, str] | None = None, ignore: Sequence[str] = ()
) -> RawInteractions:
    """The (user, item[, timestamp]) rows of a table; arguments and errors as `read_interactions`."""
    path = table.path
    chosen = _choose_columns(table, dict(columns or {}), ignore)
    if not len(table.columns[chosen["user"]]):
        raise DataError(f"{path}: no rows after the header; expected at least one interaction")
    times = table.times(chosen["timestamp"]) if "timestamp" in chosen else None
    return RawInteractions(table.ids(chosen["user"]), table.ids(chosen["item"]), times)


def _choose_columns(table: Table, columns: dict[str, str], ignore: Sequence[str]) -> dict[str, str]:
    unknown_role = next((role for role in columns if role not in _ROLES), None)
    if unknown_role is not None:
        raise DataError(f"columns: unknown role {unknown_role!r}; expected {', '.join(_ROLES)}")
    chosen: dict[str, str] = {}
    for role, names in _ROLES.items():
        wanted = (columns[role],) if role in columns else names
        name = next((name for name in wanted if name in table.names), None)
        if name is not None:
            chosen[role] = name
        elif role != "timestamp" or role in columns:
            raise DataError(
                f"{table.path}: no {role} column: expected {' or '.join(wanted)}, found "
                f"{', '.join(table.names)}. "
                f"Rename it, or pass columns={{'{role}': NAME}}; a file without a header needs one"
            )
    for name in table.names:
        if name not in chosen.values() and name not in ignore:
            known = [known for names in _ROLES.values() for known in names]
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(
                f"{table.path}: unknown column {name!r}: expected user, item[, timestamp], found "
                f"{', '.join(table.names)}"
                f"{hint} Pass ignore=[{name!r}] to leave it out"
            )
    return chosen
