"""Folder of scipy sparse matrices: ``train.npz`` [``val.npz``, ``test.npz``] and ``NAME_feat.npy``.

The matrices are users x items as `scipy.sparse.save_npz` writes them (csr, csc or coo); an entry above 0 is
an interaction. Row ``i`` of every feature file belongs to column ``i``. Optional ``user_ids.txt`` /
``item_ids.txt`` (or ``.npy``) hold the original ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy import sparse

from ..files import write_atomic
from .assemble import assemble
from .dataset import Dataset
from .errors import DataError
from .features import open_rows, resolve_features
from .files import open_npz
from .ids import read_ids

__all__ = ["check_extent", "find_parts", "load_npz", "read_csr", "read_matrix", "write_npz"]

PART_NAMES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
_MEMBERS = {
    b"csr": ("indices", "indptr", "data"),
    b"csc": ("indices", "indptr", "data"),
    b"coo": ("row", "col", "data"),
}


def find_parts(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """The train/val/test files of a folder, by name and ending.

    Raises:
        DataError: two files for one part.
    """
    found: dict[str, Path] = {}
    for part, names in PART_NAMES.items():
        paths = [folder / (name + suffix) for name in names for suffix in suffixes]
        paths = [path for path in paths if path.is_file()]
        if len(paths) > 1:
            raise DataError(f"{folder}: expected one file for {part}, found {', '.join(path.name for path in paths)}")
        if paths:
            found[part] = paths[0]
    return found


def load_npz(
    folder: Path,
    *,
    features: Mapping[str, str | Path] | Sequence[str | Path] | None = None,
    name: str | None = None,
) -> Dataset:
    """Load format (a), see the module. Features are memory-mapped and keep their dtype.

    Raises:
        DataError: names the file, row or id, what was expected and what was found.
    """
    paths = find_parts(folder, (".npz",))
    if "train" not in paths:
        raise DataError(f"{folder}: expected train.npz, found none")
    shape: tuple[int, int] | None = None
    parts = {}
    for part, path in paths.items():
        users, items, found = read_matrix(path)
        if shape is not None and found != shape:
            raise DataError(f"{path}: shape {found}, expected {shape} as in {paths['train'].name}")
        shape, parts[part] = found, (users, items)
    assert shape is not None
    expected_by = f"one per column of {paths['train'].name}"
    used = _largest_item(parts, paths)
    arrays = {
        modality: open_rows(path, shape[1], expected_by, used)
        for modality, path in resolve_features(features, folder, suffixes=(".npy",)).items()
    }
    return assemble(
        name or folder.resolve().name,
        parts,
        _ids_or_range(folder, "user", shape[0]),
        _ids_or_range(folder, "item", shape[1]),
        arrays,
        source=str(folder),
        notes=("split: given",),
    )


def write_npz(dataset: Dataset, folder: Path) -> Path:
    """Writes a data set as a folder that `load_npz` reads back, features mapped; item names are not kept. Returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "val", "test"):
        matrix = getattr(dataset, part)
        if matrix is not None:
            write_atomic(folder / f"{part}.npz", lambda temporary, m=matrix: sparse.save_npz(temporary, m))
    for what in ("user_ids", "item_ids"):
        ids = getattr(dataset, what)
        plain = ids if ids.dtype.kind in "iuU" else ids.astype(str)  # nothing that needs a pickle
        write_atomic(folder / f"{what}.npy", lambda temporary, ids=plain: np.save(temporary, ids))
    for name, values in dataset.features.items():
        write_atomic(folder / f"{name}_feat.npy", lambda temporary, x=values: np.save(temporary, x))
    return folder


def _largest_item(
    parts: Mapping[str, tuple[np.ndarray, np.ndarray]], paths: Mapping[str, Path]
) -> tuple[int, str] | None:
    best: tuple[int, str] | None = None
    for part, (users, items) in parts.items():
        if len(items):
            position = int(items.argmax())
            if best is None or items[position] > best[0]:
                best = int(items[position]), f"{paths[part].name}, user {int(users[position])}"
    return best


def _ids_or_range(folder: Path, what: str, count: int) -> np.ndarray:
    for path in (folder / f"{what}_ids.txt", folder / f"{what}_ids.npy"):
        if path.is_file():
            ids = read_ids(path)
            if len(ids) != count:
                raise DataError(f"{path}: wrong row count: expected {count} {what} ids, found {len(ids)}")
            return ids
    return np.arange(count)


