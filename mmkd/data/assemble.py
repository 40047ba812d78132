"""Internal ids in, `Dataset` out: the checks and merges every format shares."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np
from scipy import sparse

from .dataset import Dataset
from .errors import DataError, DataWarning

__all__ = ["assemble", "to_csr"]

PARTS = ("train", "val", "test")


def to_csr(users: np.ndarray, items: np.ndarray, num_users: int, num_items: int) -> sparse.csr_matrix:
    """Pairs to a ``U x I`` CSR of float32 ones: duplicates merged, columns sorted."""
    key = np.unique(np.asarray(users, np.int64) * num_items + np.asarray(items, np.int64))
    rowptr = np.zeros(num_users + 1, np.int64)
    np.cumsum(np.bincount(key // max(num_items, 1), minlength=num_users), out=rowptr[1:])
    matrix = sparse.csr_matrix(
        (np.ones(len(key), np.float32), key % max(num_items, 1), rowptr), shape=(num_users, num_items)
    )
    matrix.has_sorted_indices = True
    return matrix


def assemble(
    name: str,
    parts: Mapping[str, tuple[np.ndarray, np.ndarray]],
    user_ids: np.ndarray,
    item_ids: np.ndarray,
    features: Mapping[str, np.ndarray],
    *,
    item_names: np.ndarray | None = None,
    notes: tuple[str, ...] = (),
    source: str = "",
) -> Dataset:
    """Merge duplicates, keep the parts disjoint, warn about users without train items, build the `Dataset`.

    Args:
        parts: "train", and where there are any "val" and "test": internal ``(users, items)``.
        source: file or folder, for messages.

    Raises:
        DataError: an empty train set.
    """
    num_users, num_items = len(user_ids), len(item_ids)
    if "train" not in parts or not len(parts["train"][0]):
        raise DataError(
            f"{source or name}: the train set is empty: expected at least one (user, item) pair, found none"
        )
    found = list(notes)
    matrices: dict[str, sparse.csr_matrix] = {}
    for part in PARTS:
        if part not in parts:
            continue
        matrix = to_csr(*parts[part], num_users, num_items)
        merged = len(parts[part][0]) - matrix.nnz
        if merged:
            found.append(f"{merged} duplicate pairs of {part} merged")
        for earlier, other in matrices.items():
            matrix = _without(matrix, other, part, earlier, source or name, found)
        matrices[part] = matrix
    _warn_users_without_train(matrices, source or name, found)
    return Dataset(
        name,
        matrices["train"],
        matrices.get("val"),
        matrices.get("test"),
        dict(features),
        user_ids,
        item_ids,
        item_names,
        tuple(found),
    )


def _without(
    matrix: sparse.csr_matrix,
    other: sparse.csr_matrix,
    part: str,
    earlier: str,
    source: str,
    notes: list[str],
) -> sparse.csr_matrix:
    """Leave out of a later part what an earlier one holds: masked when ranking, it could never be hit."""
    common = matrix.multiply(other).tocsr()
    if not common.nnz:
        return matrix
    note = f"{common.nnz} pairs of {part} are also in {earlier}; they count for {earlier} only"
    warnings.warn(f"{source}: {note}", DataWarning, stacklevel=4)
    notes.append(note)
    rest = (matrix - common).tocoo()
    keep = rest.data > 0
    return to_csr(rest.row[keep], rest.col[keep], *matrix.shape)


def _warn_users_without_train(matrices: Mapping[str, sparse.csr_matrix], source: str, notes: list[str]) -> None:
    cold = np.diff(matrices["train"].indptr) == 0
    counts = {part: int((cold & (np.diff(matrices[part].indptr) > 0)).sum()) for part in matrices if part != "train"}
    if any(counts.values()):
        which = " and ".join(f"{count} users in {part}" for part, count in counts.items() if count)
        note = f"{which} have no train item; they are kept, but nothing about them can be learned"
        warnings.warn(f"{source}: {note}", DataWarning, stacklevel=4)
        notes.append(note)
