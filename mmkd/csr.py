"""Sparse patterns as sorted CSR arrays, built and checked in C++ (`csrc/host/csr.cpp`)."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from mmkd import _host


def from_edges(rows: np.ndarray, cols: np.ndarray, num_rows: int, num_cols: int) -> tuple[np.ndarray, np.ndarray]:
    """The distinct pairs `(rows[i], cols[i])` as `(rowptr int64 [num_rows + 1], col int32 [nnz])`, columns ascending.

    Raises ValueError for an id out of range, unequal lengths, or more than 2^31 - 1 rows or columns.
    """
    return _host.csr_from_edges(
        np.ascontiguousarray(rows, np.int64), np.ascontiguousarray(cols, np.int64), num_rows, num_cols
    )


def from_scipy(matrix: sp.spmatrix) -> tuple[np.ndarray, np.ndarray]:
    """The stored entries of a sparse matrix as `(rowptr int64, col)`, each pair once, columns ascending.

    `matrix` is not changed, and `col` may be its own memory. Raises ValueError for malformed CSR, before scipy reads it.
    """
    if matrix.format != "csr":
        coo = matrix.tocoo()
        return from_edges(coo.row, coo.col, *matrix.shape)
    rowptr, col = matrix.indptr.astype(np.int64), np.ascontiguousarray(matrix.indices)
    if rowptr.shape != (matrix.shape[0] + 1,):
        raise ValueError(f"rowptr: expected {matrix.shape[0] + 1} entries (rows + 1), got shape {rowptr.shape}")
    if _host.check_csr(rowptr, col, matrix.shape[1]):
        return rowptr, col
    return from_edges(np.repeat(np.arange(matrix.shape[0]), np.diff(rowptr)), col, *matrix.shape)


def transpose(rowptr: np.ndarray, col: np.ndarray, num_cols: int) -> tuple[np.ndarray, np.ndarray]:
    """The transposed pattern of `(rowptr int64, col int32)`, columns ascending."""
    return _host.csr_transpose(rowptr, col, num_cols)


def some_rows(rowptr: np.ndarray, col: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows `rows` of the pattern `(rowptr int64, col int32)`, in that order, as a pattern of their own.

    Raises ValueError for a row out of range or a `rowptr` that falls.
    """
    return _host.csr_rows(rowptr, col, np.ascontiguousarray(rows, np.int64))
