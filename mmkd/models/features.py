"""Frozen item features of one modality, prepared once and read in blocks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

BLOCK_ROWS = 4096


class FeatureTable:
    """``X`` of one modality as the teacher sees it: raw, centred, standardised, or centred with rows of one length.

    Preparation is an affine map per column whose constants come from the item table itself: ``center`` subtracts the
    column means and divides by one number (the root mean square of the column deviations), ``standardize`` divides
    every column by its own deviation (constant columns become 0). ``unit`` centres and then gives every row the length
    ``sqrt(d_m)`` (a zero row stays zero): where the rows' norms differ much, as in an SVD of a graph, inner products
    otherwise follow the longest few.

    Args:
        name: modality name, for messages.
        values: ``[I, d_m]`` in any float dtype, may be memory-mapped; read in blocks, never written.
        mode: ``"raw"``, ``"center"``, ``"standardize"`` or ``"unit"``.
        dtype: of the prepared table (float32; float64 in tests).
    """

    def __init__(
        self, name: str, values: np.ndarray, mode: str = "standardize", dtype: torch.dtype = torch.float32
    ) -> None:
        if values.ndim != 2:
            raise ValueError(f"modality '{name}': expected a table [items, width], got shape {values.shape}")
        if mode not in ("raw", "center", "standardize", "unit"):
            raise ValueError(f"mode: expected raw, center, standardize or unit, got {mode!r}")
        self.name = name
        mean, scale = _constants(values, mode)
        self.values = torch.empty(values.shape, dtype=dtype)
        for start in range(0, len(values), BLOCK_ROWS):
            block = np.asarray(values[start : start + BLOCK_ROWS], dtype=np.float64)
            block = (block - mean) * scale
            if mode == "unit":
                block *= np.sqrt(values.shape[1]) / np.maximum(np.linalg.norm(block, axis=1, keepdims=True), 1e-12)
            self.values[start : start + len(block)] = torch.from_numpy(block)

    @property
    def num_items(self) -> int:
        return self.values.shape[0]

    @property
    def width(self) -> int:
        return self.values.shape[1]

    def to(self, device: torch.device | str) -> FeatureTable:
        """Moves the table in place."""
        self.values = self.values.to(device)
        return self

    def blocks(self, rows: int = BLOCK_ROWS) -> Iterator[Tensor]:
        """Consecutive row blocks ``[<= rows, d_m]``."""
        yield from self.values.split(rows)

    def column_sum(self) -> np.ndarray:
        """``1^T X``, ``[d_m]`` float64."""
        total = np.zeros(self.width)
        for block in self.blocks():
            total += block.double().sum(0).cpu().numpy()
        return total

    def project(self, weight: Tensor) -> Tensor:
        """``X W``, ``[I, d]``, differentiable in ``W``."""
        return self.values @ weight


def _constants(values: np.ndarray, mode: str) -> tuple[np.ndarray | float, np.ndarray | float]:
    if mode == "raw" or not len(values):
        return 0.0, 1.0
    total, blocks = np.zeros(values.shape[1]), range(0, len(values), BLOCK_ROWS)
    for start in blocks:
        total += np.asarray(values[start : start + BLOCK_ROWS], dtype=np.float64).sum(0)
    mean, square = total / len(values), np.zeros(values.shape[1])
    for start in blocks:
        square += ((np.asarray(values[start : start + BLOCK_ROWS], dtype=np.float64) - mean) ** 2).sum(0)
    deviation = np.sqrt(square / len(values))
    floor = 1e-6 * np.maximum(np.abs(mean), deviation.max(initial=0.0))
    if mode in ("center", "unit"):
        deviation = np.full_like(deviation, np.sqrt(np.mean(deviation**2)))
    usable = deviation > floor
    return mean, np.where(usable, 1.0, 0.0) / np.where(usable, deviation, 1.0)
