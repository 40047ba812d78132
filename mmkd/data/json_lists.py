"""The format of PromptMM, MMSSL and LATTICE: ``train.json``, ``val.json``, ``test.json`` of ``{"user":
[items...]}``.

User ids are text. An item is a row number of ``image_feat.npy``, ``text_feat.npy``, ... (as a number or as
text), or an id of ``item_ids.txt`` where there is one. The feature files lie in the same folder, or in its
parent for ``5-core/train.json``.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .assemble import assemble
from .dataset import Dataset
from .errors import DataError
from .features import open_rows, resolve_features
from .files import expect_kind, open_npy
from .ids import locate, read_ids, text_array
from .npz import check_extent, find_parts

__all__ = ["find_json_folder", "load_json", "read_lists"]


def find_json_folder(folder: Path) -> Path | None:
    """The folder that holds ``train.json``: this one, or its only ``*-core`` folder."""
    if (folder / "train.json").is_file():
        return folder
    cores = [path for path in sorted(folder.glob("*-core")) if (path / "train.json").is_file()]
    if len(cores) > 1:
        raise DataError(
            f"{folder}: expected one core, found {', '.join(path.name for path in cores)}; name one of them"
        )
    return cores[0] if cores else None


def read_lists(path: Path) -> tuple[list[str], list[str]]:
    """Read ``{"user": [items...]}`` to two lists of text, one entry per pair.

    Raises:
        DataError: not JSON, not that shape, or an item that is neither a whole number nor text.
    """
    expect_kind(path, "text")
    try:
        with open(path, encoding="utf-8-sig") as file:
            lists = json.load(file, object_pairs_hook=list)  # a list keeps a user that is there twice
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number of 5,000 digits, 100,000 brackets
        raise DataError(f"{path}: not what its name says: expected JSON ({error})") from None
    if not isinstance(lists, list) or not all(isinstance(entry, tuple) for entry in lists):
        raise DataError(f'{path}: expected an object {{"user": [items...]}}, found {type(lists).__name__}')
    users: list[str] = []
    items: list[str] = []
    for user, row in lists:
        if not isinstance(row, list):
            raise DataError(f"{path}: user {user!r}: expected a list of items, found {reprlib.repr(row)}")
        for item in row:
            if isinstance(item, bool) or not isinstance(item, (int, str)) or item == "":
                raise DataError(
                    f"{path}: user {user!r}: expected an item id (a whole number or text), found {reprlib.repr(item)}"
                )
            items.append(str(item))
        users.extend([user] * len(row))
    return users, items


def load_json(
    folder: Path,
    *,
    features: Mapping[str, str | Path] | Sequence[str | Path] | None = None,
    name: str | None = None,
) -> Dataset:
    """Load format (b), see the module. Features are memory-mapped and keep their dtype.

    Users are ordered by number where all ids are numbers, else by text; `user_ids` and `item_ids` are text.

    Raises:
        DataError: names the file, user or item, what was expected and what was found.
    """
    inner = find_json_folder(folder)
    if inner is None:
        raise DataError(f"{folder}: expected train.json, found none")
    paths = find_parts(inner, (".json",))
    raw = {part: read_lists(path) for part, path in paths.items()}
    folders = [inner, *([inner.parent] if inner.name.endswith("-core") else [])]
    feature_paths = resolve_features(features, *folders, suffixes=(".npy",))
    item_ids, positions = _items(raw, paths, folders, feature_paths)
    user_ids = _sorted_ids(np.unique(text_array([user for users, _ in raw.values() for user in users], inner)))
    parts = {part: (locate(user_ids, text_array(users, inner)), positions[part]) for part, (users, _) in raw.items()}
    arrays = {
        modality: open_rows(path, len(item_ids), "as the other item files have", _largest(positions, paths))
        for modality, path in feature_paths.items()
    }
    label = name or (inner.resolve().parent.name if inner.name.endswith("-core") else inner.resolve().name)
    return assemble(label, parts, user_ids, item_ids, arrays, source=str(inner), notes=("split: given",))


def _sorted_ids(ids: np.ndarray) -> np.ndarray:
    if all(text.isascii() and text.isdecimal() for text in ids.tolist()):
        # by value, without int(): Python refuses numbers of more than 4,300 digits
        digits = [(text.lstrip("0"), text) for text in ids.tolist()]
        return np.asarray([text for _, text in sorted(digits, key=lambda d: (len(d[0]), *d))], dtype=str)
    return ids


def _items(
    raw: Mapping[str, tuple[list[str], list[str]]],
    paths: Mapping[str, Path],
    folders: Sequence[Path],
    feature_paths: Mapping[str, Path],
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Item ids as text, and each part's internal item ids."""
    for path in (folder / name for folder in folders for name in ("item_ids.txt", "item_ids.npy")):
        if path.is_file():
            ids = read_ids(path).astype(str)
            return ids, {part: _known(ids, raw[part], paths[part], path) for part in raw}
    positions = {part: _as_rows(raw[part], paths[part]) for part in raw}
    largest = _largest(positions, paths)
    count = 0 if largest is None else largest[0] + 1
    for path in feature_paths.values():
        array = open_npy(path)
        count = array.shape[0] if array.ndim else 0
        break
    if largest is not None and largest[0] >= count:
        raise DataError(
            f"{path}: item id {largest[0]} ({largest[1]}) is outside the features: expected more than "
            f"{largest[0]} rows, "
            f"found {count}"
        )
    check_extent(next(iter(paths.values())), (count,), sum(len(rows) for rows in positions.values()))
    return np.arange(count).astype(str), positions


def _known(ids: np.ndarray, pairs: tuple[list[str], list[str]], path: Path, ids_path: Path) -> np.ndarray:
    users, items = pairs
    positions = locate(ids, text_array(items, path))
    missing = np.flatnonzero(positions < 0)
    if missing.size:
        first = missing[0]
        raise DataError(
            f"{path}: user {users[first]!r}: item {items[first]!r} is not one of the {len(ids)} ids of {ids_path}"
        )
    return positions


def _as_rows(pairs: tuple[list[str], list[str]], path: Path) -> np.ndarray:
    users, items = pairs
    try:
        rows = text_array(items, path).astype(np.int64) if items else np.empty(0, np.int64)
    except (ValueError, OverflowError):
        wrong = (pair for pair in zip(users, items, strict=True) if not pair[1].isdecimal() or len(pair[1]) > 18)
        user, item = next(wrong, (users[0], items[0]))
        raise DataError(
            f"{path}: user {user!r}: item {reprlib.repr(item)} is no row number of the feature files; expected 0, 1, 2, "
            "... or an "
            "item_ids.txt with one id a line in the order of the rows"
        ) from None
    if len(rows) and rows.min() < 0:
        first = int(rows.argmin())
        raise DataError(f"{path}: user {users[first]!r}: item id {rows[first]} is negative; expected a row number >= 0")
    return rows


def _largest(positions: Mapping[str, np.ndarray], paths: Mapping[str, Path]) -> tuple[int, str] | None:
    candidates = [(int(rows.max()), paths[part].name) for part, rows in positions.items() if len(rows)]
    return max(candidates, key=lambda pair: pair[0]) if candidates else None
