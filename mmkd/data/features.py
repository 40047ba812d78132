"""Item features on disk: found by name, checked whole, left where they are.

A modality ``NAME`` is a file ``NAME_feat.ENDING``:

- ``NAME_feat.npy``: ``[I, d]``; row = internal item id, or, where the items have ids of their own, the order
  of ``NAME_ids.txt`` / ``NAME_ids.npy`` or of ``item_ids.txt`` / ``item_ids.npy`` beside it. Memory-mapped,
  stored dtype kept.
- ``NAME_feat.npz``: arrays ``ids`` ``[n]`` and ``features`` ``[n, d]``.
- ``NAME_feat.csv`` / ``.tsv`` / ``.parquet``: an item id column (``item`` or ``item_id``), every other
  column one number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .dataset import row_chunks
from .errors import DataError
from .files import open_npy, open_npz, refuse_pickle
from .ids import as_ids, first_duplicate, locate, read_ids
from .table import ITEM_NAMES, TABLE_SUFFIXES, read_columns

__all__ = ["align_features", "check_features", "find_features", "modality_name", "open_rows", "read_keyed"]

_SUFFIXES = (".npy", ".npz", *TABLE_SUFFIXES)


def modality_name(path: Path) -> str:
    """``image_feat.npy`` -> ``image``; a name without ``_feat`` is kept."""
    return path.stem.removesuffix("_feat").removesuffix("_features")


def find_features(*folders: Path, suffixes: Sequence[str] = _SUFFIXES) -> dict[str, Path]:
    """Feature files ``*_feat.*`` of some folders, sorted by modality name.

    Raises:
        DataError: one modality in two files, or a pickle named like a feature file.
    """
    found: dict[str, Path] = {}
    for path in sorted(path for folder in folders for path in folder.glob("*_feat.*")):
        if path.suffix.lower() not in suffixes:
            refuse_pickle(path)
            if path.suffix.lower() in _SUFFIXES:
                raise DataError(f"{path}: beside this format features end in {', '.join(suffixes)}; convert it")
            continue
        name = modality_name(path)
        if name in found:
            raise DataError(f"modality {name!r} is in two files: {found[name]} and {path}; keep one of them")
        found[name] = path
    return dict(sorted(found.items()))


def resolve_features(
    features: Mapping[str, str | Path] | Sequence[str | Path] | None,
    *folders: Path,
    suffixes: Sequence[str] = _SUFFIXES,
) -> dict[str, Path]:
    """The feature files to use: those the caller names (a mapping, or paths), else those in the folders."""
    if features is None:
        return find_features(*folders, suffixes=suffixes)
    if not isinstance(features, Mapping):
        paths = [Path(path) for path in features]
        named: dict[str, Path] = {}
        for path in paths:
            if modality_name(path) in named:
                raise DataError(
                    f"modality {modality_name(path)!r} is in two files: {named[modality_name(path)]} and {path}"
                )
            named[modality_name(path)] = path
        features = named
    for path in map(Path, features.values()):
        if not path.is_file():
            raise DataError(f"{path}: no such feature file")
        refuse_pickle(path)
        if path.suffix.lower() not in suffixes:
            raise DataError(f"{path}: expected a feature file ending in {', '.join(suffixes)}, found {path.suffix!r}")
    return {name: Path(path) for name, path in features.items()}


def check_features(array: np.ndarray, path: Path, ids: np.ndarray | None = None) -> np.ndarray:
    """Refuse features that are not a finite numeric ``[n, d]``; return them as they are.

    Raises:
        DataError: wrong rank, no columns, not numbers, or NaN/Inf, with the first such row, column and item
            id.
    """
    if array.ndim != 2 or array.shape[1] == 0:
        raise DataError(f"{path}: features must have shape [items, d] with d >= 1, found {array.shape}")
    if array.dtype.kind not in "fiu":
        raise DataError(f"{path}: features must be floats or integers, found dtype {array.dtype}")
    if array.dtype.kind == "f":
        for start, rows in row_chunks(array):
            good = np.isfinite(rows)
            if not good.all():
                row, column = (int(index) for index in np.argwhere(~good)[0])
                item = "" if ids is None else f" (item {ids[start + row].item()!r})"
                raise DataError(
                    f"{path}: row {start + row}{item}, column {column} is {rows[row, column]}; every "
                    "feature must be "
                    "finite. Fill the value or leave the item out"
                )
    return array


def open_rows(path: Path, num_items: int, expected_by: str, used: tuple[int, str] | None = None) -> np.ndarray:
    """Memory-map ``NAME_feat.npy`` whose row is the internal item id, and check it.

    Args:
        num_items: rows expected.
        expected_by: where that number comes from, for the message.
        used: the largest item id in use and where it is used.

    Raises:
        DataError: an item id outside the features, a wrong row count, or what `check_features` refuses.
    """
    array = open_npy(path)
    rows = array.shape[0] if array.ndim else 0
    if used is not None and used[0] >= rows:
        raise DataError(
            f"{path}: item id {used[0]} ({used[1]}) is outside the features: expected more than {used[0]} "
            f"rows, found {rows}"
        )
    if rows != num_items:
        raise DataError(f"{path}: wrong row count: expected {num_items} ({expected_by}), found {rows}")
    return check_features(array, path)


def read_keyed(path: Path, item_column: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Read a feature file keyed by item id; returns ``ids [n]`` and ``features [n, d]``, checked.

    Raises:
        DataError: no ids, an id twice, a wrong row count, a cell that is no number, or what `check_features`
            refuses.
    """
    if path.suffix == ".npy":
        ids, array = _ids_beside(path), open_npy(path)
    elif path.suffix == ".npz":
        ids, array = _npz_pair(path)
    else:
        ids, array = _table_pair(path, item_column)
    if array.ndim != 2 or array.shape[0] != len(ids):
        raise DataError(f"{path}: wrong row count: expected {len(ids)} (one per item id), found shape {array.shape}")
    twice = first_duplicate(ids)
    if twice is not None:
        raise DataError(
            f"{path}: item {ids[twice[0]].item()!r} is there twice, in rows {twice[0] + 1} and {twice[1] + 1}"
        )
    return ids, check_features(array, path, ids)


