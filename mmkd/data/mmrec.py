"""MMRec's format: one tab-separated ``NAME.inter`` that says which part a row is of, and ``*_feat.npy``.

``NAME.inter`` has the columns ``userID``, ``itemID`` and ``x_label`` (0 train, 1 validation, 2 test), in any order; others
(``rating``, ``timestamp``) are left out and named in the notes. An item is a row number of every ``NAME_feat.npy`` beside it.
``i_id_mapping.csv`` and ``u_id_mapping.csv`` (original id, number), where they are there, give the original ids back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .atomic import find_inter, tab_separated
from .errors import DataError
from .features import open_rows, resolve_features
from .files import expect_kind, open_npy
from .ids import first_duplicate, ids_from_text
from .raw import ONE_FILE, RawData
from .table import RawInteractions

__all__ = ["is_mmrec", "read_mmrec"]

USER, ITEM, LABEL = ("userID", "user_id", "user"), ("itemID", "item_id", "item"), "x_label"
_PARTS = ("train", "val", "test")


def is_mmrec(path: Path) -> bool:
    """Whether the header of a ``.inter`` file has an ``x_label``: RecBole's has typed names instead."""
    expect_kind(path, "text")
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return LABEL in file.readline(1 << 16).rstrip("\r\n").split("\t")


def read_mmrec(path: Path, features: Mapping[str, str | Path] | Sequence[str | Path] | None = None) -> RawData:
    """Read MMRec's files, see the module.

    Raises:
        DataError: names the file, row or id, what was expected and what was found.
    """
    folder = path if path.is_dir() else path.parent
    file = find_inter(path).get(ONE_FILE) if path.is_dir() else path
    if file is None:
        raise DataError(f"{path}: expected one NAME.inter, found none")
    header, records = tab_separated(file)
    columns = {name: at for at, name in enumerate(header)}
    user, item = (_column(file, header, names) for names in (USER, ITEM))
    if LABEL not in columns:
        raise DataError(f"{file}: expected a column {LABEL} (0 train, 1 validation, 2 test), found {', '.join(header)}")
    if not records:
        raise DataError(f"{file}: no rows after the header; expected at least one interaction")
    users, items = (_numbers(file, name, [row[columns[name]] for row in records]) for name in (user, item))
    labels = _numbers(file, LABEL, [row[columns[LABEL]] for row in records])
    bad = np.flatnonzero(labels > 2)
    if bad.size:
        raise DataError(f"{file}: row {bad[0] + 1}, column {LABEL}: expected 0, 1 or 2, found {labels[bad[0]]}")
    paths = resolve_features(features, folder, suffixes=(".npy",))
    used = int(items.argmax())
    count = _item_count(folder, paths, int(items.max()))
    arrays = {
        name: open_rows(
            where, count, "as the other item files have", (int(items[used]), f"{file.name}, row {used + 1}")
        )
        for name, where in paths.items()
    }
    user_ids, item_ids = (
        _mapping(folder / "u_id_mapping.csv", users, file),
        _mapping(folder / "i_id_mapping.csv", items, file),
    )
    numbered = np.arange(count) if item_ids is None else item_ids
    if len(numbered) != count:
        raise DataError(
            f"{folder / 'i_id_mapping.csv'}: expected {count} items as the features have, found {len(numbered)}"
        )
    rest = [name for name in header if name not in (user, item, LABEL)]
    notes = (f"fields of {file.name} left out: {', '.join(rest)}",) if rest else ()
    found = [part for part in range(3) if (labels == part).any()]
    parts = {
        _PARTS[part]: RawInteractions(
            _original(user_ids, users[labels == part]), _original(item_ids, items[labels == part]), None
        )
        for part in found
    }
    keyed = {name: (numbered, array) for name, array in arrays.items()}
    return RawData(file.stem, str(path), file.name, parts, keyed, paths, notes=notes)


def _original(ids: np.ndarray | None, numbers: np.ndarray) -> np.ndarray:
    return numbers if ids is None else ids[numbers]


def _column(file: Path, header: list[str], names: Sequence[str]) -> str:
    name = next((name for name in names if name in header), None)
    if name is None:
        raise DataError(f"{file}: expected a column {' or '.join(names)}, found {', '.join(header)}")
    return name


def _numbers(file: Path, name: str, cells: list[str]) -> np.ndarray:
    try:
        numbers = np.asarray(cells, dtype=str).astype(np.int64)
    except (ValueError, OverflowError):
        numbers = None
    if numbers is None or (numbers < 0).any():
        row, value = next((row, cell) for row, cell in enumerate(cells, 1) if not cell.isdecimal() or len(cell) > 18)
        raise DataError(f"{file}: row {row}, column {name}: expected a whole number >= 0, found {value!r}")
    return numbers


def _item_count(folder: Path, paths: Mapping[str, Path], largest: int) -> int:
    for path in paths.values():
        array = open_npy(path)
        return array.shape[0] if array.ndim else 0
    mapping = folder / "i_id_mapping.csv"
    return len(tab_separated(mapping)[1]) if mapping.is_file() else largest + 1


def _mapping(path: Path, numbers: np.ndarray, file: Path) -> np.ndarray | None:
    """Original ids by number, from a two-column table; None where there is none."""
    if not path.is_file():
        return None
    header, records = tab_separated(path)
    if len(header) != 2:
        raise DataError(f"{path}: expected two columns (original id, number), found {', '.join(header)}")
    at = _numbers(path, header[1], [row[1] for row in records])
    if sorted(at.tolist()) != list(range(len(at))):
        raise DataError(f"{path}: column {header[1]}: expected every number from 0 to {len(at) - 1} once")
    if int(numbers.max()) >= len(at):
        raise DataError(f"{path}: number {int(numbers.max())} of {file.name} has no id; expected {int(numbers.max()) + 1} rows, found {len(at)}")  # fmt: skip
    ids = ids_from_text([records[place][0] for place in np.argsort(at)], path)
    twice = first_duplicate(ids)
    if twice is not None:
        raise DataError(f"{path}: id {ids[twice[0]].item()!r} is there twice")
    return ids
