"""Interactions that are already in memory: rows of dictionaries (Hugging Face `datasets`), and Cornac's tuples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .dataset import Dataset
from .errors import DataError
from .features import check_features
from .ids import as_ids, first_duplicate
from .loading import build, make_plan
from .npz import PART_NAMES
from .raw import ONE_FILE, RawData
from .table import ITEM_NAMES, Table, interactions_of

__all__ = ["from_rows", "from_tuples"]


def from_rows(
    rows: Any,
    *,
    items: Any = None,
    columns: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    name: str = "rows",
    **split: Any,
) -> Dataset:
    """A `Dataset` from rows that are dictionaries; a Hugging Face `Dataset` or `DatasetDict` is taken as it is.

    Args:
        rows: iterable of mappings with `user`, `item` and optionally `timestamp`, or a mapping of part ("train",
            "validation", "test") to such iterables. Anything with `column_names` is read column by column.
        items: iterable of mappings with an item id; a field that holds a list of numbers is a modality (`image_feat` or
            `image`), a field `name` or `title` is the text to show, others have to be named in `ignore`.
        columns: role ("user", "item", "timestamp") -> field, where a field has another name.
        ignore: fields of `rows` and `items` to leave out.
        **split: `split`, `seed`, `val_fraction`, `test_fraction`, `min_count`, `core` as in `mmkd.data.load`.

    Raises:
        DataError: a row without a field, an empty id, vectors of different width or not finite; names row or item.
    """
    columns = dict(columns or {})
    item_field = {"item": columns["item"]} if "item" in columns else {}
    parts = {}
    for part, group in _parts(rows).items():
        where = Path(name if part == ONE_FILE else f"{name}[{part!r}]")
        parts[part] = interactions_of(_table(where, group), columns, ignore)
    keyed, names = ({}, None) if items is None else _items(_table(Path(f"items of {name}"), items), item_field, ignore)
    paths = {modality: Path(f"items of {name}, field {modality!r}") for modality in keyed}
    return build(RawData(name, name, name, parts, keyed, paths, names), make_plan(**split))


def from_tuples(
    tuples: Iterable[Sequence[Any]],
    *,
    features: Mapping[str, tuple[Sequence[Any], np.ndarray]] | None = None,
    name: str = "tuples",
    **split: Any,
) -> Dataset:
    """A `Dataset` from tuples as Cornac takes them: `(user, item)`, `(user, item, rating)` or with a `timestamp` last.

    Every tuple is an interaction; the rating is not read.

    Args:
        tuples: all of one length, 2, 3 ("UIR") or 4 ("UIRT").
        features: modality -> (item ids `[n]`, array `[n, d]`), the two arguments of Cornac's `FeatureModality`.
        **split: as in :func:`from_rows`.

    Raises:
        DataError: names the tuple or item, what was expected and what was found.
    """
    records = [tuple(one) for one in tuples]
    if not records:
        raise DataError(f"{name}: no tuples; expected at least one (user, item, rating)")
    width = len(records[0])
    if width not in (2, 3, 4):
        raise DataError(f"{name}: tuple 1 has {width} entries; expected (user, item[, rating[, timestamp]])")
    for number, record in enumerate(records, 1):
        if len(record) != width:
            raise DataError(
                f"{name}: tuple {number} has {len(record)} entries, expected {width} as tuple 1: {record!r}"
            )
    fields = ("user", "item", "rating", "timestamp")[:width]
    rows = {field: _array(list(column)) for field, column in zip(fields, zip(*records, strict=True), strict=True)}
    parts = {ONE_FILE: interactions_of(Table(Path(name), rows), {}, ["rating"])}
    keyed, paths = {}, {}
    for modality, (ids, array) in (features or {}).items():
        paths[modality] = Path(f"features[{modality!r}]")
        keyed[modality] = _checked(paths[modality], as_ids(_array(list(ids))), np.asarray(array))
    return build(RawData(name, name, name, parts, keyed, paths), make_plan(**split))


def _parts(rows: Any) -> dict[str, Any]:
    if not isinstance(rows, Mapping):
        return {ONE_FILE: rows}
    known = {alias: part for part, aliases in PART_NAMES.items() for alias in aliases}
    unknown = [part for part in rows if part not in known]
    if unknown or "train" not in rows:
        raise DataError(
            f"rows: expected the parts train, validation, test, found {', '.join(map(str, rows)) or 'none'}"
        )
    if set(rows) == {"train"}:
        return {ONE_FILE: rows["train"]}
    return {known[part]: group for part, group in rows.items()}


def _table(where: Path, rows: Any) -> Table:
    if hasattr(rows, "column_names") and hasattr(rows, "__getitem__"):
        return Table(where, {field: _array(list(rows[field])) for field in rows.column_names})
    records = list(rows)
    if not records:
        raise DataError(f"{where}: no rows; expected at least one")
    fields = list(records[0]) if isinstance(records[0], Mapping) else []
    for number, record in enumerate(records, 1):
        if not isinstance(record, Mapping):
            raise DataError(f"{where}: row {number}: expected a dictionary, found {type(record).__name__}")
        if set(record) != set(fields):
            raise DataError(
                f"{where}: row {number}: expected the fields {', '.join(fields)}, found {', '.join(record)}"
            )
    return Table(where, {field: _array([record[field] for record in records]) for field in fields})


def _array(values: list) -> np.ndarray:
    """Numbers as they are; anything else as objects, so that what is missing can still be told."""
    if all(isinstance(value, (int, float, np.number)) and not isinstance(value, bool) for value in values):
        return np.asarray(values)
    array = np.empty(len(values), object)
    array[:] = values
    return array


def _items(
    table: Table, columns: Mapping[str, str], ignore: Sequence[str]
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], tuple[np.ndarray, np.ndarray] | None]:
    wanted = (columns["item"],) if "item" in columns else ITEM_NAMES
    key = next((field for field in wanted if field in table.names), None)
    if key is None:
        raise DataError(f"{table.path}: no item field: expected {' or '.join(wanted)}, found {', '.join(table.names)}")
    ids, keyed, names = table.ids(key), {}, None
    for field in table.names:
        values = table.columns[field]
        if field == key or field in ignore:
            continue
        if field in ("name", "title"):
            names = (ids, np.asarray([str(value) for value in values.tolist()], dtype=str))
        elif len(values) and isinstance(values[0], (list, tuple, np.ndarray)):
            modality = field.removesuffix("_feat")
            keyed[modality] = _checked(table.path, ids, _stack(table.path, field, values, ids))
        else:
            raise DataError(
                f"{table.path}: field {field!r}: expected a list of numbers (a modality), found {values[0]!r}; pass "
                f"ignore=[{field!r}] to leave it out"
            )
    return keyed, names


def _stack(where: Path, field: str, values: np.ndarray, ids: np.ndarray) -> np.ndarray:
    width = len(values[0])
    for row, value in enumerate(values):
        if not isinstance(value, (list, tuple, np.ndarray)) or len(value) != width:
            found = f"{len(value)}" if isinstance(value, (list, tuple, np.ndarray)) else repr(value)
            raise DataError(
                f"{where}: row {row + 1} (item {ids[row].item()!r}), field {field!r}: expected {width} numbers as in row 1, "
                f"found {found}"
            )
    try:
        return np.asarray(values.tolist(), dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: field {field!r}: expected lists of numbers ({error})") from None


def _checked(where: Path, ids: np.ndarray, array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if array.ndim != 2 or len(array) != len(ids):
        raise DataError(
            f"{where}: expected an array [{len(ids)}, d], one row for each item id, found shape {array.shape}"
        )
    twice = first_duplicate(ids)
    if twice is not None:
        raise DataError(
            f"{where}: item {ids[twice[0]].item()!r} is there twice, in rows {twice[0] + 1} and {twice[1] + 1}"
        )
    return ids, check_features(array, where, ids)
