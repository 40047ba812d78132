"""A `Dataset` written in any of the folder formats, so that `load` reads the same data back."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np

from mmkd.files import make_folder, write_folder

from .dataset import Dataset
from .errors import DataError
from .npz import write_npz

__all__ = ["CONVERTERS", "convert"]

_PARTS = ("train", "val", "test")


def convert(dataset: Dataset, out: str | Path, to: str) -> tuple[Path, list[str]]:
    """Write `dataset` as a folder of the format `to`; whole or not at all.

    - `npz`: ``train.npz`` ..., ``NAME_feat.npy``, ``user_ids.npy``, ``item_ids.npy``; reads back with the same fingerprint.
    - `json`: ``train.json`` ... of PromptMM / MMSSL / LATTICE, ``NAME_feat.npy``, ``item_ids.txt``; ids become text.
    - `table`: ``train.csv`` ..., ``NAME_feat.npz`` with ids.
    - `mmrec`: ``NAME.inter`` with ``x_label``, ``NAME_feat.npy``, ``i_id_mapping.csv``, ``u_id_mapping.csv``.
    - `recbole`: ``NAME.train.inter`` ..., ``NAME.item`` with a ``float_seq`` field for each modality (float32).

    Returns:
        the folder, and what the format could not hold, one sentence each.

    Raises:
        DataError: an unknown format, a folder at `out` that is not empty, or an id that the format cannot hold.
    """
    if to not in CONVERTERS:
        raise DataError(f"to: expected one of {', '.join(CONVERTERS)}, got {to!r}")
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"out: {out} is already there and not an empty folder; name another place")
    lost: list[str] = []
    if dataset.item_names is not None and to != "recbole":
        lost.append(f"item names: the {to} format has no place for them")
    make_folder(out.parent)
    write_folder(out, lambda folder: CONVERTERS[to](dataset, folder, lost))
    return out, lost


def _pairs(dataset: Dataset):
    """Each part that is there, with its rows and columns."""
    for part in _PARTS:
        matrix = getattr(dataset, part)
        if matrix is not None:
            coo = matrix.tocoo()
            yield part, coo.row, coo.col


def _plain(ids: np.ndarray) -> np.ndarray:
    return ids if ids.dtype.kind in "iuU" else ids.astype(str)


def _separable(ids: np.ndarray, what: str, to: str) -> list[str]:
    """Ids as text that tabs and line ends cannot tear apart."""
    texts = [str(one) for one in ids.tolist()]
    for text in texts:
        if (
            not text
            or text != text.strip()
            or any(mark in text for mark in "\t\r\n\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029")
        ):
            raise DataError(
                f"{what} id {text!r}: the {to} format cannot hold an id that is empty, starts or ends with a space, or has "
                "a tab or line end in it; use npz"
            )
    return texts


def _save_features(dataset: Dataset, folder: Path) -> None:
    for name, array in dataset.features.items():
        np.save(folder / f"{name}_feat.npy", np.asarray(array))


def _write_npz(dataset: Dataset, folder: Path, lost: list[str]) -> None:
    write_npz(dataset, folder)


def _write_json(dataset: Dataset, folder: Path, lost: list[str]) -> None:
    if dataset.user_ids.dtype.kind in "iu" or dataset.item_ids.dtype.kind in "iu":
        lost.append("integer ids: the json format reads all ids as text")
    users, items = (
        [str(one) for one in dataset.user_ids.tolist()],
        _separable(dataset.item_ids, "item", "json"),
    )
    for part, rows, cols in _pairs(dataset):
        lists: dict[str, list[str]] = {}
        for row, col in zip(rows.tolist(), cols.tolist(), strict=True):
            lists.setdefault(users[row], []).append(items[col])
        (folder / f"{part}.json").write_text(json.dumps(lists), encoding="utf-8")
    (folder / "item_ids.txt").write_text("\n".join(items) + "\n", encoding="utf-8")
    _save_features(dataset, folder)
    _lost_users(dataset, lost, "json")


def _write_table(dataset: Dataset, folder: Path, lost: list[str]) -> None:
    users, items = _separable(dataset.user_ids, "user", "table"), _separable(dataset.item_ids, "item", "table")
    for part, rows, cols in _pairs(dataset):
        with open(folder / f"{part}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("user", "item"))
            writer.writerows((users[row], items[col]) for row, col in zip(rows.tolist(), cols.tolist(), strict=True))
    for name, array in dataset.features.items():
        np.savez(folder / f"{name}_feat.npz", ids=_plain(dataset.item_ids), features=np.asarray(array))
    _lost_users(dataset, lost, "table")
    _lost_items(dataset, lost, "table")


def _write_mmrec(dataset: Dataset, folder: Path, lost: list[str]) -> None:
    users, items = _separable(dataset.user_ids, "user", "mmrec"), _separable(dataset.item_ids, "item", "mmrec")
    lines = ["userID\titemID\tx_label"]
    for part, rows, cols in _pairs(dataset):
        label = _PARTS.index(part)
        lines += [f"{row}\t{col}\t{label}" for row, col in zip(rows.tolist(), cols.tolist(), strict=True)]
    _write_lines(folder / f"{_stem(dataset)}.inter", lines)
    for kind, ids, number in (("u", users, "userID"), ("i", items, "itemID")):
        _write_lines(
            folder / f"{kind}_id_mapping.csv", [f"id\t{number}", *(f"{one}\t{at}" for at, one in enumerate(ids))]
        )
    _save_features(dataset, folder)
    _lost_users(dataset, lost, "mmrec")
    _lost_items(dataset, lost, "mmrec")


def _write_recbole(dataset: Dataset, folder: Path, lost: list[str]) -> None:
    users, items = _separable(dataset.user_ids, "user", "recbole"), _separable(dataset.item_ids, "item", "recbole")
    stem = _stem(dataset)
    for part, rows, cols in _pairs(dataset):
        lines = ["user_id:token\titem_id:token"]
        lines += [f"{users[row]}\t{items[col]}" for row, col in zip(rows.tolist(), cols.tolist(), strict=True)]
        _write_lines(folder / f"{stem}.{'valid' if part == 'val' else part}.inter", lines)
    header, columns = ["item_id:token"], [items]
    if dataset.item_names is not None:
        header.append("name:token_seq")
        columns.append([" ".join(str(one).split()) for one in dataset.item_names.tolist()])
    for name, array in dataset.features.items():
        if array.dtype != np.float32:
            lost.append(f"dtype of {name}: {array.dtype} becomes float32")
        header.append(f"{name}:float_seq")
        columns.append([" ".join(map(str, row)) for row in np.asarray(array, np.float32).tolist()])
    _write_lines(folder / f"{stem}.item", ["\t".join(header), *map("\t".join, zip(*columns, strict=True))])
    _lost_users(dataset, lost, "recbole")
    _lost_items(dataset, lost, "recbole")


def _write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def _stem(dataset: Dataset) -> str:
    return "".join(mark if mark.isalnum() or mark in "-_" else "-" for mark in dataset.name) or "data"


def _lost_users(dataset: Dataset, lost: list[str], to: str) -> None:
    degree = sum(np.diff(getattr(dataset, part).indptr) for part in _PARTS if getattr(dataset, part) is not None)
    if absent := int((degree == 0).sum()):
        lost.append(f"{absent} users without any interaction: the {to} format has no row for them")


def _lost_items(dataset: Dataset, lost: list[str], to: str) -> None:
    if dataset.features:
        return
    degree = sum(np.bincount(cols, minlength=dataset.num_items) for _, _, cols in _pairs(dataset))
    if absent := int((degree == 0).sum()):
        lost.append(f"{absent} items without interaction or features: the {to} format has no row for them")


CONVERTERS = {
    "npz": _write_npz,
    "json": _write_json,
    "table": _write_table,
    "mmrec": _write_mmrec,
    "recbole": _write_recbole,
}
