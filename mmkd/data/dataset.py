"""The one form every loader ends in."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from .errors import DataError

if TYPE_CHECKING:
    from ..graph import BipartiteGraph

__all__ = ["Dataset", "row_chunks"]

_CHUNK_ELEMENTS = 1 << 22


def row_chunks(array: np.ndarray):
    """Yield ``(first_row, rows)`` blocks of a 2-D array, a few MiB each, for memory-mapped files."""
    step = max(1, _CHUNK_ELEMENTS // max(1, array.shape[1]))
    for start in range(0, array.shape[0], step):
        yield start, np.asarray(array[start : start + step])


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Interactions, their split and the items' features.

    Attributes:
        name: what to call it in tables.
        train, val, test: ``U x I`` CSR, float32 ones, columns sorted, no duplicates; ``val`` and ``test``
            may be None. The three are disjoint.
        features: modality name -> ``[I, d_m]`` in the stored dtype; may be memory-mapped. Row = internal
            item id.
        user_ids, item_ids: original ids; the position is the internal id.
        item_names: ``[I]`` text to show for an item, or None.
        notes: what the loader decided or changed, one sentence each.

    Raises:
        DataError: shapes that do not agree, or an empty train set.
    """

    name: str
    train: sparse.csr_matrix
    val: sparse.csr_matrix | None
    test: sparse.csr_matrix | None
    features: dict[str, np.ndarray]
    user_ids: np.ndarray
    item_ids: np.ndarray
    item_names: np.ndarray | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        shape = self.train.shape
        if self.train.nnz == 0:
            raise DataError(f"{self.name}: the train set is empty; at least one (user, item) pair is needed")
        for part in ("val", "test"):
            matrix = getattr(self, part)
            if matrix is not None and matrix.shape != shape:
                raise DataError(f"{self.name}: {part} is {matrix.shape}, expected {shape} like train")
        for modality, array in self.features.items():
            if array.ndim != 2 or array.shape[0] != shape[1]:
                raise DataError(
                    f"{self.name}: features {modality!r} have shape {array.shape}, expected ({shape[1]}, d)"
                )
        for what, ids, expected in (
            ("user_ids", self.user_ids, shape[0]),
            ("item_ids", self.item_ids, shape[1]),
        ):
            if len(ids) != expected:
                raise DataError(f"{self.name}: {len(ids)} {what}, expected {expected}")
        if self.item_names is not None and len(self.item_names) != shape[1]:
            raise DataError(f"{self.name}: {len(self.item_names)} item_names, expected {shape[1]}")

    def __repr__(self) -> str:
        parts = ", ".join(
            f"{part}={matrix.nnz}"
            for part, matrix in (("train", self.train), ("val", self.val), ("test", self.test))
            if matrix is not None
        )
        dims = ", ".join(f"{name}:{array.shape[1]}" for name, array in self.features.items())
        size = f"users={self.num_users}, items={self.num_items}"
        return f"Dataset({self.name!r}, {size}, {parts}, features=[{dims}])"

    @property
    def num_users(self) -> int:
        """Number of users ``U``."""
        return int(self.train.shape[0])

    @property
    def num_items(self) -> int:
        """Number of items ``I``."""
        return int(self.train.shape[1])

    def graph(self) -> BipartiteGraph:
        """The train interactions as a `BipartiteGraph`; validation and test edges are never in it."""
        from ..graph import BipartiteGraph

        return BipartiteGraph.from_scipy(self.train)

    def fingerprint(self) -> str:
        """Hex SHA-256 over matrices, features and ids: equal exactly when a model would see the same data."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(b"mmkd-dataset-1")
        for part in ("train", "val", "test"):
            matrix = getattr(self, part)
            digest.update(f"|{part}:{None if matrix is None else matrix.shape}|".encode())
            if matrix is not None:
                digest.update(matrix.indptr.astype("<i8").tobytes())
                digest.update(matrix.indices.astype("<i8").tobytes())
        for modality in sorted(self.features):
            array = self.features[modality]
            dtype = array.dtype.newbyteorder("<")
            digest.update(f"|{modality}:{array.shape}:{dtype.str}|".encode())
            for _, rows in row_chunks(array):
                digest.update(np.ascontiguousarray(rows, dtype=dtype).tobytes())
        for ids in (self.user_ids, self.item_ids):
            digest.update(f"|ids:{len(ids)}|".encode())
            if ids.dtype.kind in "iu":
                digest.update(ids.astype("<i8").tobytes())
            else:
                for text in map(str, ids.tolist()):
                    raw = text.encode()
                    digest.update(len(raw).to_bytes(4, "little") + raw)
        return digest.hexdigest()
