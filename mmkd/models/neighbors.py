"""Item-item graphs of every modality's nearest neighbours, fixed before training (as in LATTICE, FREEDOM)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmkd import csr, ops
from mmkd.models.features import FeatureTable

# Multiplications, about 15 seconds on two cores, up to which neighbours are looked for by the features themselves.
AFFORDABLE = 1e12


@dataclass(frozen=True)
class NeighborGraph:
    """`Ŝ = D^-1/2 S D^-1/2` over items: `S_ij = 1` where i is among the k items most similar to j, or j among those of i.

    Attributes:
        rowptr, col: `S` as CSR, int64 `[I + 1]`, int32 `[nnz]`, symmetric, columns ascending, no item its own neighbour.
        scale: `D^-1/2`, `[I]`, float64; 0 for an item without neighbours.
    """

    rowptr: Tensor
    col: Tensor
    scale: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """`Ŝ x`: `[I, d] -> [I, d]`, differentiable."""
        scale = self.scale if x.dtype == torch.float64 else self.scale.float()
        return ops.spmm(self.rowptr, self.col, x, row_scale=scale, col_scale=scale, transpose=(self.rowptr, self.col))

    def to(self, device: torch.device | str) -> NeighborGraph:
        """The same graph on `device`."""
        return NeighborGraph(self.rowptr.to(device), self.col.to(device), self.scale.to(device))


def neighbor_vectors(table: FeatureTable, components: Tensor) -> Tensor:
    """What items are compared by: the features, `[I, d_m]`, where `I^2 d_m` is affordable, else `components`, `[I, d]`."""
    return table.prepared() if table.num_items**2 * table.width <= AFFORDABLE else components


def neighbor_graph(vectors: Tensor, k: int) -> NeighborGraph:
    """The graph of the `k` nearest neighbours by cosine; equal similarities by lower id, an item of length 0 has none.

    Args:
        vectors: `[I, w]`, one row an item; `I^2 w` multiplications, in blocks that are never stored.
        k: at least 1.
    """
    count = len(vectors)
    unit = torch.nn.functional.normalize(vectors, dim=1)
    own = torch.arange(count, device=vectors.device)
    itself = torch.arange(count + 1, device=vectors.device), own
    near = ops.topk(unit, unit, k, exclude=itself)[1].cpu().numpy()  # [I, k], -1 where there are fewer
    some = (vectors != 0).any(1).cpu().numpy()
    rows, cols = np.repeat(np.arange(count), k), near.ravel()
    kept = (cols >= 0) & some[rows] & some[cols]
    rows, cols = rows[kept], cols[kept]
    rowptr, col = csr.from_edges(np.concatenate([rows, cols]), np.concatenate([cols, rows]), count, count)
    degree = np.diff(rowptr)
    scale = np.where(degree > 0, np.maximum(degree, 1) ** -0.5, 0.0)
    return NeighborGraph(*(torch.from_numpy(a).to(vectors.device) for a in (rowptr, col, scale)))
