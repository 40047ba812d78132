"""Original ids: integers where they all are, text otherwise; the position in the array is the internal id."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .errors import DataError
from .files import SMALL, expect_kind, open_npy

__all__ = [
    "as_ids",
    "distinct",
    "first_duplicate",
    "ids_from_text",
    "locate",
    "read_ids",
    "read_lines",
    "text_array",
    "unify",
]


def text_array(values: Sequence[str], where: object = "ids") -> np.ndarray:
    """Text as a NumPy array, in which every entry takes the room of the longest.

    Raises:
        DataError: one entry is so long that it would blow up all the others, or is no valid Unicode text.
    """
    lengths = [len(value) for value in values]
    longest, total = max(lengths, default=0), sum(lengths)
    if 4 * longest * len(values) > max(4 * SMALL, 64 * total):
        row = lengths.index(longest)
        raise DataError(
            f"{where}: row {row + 1} has {longest:,} characters, the average {total / len(values):.0f}; expected ids of "
            "similar length"
        )
    for row, value in enumerate(values, 1):
        if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
            raise DataError(f"{where}: row {row} is not valid Unicode text: {value!r}")
    return np.asarray(values, dtype=str)


def ids_from_text(values: Sequence[str], where: object = "ids") -> np.ndarray:
    """Text to ids: int64 if every value is a plain integer (``"7"``, not ``"007"``), else the text itself.

    One leading zero anywhere keeps the whole column as text, so no two different ids ever become the same.
    """
    text = text_array(values, where)
    if text.size == 0:
        return text
    try:
        numbers = text.astype(np.int64)
    except (ValueError, OverflowError):
        return text
    return numbers if bool((numbers.astype(str) == text).all()) else text


def as_ids(values: np.ndarray, where: object = "ids") -> np.ndarray:
    """Typed ids (a Parquet column, a .npy array) as int64 or text."""
    values = np.asarray(values)
    if values.dtype.kind == "i" or (values.dtype.kind == "u" and values.dtype.itemsize < 8):
        return values.astype(np.int64)
    if values.dtype.kind == "U":
        return values
    if values.dtype.kind == "f" and (values == np.floor(values)).all() and (np.abs(values) < 2**53).all():
        return values.astype(np.int64)
    try:
        texts = [value.decode() if isinstance(value, bytes) else str(value) for value in values.tolist()]
    except (UnicodeDecodeError, OverflowError, ValueError) as error:
        raise DataError(f"{where}: expected ids that are numbers or UTF-8 text ({error})") from None
    return text_array(texts, where)


def unify(*arrays: np.ndarray) -> list[np.ndarray]:
    """Give id arrays one common type: int64 if all are, else text."""
    if all(array.dtype.kind == "i" for array in arrays if array.size):
        return [array.astype(np.int64) if array.size else np.empty(0, np.int64) for array in arrays]
    return [array.astype(str) for array in arrays]


def distinct(ids: np.ndarray) -> np.ndarray:
    """The different ids, sorted."""
    return np.asarray(sorted(set(ids.tolist())), dtype=ids.dtype) if ids.dtype.kind == "U" else np.unique(ids)


def first_duplicate(ids: np.ndarray) -> tuple[int, int] | None:
    """Positions of the first id that is there twice (as ``(earlier, later)``), or None."""
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    repeated = np.flatnonzero(first[inverse] != np.arange(len(ids)))
    return (int(first[inverse[repeated[0]]]), int(repeated[0])) if repeated.size else None


def locate(universe: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Position of each id in `universe` (unique ids in any order); -1 where it is not there. int64."""
    universe, ids = unify(np.asarray(universe), np.asarray(ids))
    if universe.size == 0:
        return np.full(len(ids), -1, np.int64)
    if universe.dtype.kind == "U":  # hashing text is several times faster than sorting it
        position_of = {value: position for position, value in enumerate(universe.tolist())}
        return np.fromiter((position_of.get(value, -1) for value in ids.tolist()), np.int64, len(ids))
    order = np.argsort(universe, kind="stable")
    where = np.searchsorted(universe, ids, sorter=order)
    position = order[np.minimum(where, len(universe) - 1)].astype(np.int64)
    return np.where(universe[position] == ids, position, -1)


def read_lines(path: Path) -> list[str]:
    """Ids as text, one a line.

    Raises:
        DataError: an empty line, or a file that is no UTF-8 text.
    """
    expect_kind(path, "text")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text with one id a line ({error})") from None
    empty = next((number for number, line in enumerate(lines, 1) if not line.strip()), None)
    if empty is not None:
        raise DataError(f"{path}: line {empty} is empty; expected one id a line")
    return lines


def read_ids(path: Path) -> np.ndarray:
    """Ids from ``.txt`` (one a line) or ``.npy``.

    Raises:
        DataError: an empty line, an id that is there twice, a wrong shape, a file that is not what its name
            says.
    """
    if path.suffix == ".npy":
        array = open_npy(path, mmap=False)
        if array.ndim != 1:
            raise DataError(f"{path}: ids must be a 1-D array, found shape {array.shape}")
        ids = as_ids(array, path)
    else:
        ids = ids_from_text(read_lines(path), path)
    twice = first_duplicate(ids)
    if twice is not None:
        raise DataError(
            f"{path}: id {ids[twice[0]].item()!r} is there twice, in rows {twice[0] + 1} and {twice[1] + 1}"
        )
    return ids
