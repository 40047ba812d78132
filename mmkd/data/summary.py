"""What `mmkd data` prints: what was understood, before anything is trained."""

from __future__ import annotations

import numpy as np

from .dataset import Dataset, row_chunks

__all__ = ["describe"]

_QUANTILES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)


def describe(dataset: Dataset) -> str:
    """Counts, sparsity, degree quantiles, modalities, cold users and items of a data set, as text.

    Features are read once, block by block. "share of mean" is ``|mean row| / mean |row|``: near 1, the rows
    differ little from their common mean.
    """
    user_degree = np.diff(dataset.train.indptr)
    item_degree = np.bincount(dataset.train.indices, minlength=dataset.num_items)
    blocks = [
        [f"data set {dataset.name!r}: {dataset.num_users:,} users, {dataset.num_items:,} items"],
        _parts(dataset, user_degree, item_degree),
        _degrees(user_degree, item_degree),
        _modalities(dataset),
        _cold(dataset, user_degree, item_degree),
        ["ids", f"  users  {_ids(dataset.user_ids)}", f"  items  {_ids(dataset.item_ids)}"],
    ]
    if dataset.notes:
        blocks.append(["notes", *(f"  {note}" for note in dataset.notes)])
    blocks.append([f"fingerprint {dataset.fingerprint()[:16]}"])
    return "\n\n".join("\n".join(block) for block in blocks)


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = []
    for row in (header, *rows):
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines


def _parts(dataset: Dataset, user_degree: np.ndarray, item_degree: np.ndarray) -> list[str]:
    rows = []
    for part in ("train", "val", "test"):
        matrix = getattr(dataset, part)
        if matrix is None:
            rows.append((part, "none", "", "", "", ""))
            continue
        users, items = np.diff(matrix.indptr) > 0, np.unique(matrix.indices)
        rows.append(
            (
                part,
                f"{matrix.nnz:,}",
                f"{int(users.sum()):,}",
                f"{len(items):,}",
                f"{int((users & (user_degree == 0)).sum()):,}",
                f"{int((item_degree[items] == 0).sum()):,}",
            )
        )
    cells = dataset.num_users * dataset.num_items
    lines = _table(("part", "pairs", "users", "items", "users not in train", "items not in train"), rows)
    return ["interactions", *lines, f"  sparsity {1 - dataset.train.nnz / cells:.4%} (train)"]


def _degrees(user_degree: np.ndarray, item_degree: np.ndarray) -> list[str]:
    header = ("", "mean", *("min" if q == 0 else "max" if q == 1 else f"{q:.0%}" for q in _QUANTILES))
    rows = [
        (what, f"{degree.mean():.1f}", *(f"{value:.0f}" for value in np.quantile(degree, _QUANTILES)))
        for what, degree in (("per user", user_degree), ("per item", item_degree))
    ]
    return ["train pairs, quantiles", *_table(header, rows)]


def _modalities(dataset: Dataset) -> list[str]:
    if not dataset.features:
        return ["modalities", "  none"]
    rows = []
    for name, array in dataset.features.items():
        norms = np.empty(len(array))
        total = np.zeros(array.shape[1])
        for start, block in row_chunks(array):
            block = block.astype(np.float64)
            norms[start : start + len(block)] = np.sqrt((block * block).sum(1))
            total += block.sum(0)
        mean = norms.mean() if len(norms) else 0.0
        share = np.linalg.norm(total / max(len(array), 1)) / mean if mean else 0.0
        low, middle, high = np.quantile(norms, (0, 0.5, 1)) if len(norms) else (0.0, 0.0, 0.0)
        zero = int((norms == 0).sum())
        rows.append(
            (
                name,
                f"{array.shape[1]}",
                str(array.dtype),
                f"{low:.3g}",
                f"{middle:.3g}",
                f"{high:.3g}",
                f"{share:.2f}",
                f"{zero:,}",
            )
        )
    header = ("name", "dim", "dtype", "norm min", "median", "max", "share of mean", "zero rows")
    return ["modalities", *_table(header, rows)]


def _cold(dataset: Dataset, user_degree: np.ndarray, item_degree: np.ndarray) -> list[str]:
    users, items = int((user_degree == 0).sum()), int((item_degree == 0).sum())
    return [
        "cold (no train pair)",
        f"  users {users:,} of {dataset.num_users:,} ({users / max(dataset.num_users, 1):.2%})",
        f"  items {items:,} of {dataset.num_items:,} ({items / max(dataset.num_items, 1):.2%})",
    ]


def _ids(ids: np.ndarray) -> str:
    kind = "integers" if ids.dtype.kind in "iu" else "text"
    shown = ", ".join(str(one) for one in ids[:3].tolist())
    return f"{kind}: {shown}{', ...' if len(ids) > 3 else ''}"