def read_matrix(path: Path) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Read one sparse matrix; returns ``users``, ``items`` (int64, entries above 0) and the shape.

    Raises:
        DataError: not a sparse matrix, an index outside the shape, or an entry that is negative or not
            finite.
    """
    arrays = open_npz(path)
    kind, shape = _kind_and_shape(path, arrays)
    data = arrays["data"]
    if kind == b"coo":
        users, items = arrays["row"], arrays["col"]
    else:
        major = _expand(path, arrays["indptr"], arrays["indices"], shape[0 if kind == b"csr" else 1])
        users, items = (major, arrays["indices"]) if kind == b"csr" else (arrays["indices"], major)
    users, items = np.asarray(users, np.int64), np.asarray(items, np.int64)
    if not len(users) == len(items) == len(data):
        raise DataError(
            f"{path}: {len(users)} rows, {len(items)} columns and {len(data)} values; expected as many of each"
        )
    _check_entries(path, users, items, data, shape)
    keep = data != 0
    return users[keep], items[keep], shape


def read_csr(path: Path) -> sparse.csr_matrix:
    """One sparse matrix as CSR with its values and their dtype, checked like `read_matrix` but for the values.

    Raises:
        DataError: no CSR matrix, or one whose parts do not fit together.
    """
    arrays = open_npz(path)
    kind, shape = _kind_and_shape(path, arrays)
    if kind != b"csr":
        raise DataError(f"{path}: expected a csr matrix, found {kind.decode()}")
    if arrays["data"].dtype.kind not in "biuf":
        raise DataError(f"{path}: entries must be numbers, found dtype {arrays['data'].dtype}")
    try:
        matrix = sparse.csr_matrix((arrays["data"], arrays["indices"], arrays["indptr"]), shape=shape)
        matrix.check_format(full_check=True)
    except Exception as error:  # whatever scipy says of parts that do not fit
        raise DataError(f"{path}: not a valid sparse matrix ({error})") from None
    return matrix


def _kind_and_shape(path: Path, arrays: Mapping[str, np.ndarray]) -> tuple[bytes, tuple[int, int]]:
    """Format and shape of what `scipy.sparse.save_npz` wrote; its members are there, flat and of sensible types."""
    label = arrays.get("format", np.asarray(b""))
    kind = label.item() if label.size == 1 else b""
    kind = kind.encode() if isinstance(kind, str) else kind
    needed = _MEMBERS.get(kind) if isinstance(kind, bytes) else None
    if needed is None or "shape" not in arrays or any(member not in arrays for member in needed):
        raise DataError(
            f"{path}: expected a csr, csc or coo matrix written by scipy.sparse.save_npz, found the arrays "
            f"{sorted(arrays)[:8]}"
            + (f" of format {kind[:20].decode(errors='replace')!r}" if isinstance(kind, bytes) and kind else "")
        )
    declared = arrays["shape"]
    if declared.shape != (2,) or declared.dtype.kind not in "iu" or (declared < 0).any():
        raise DataError(f"{path}: expected a users x items matrix, found shape {declared.tolist()}")
    for member in needed:
        array = arrays[member]
        if array.ndim != 1 or (member != "data" and array.dtype.kind not in "iu"):
            raise DataError(
                f"{path}: {member!r}: expected a flat array of whole numbers, found {array.dtype} {array.shape}"
            )
    shape = (int(declared[0]), int(declared[1]))
    check_extent(path, shape, len(arrays["data"]))
    return kind, shape


def check_extent(path: Path, shape: tuple[int, ...], stored: int) -> None:
    """Refuse a size that what is stored cannot fill by far: ids and tables are made as long as that.

    Raises:
        DataError: more than ten million rows or columns, and more than 100 for every stored entry.
    """
    bound = max(10_000_000, 100 * stored)
    if max(shape) > bound:
        raise DataError(
            f"{path}: {max(shape):,} users or items for {stored:,} interactions; expected at most {bound:,}. "
            "Number them without such gaps"
        )


def _expand(path: Path, indptr: np.ndarray, indices: np.ndarray, rows: int) -> np.ndarray:
    counts = np.diff(indptr.astype(np.int64))
    if len(indptr) != rows + 1 or indptr[0] != 0 or (counts < 0).any() or indptr[-1] != len(indices):
        raise DataError(
            f"{path}: broken 'indptr': expected {rows + 1} rising offsets from 0 to {len(indices)}, found {len(indptr)}"
        )
    return np.repeat(np.arange(rows, dtype=np.int64), counts)


def _check_entries(path: Path, users: np.ndarray, items: np.ndarray, data: np.ndarray, shape: tuple[int, int]) -> None:
    for what, ids, bound in (("user", users, shape[0]), ("item", items, shape[1])):
        bad = np.flatnonzero((ids < 0) | (ids >= bound))
        if bad.size:
            other = f" (user {users[bad[0]]})" if what == "item" else ""
            raise DataError(f"{path}: {what} id {ids[bad[0]]}{other} is outside the matrix: expected 0 to {bound - 1}")
    if data.dtype.kind not in "biuf":
        raise DataError(f"{path}: entries must be numbers, found dtype {data.dtype}")
    bad = np.flatnonzero(~(np.isfinite(data) & (data >= 0)))
    if bad.size:
        first = bad[0]
        raise DataError(
            f"{path}: entry of user {users[first]}, item {items[first]} is {data[first]}; expected a finite "
            "value >= 0 "
            "(above 0 is an interaction)"
        )
