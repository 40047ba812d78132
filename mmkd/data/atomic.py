"""RecBole's atomic files: tab-separated, with typed headers (``user_id:token``).

- ``NAME.inter``: ``user_id:token``, ``item_id:token`` and optionally ``timestamp:float``; or, split already,
  ``NAME.train.inter``, ``NAME.valid.inter``, ``NAME.test.inter``. Every row is an interaction; other fields (ratings)
  are left out and named in the notes.
- ``NAME.item``, where there is one: ``item_id:token``; a ``float_seq`` field is a modality, the first ``token_seq`` (or
  ``title`` / ``name``) field is the text to show. Vectors may also be ``*_feat.npy`` / ``.npz`` files beside it, with ids.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import DataError
from .features import check_features, read_keyed, resolve_features
from .files import expect_kind
from .ids import first_duplicate
from .raw import ONE_FILE, RawData
from .table import ITEM_NAMES, TIME_NAMES, USER_NAMES, RawInteractions, Table, is_number

__all__ = ["find_inter", "read_atomic", "read_recbole", "tab_separated"]

TYPES = ("token", "token_seq", "float", "float_seq")
_PARTS = {"train": "train", "valid": "val", "val": "val", "test": "test"}


@dataclass(frozen=True)
class Atomic:
    """Columns of one atomic file and the type of each."""

    table: Table
    types: Mapping[str, str]


def find_inter(folder: Path) -> dict[str, Path]:
    """The ``.inter`` files of a folder by part; a single one is `ONE_FILE`.

    Raises:
        DataError: several that are not the parts of one data set.
    """
    files = sorted(folder.glob("*.inter"))
    if len(files) == 1 and Path(files[0].stem).suffix[1:] not in _PARTS:
        return {ONE_FILE: files[0]}
    parts = {_PARTS.get(Path(path.stem).suffix[1:], path.name): path for path in files}
    names = {Path(path.stem).stem for path in files}
    if files and (len(parts) != len(files) or len(names) > 1 or not set(parts) <= set(_PARTS.values())):
        raise DataError(
            f"{folder}: expected one NAME.inter, or NAME.train.inter, NAME.valid.inter and NAME.test.inter, found "
            f"{', '.join(path.name for path in files)}"
        )
    return parts


def tab_separated(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a tab-separated text file, quotes being ordinary characters.

    Raises:
        DataError: not text, no header, or a row with another number of fields than the header.
    """
    expect_kind(path, "text")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            header = [name.strip() for name in next(rows, [])]
            records = [row for row in rows if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as tab-separated UTF-8 text ({error})") from None
    for number, row in enumerate(records, 1):
        if len(row) != len(header):
            raise DataError(f"{path}: row {number} has {len(row)} fields, expected {len(header)} ({', '.join(header)})")
    return header, records


def read_atomic(path: Path) -> Atomic:
    """Read one atomic file.

    Raises:
        DataError: a header field without one of the four types, a field twice, or what `tab_separated` refuses.
    """
    header, records = tab_separated(path)
    types: dict[str, str] = {}
    for name in header:
        field, _, kind = name.rpartition(":")
        if not field or kind not in TYPES:
            raise DataError(
                f"{path}: header field {name!r}: expected NAME:TYPE with a type of {', '.join(TYPES)}, as RecBole writes it"
            )
        if field in types:
            raise DataError(f"{path}: field {field!r} is there twice; expected each name once")
        types[field] = kind
    columns = zip(*records, strict=True) if records else [()] * len(types)
    return Atomic(Table(path, {name: list(column) for name, column in zip(types, columns, strict=True)}), types)


def read_recbole(path: Path, features: Mapping[str, str | Path] | Sequence[str | Path] | None = None) -> RawData:
    """Read the atomic files of a folder (or of one ``.inter`` file), see the module.

    Raises:
        DataError: names the file, row or field, what was expected and what was found.
    """
    folder = path if path.is_dir() else path.parent
    files = find_inter(path) if path.is_dir() else {ONE_FILE: path}
    if ONE_FILE not in files and "train" not in files:
        found = ", ".join(one.name for one in files.values()) or "none"
        raise DataError(f"{path}: expected NAME.inter or NAME.train.inter, found {found}")
    notes: list[str] = []
    parts = {part: _interactions(file, notes) for part, file in files.items()}
    first = next(iter(files.values()))
    name = first.stem if ONE_FILE in files else Path(first.stem).stem
    paths = resolve_features(features, folder)
    keyed = {modality: read_keyed(file) for modality, file in paths.items()}
    names, item_file = None, folder / f"{name}.item"
    if item_file.is_file():
        vectors, names = _items(item_file, notes)
        both = set(vectors) & set(keyed)
        if both:
            raise DataError(f"modality {both.pop()!r} is in {item_file} and in a feature file beside it; keep one")
        if features is None:
            keyed |= vectors
            paths |= dict.fromkeys(vectors, item_file)
    described = " and ".join(file.name for file in files.values())
    return RawData(name, str(path), described, parts, keyed, paths, names, tuple(dict.fromkeys(notes)))


def _interactions(path: Path, notes: list[str]) -> RawInteractions:
    atomic = read_atomic(path)
    table = atomic.table
    chosen = {
        role: next((name for name in names if name in atomic.types), None)
        for role, names in (("user", USER_NAMES), ("item", ITEM_NAMES), ("timestamp", TIME_NAMES))
    }
    for role, names in (("user", USER_NAMES), ("item", ITEM_NAMES)):
        if chosen[role] is None:
            expected = " or ".join(f"{name}:token" for name in reversed(names))
            raise DataError(f"{path}: no {role} field: expected {expected}, found {', '.join(atomic.types)}")
    if not len(table.columns[chosen["user"]]):
        raise DataError(f"{path}: no rows after the header; expected at least one interaction")
    rest = [name for name in atomic.types if name not in chosen.values()]
    if rest:
        notes.append(f"fields of {path.name} left out: {', '.join(rest)}; every row is an interaction")
    times = None if chosen["timestamp"] is None else _times(atomic, chosen["timestamp"])
    return RawInteractions(table.ids(chosen["user"]), table.ids(chosen["item"]), times)


def _times(atomic: Atomic, name: str) -> np.ndarray:
    if atomic.types[name] == "float":
        for row, value in enumerate(atomic.table.columns[name], 1):
            if not is_number(value):
                raise DataError(f"{atomic.table.path}: row {row}, column {name!r}: expected a number, found {value!r}")
    return atomic.table.times(name)


def _items(
    path: Path, notes: list[str]
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], tuple[np.ndarray, np.ndarray] | None]:
    atomic = read_atomic(path)
    key = next((name for name in ITEM_NAMES if name in atomic.types), None)
    if key is None:
        raise DataError(f"{path}: no item field: expected item_id:token, found {', '.join(atomic.types)}")
    ids = atomic.table.ids(key)
    twice = first_duplicate(ids)
    if twice is not None:
        raise DataError(
            f"{path}: item {ids[twice[0]].item()!r} is there twice, in rows {twice[0] + 1} and {twice[1] + 1}"
        )
    vectors = {
        name.removesuffix("_feat"): (ids, _vectors(path, name, atomic.table.columns[name], ids))
        for name, kind in atomic.types.items()
        if kind == "float_seq"
    }
    text = next((name for name, kind in atomic.types.items() if kind == "token_seq" and name != key), None)
    named = next((name for name in ("title", "name", "item_name") if name in atomic.types), text)
    rest = [name for name, kind in atomic.types.items() if kind != "float_seq" and name not in (key, named)]
    if rest:
        notes.append(f"fields of {path.name} left out: {', '.join(rest)}")
    return vectors, None if named is None else (ids, np.asarray(atomic.table.columns[named], dtype=str))


def _vectors(path: Path, name: str, cells: list[str], ids: np.ndarray) -> np.ndarray:
    rows = [cell.split(" ") for cell in cells]
    width = len(rows[0]) if rows else 0
    for number, row in enumerate(rows, 1):
        if len(row) != width:
            raise DataError(
                f"{path}: row {number} (item {ids[number - 1].item()!r}), field {name!r}: expected {width} numbers as in "
                f"row 1, found {len(row)}"
            )
    try:
        array = np.asarray(rows, dtype=np.float32)
    except ValueError:
        for number, row in enumerate(rows, 1):
            for value in row:
                try:
                    float(value)
                except ValueError:
                    raise DataError(
                        f"{path}: row {number}, field {name!r}: expected numbers, found {value!r}"
                    ) from None
        raise
    return check_features(array, path, ids)