def _ids_beside(path: Path) -> np.ndarray:
    stem = path.stem.removesuffix("_feat")
    candidates = [path.with_name(name + end) for name in (f"{stem}_ids", "item_ids") for end in (".txt", ".npy")]
    for candidate in candidates:
        if candidate.is_file():
            return read_ids(candidate)
    names = ", ".join(candidate.name for candidate in candidates)
    raise DataError(
        f"{path}: the items have ids, so the rows need them too: expected one of {names} beside it, found none"
    )


def _npz_pair(path: Path) -> tuple[np.ndarray, np.ndarray]:
    arrays = open_npz(path)
    if set(arrays) != {"ids", "features"}:
        raise DataError(f"{path}: expected the arrays 'ids' and 'features', found {sorted(arrays)}")
    if arrays["ids"].ndim != 1:
        raise DataError(f"{path}: 'ids' must be 1-D, found shape {arrays['ids'].shape}")
    return as_ids(arrays["ids"]), arrays["features"]


def _table_pair(path: Path, item_column: str | None) -> tuple[np.ndarray, np.ndarray]:
    table = read_columns(path)
    wanted = (item_column,) if item_column else ITEM_NAMES
    key = next((name for name in wanted if name in table.names), None)
    if key is None:
        raise DataError(
            f"{path}: expected an item id column named {' or '.join(wanted)}, found {', '.join(table.names)}"
        )
    columns = [table.numbers(name) for name in table.names if name != key]
    if not columns:
        raise DataError(f"{path}: expected feature columns beside {key!r}, found none")
    return table.ids(key), np.stack(columns, axis=1)


def align_features(
    keyed: Mapping[str, tuple[np.ndarray, np.ndarray]],
    item_ids: np.ndarray,
    paths: Mapping[str, Path],
    source: str,
) -> dict[str, np.ndarray]:
    """Put each modality's rows into the order of `item_ids`; an array already in that order is not copied.

    Raises:
        DataError: an item without features, by id and file.
    """
    aligned = {}
    for name, (ids, array) in keyed.items():
        rows = locate(ids, item_ids)
        missing = np.flatnonzero(rows < 0)
        if missing.size:
            raise DataError(
                f"{paths[name]}: item {item_ids[missing[0]].item()!r} of {source} is outside the features "
                f"({missing.size} of {len(item_ids)} items have no row; found ids for {len(ids)})"
            )
        in_order = len(ids) == len(item_ids) and bool((rows == np.arange(len(rows))).all())
        aligned[name] = array if in_order else np.asarray(array)[rows]
    return aligned
