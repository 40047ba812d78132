"""The bipartite interaction graph: edges in, normalised CSR out (spec section 1)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from mmkd import csr


def _ids(values, name: str, bound: int) -> np.ndarray:
    ids = np.asarray(values.cpu() if isinstance(values, Tensor) else values)
    if ids.ndim != 1:
        raise ValueError(f"{name}: expected a 1-d sequence of ids, got shape {ids.shape}")
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"{name}: expected integer ids, got dtype {ids.dtype}; map ids first (mmkd.data.load does)")
    bad = np.flatnonzero((ids < 0) | (ids >= bound))
    if bad.size:
        raise ValueError(f"{name}: entry {bad[0]} is {ids[bad[0]]}, expected [0, {bound})")
    return ids.astype(np.int64, copy=False)


def _check_sizes(num_users: int, num_items: int) -> None:
    if num_users < 1 or num_items < 1:
        raise ValueError(f"num_users, num_items: expected at least one of each, got {num_users} and {num_items}")
    if num_users + num_items > np.iinfo(np.int32).max:
        raise ValueError(
            f"num_users, num_items: {num_users} + {num_items} nodes exceed the 2^31 - 1 an int32 column can name"
        )


@dataclass(frozen=True, eq=False)
class ItemRows:
    """The entries of some items, by item and by user; made by `BipartiteGraph.item_rows`.

    Attributes:
        items: int64 `[n]`.
        rowptr, col: int64 `[n + 1]`, int32 users. user_rowptr, user_col: int64 `[U + 1]`, int32 positions in `items`.
    """

    items: Tensor
    rowptr: Tensor
    col: Tensor
    user_rowptr: Tensor
    user_col: Tensor


@dataclass(frozen=True, eq=False)
class BipartiteGraph:
    """Observed interactions `R` (U x I, binary) and the adjacency `A = [[0, R], [R^T, 0]]` built from them.

    Users are nodes `0..U-1`, items nodes `U..U+I-1`. `scale = D^-1/2`, 0 for a node without edges, so that
    `Â_uv = scale_u * scale_v` and no values are stored.

    Attributes:
        rowptr, col: `A` as CSR, int64 `[N+1]`, int32 `[2*num_edges]`, columns ascending in each row.
        user_rowptr, user_col: `R` as CSR; item_rowptr, item_col: `R^T` as CSR.
        scale: float32 `[N]`.
    """

    num_users: int
    num_items: int
    rowptr: Tensor
    col: Tensor
    user_rowptr: Tensor
    user_col: Tensor
    item_rowptr: Tensor
    item_col: Tensor
    scale: Tensor
    _cache: dict = field(default_factory=dict, repr=False)

    @classmethod
    def from_edges(cls, users, items, num_users: int, num_items: int) -> BipartiteGraph:
        """Builds the graph from two equally long sequences of ids; duplicate pairs are merged.

        Raises ValueError for an id out of range or unequal lengths, TypeError for ids that are not integers.
        """
        u, i = _ids(users, "users", num_users), _ids(items, "items", num_items)
        if u.size != i.size:
            raise ValueError(f"users, items: expected equal lengths, got {u.size} and {i.size}")
        _check_sizes(num_users, num_items)
        return cls._from_csr(*csr.from_edges(u, i, num_users, num_items), num_users, num_items)

    @classmethod
    def from_scipy(cls, matrix: sp.spmatrix) -> BipartiteGraph:
        """Builds the graph from a sparse `U x I` matrix; every stored entry is an edge, whatever its value.

        Raises ValueError for malformed CSR.
        """
        _check_sizes(*matrix.shape)
        rowptr, col = csr.from_scipy(matrix)
        return cls._from_csr(rowptr, col.astype(np.int32), *matrix.shape)

    @classmethod
    def _from_csr(cls, rowptr: np.ndarray, col: np.ndarray, num_users: int, num_items: int) -> BipartiteGraph:
        """`R` with ascending columns."""
        t_rowptr, t_col = csr.transpose(rowptr, col, num_items)
        both = np.concatenate([rowptr, rowptr[-1] + t_rowptr[1:]])
        degree = np.diff(both).astype(np.float64)
        with np.errstate(divide="ignore"):
            scale = np.where(degree > 0, degree**-0.5, 0.0).astype(np.float32)
        arrays = (both, np.concatenate([col + np.int32(num_users), t_col]), rowptr, col, t_rowptr, t_col, scale)
        return cls(num_users, num_items, *(torch.from_numpy(a) for a in arrays))

    @property
    def num_nodes(self) -> int:
        return self.num_users + self.num_items

    @property
    def num_edges(self) -> int:
        """Distinct (user, item) pairs."""
        return self.user_col.numel()

    @property
    def degree(self) -> Tensor:
        """Edges per node, int64 `[N]`."""
        return self.rowptr.diff()

    @property
    def device(self) -> torch.device:
        return self.rowptr.device

    def scale_as(self, dtype: torch.dtype) -> Tensor:
        """`D^-1/2` in the type sums are kept in for tables of `dtype`: float64 for float64, else float32."""
        if dtype != torch.float64:
            return self.scale
        if "scale64" not in self._cache:
            degree = self.degree.double()
            self._cache["scale64"] = torch.where(degree > 0, degree.clamp(min=1).pow(-0.5), torch.zeros_like(degree))
        return self._cache["scale64"]

    def users_from_items(self, x: Tensor, impl: str = "auto", *, rows: ItemRows | None = None) -> Tensor:
        """`R̂ x`: `[I, d] -> [U, d]`, differentiable. With `rows` x holds those items alone, `[n, d]`; the others are 0."""
        return self._half(x, impl, rows, user_side=True)

    def items_from_users(self, x: Tensor, impl: str = "auto", *, rows: ItemRows | None = None) -> Tensor:
        """`R̂ᵀ x`: `[U, d] -> [I, d]`, differentiable; with `rows` those items alone, `[n, d]`."""
        return self._half(x, impl, rows, user_side=False)

    def item_rows(self, items: Tensor) -> ItemRows:
        """What the two products need to go without all other items; no arithmetic, so it can be made ahead of its use.

        Args:
            items: int64 `[n]`, each in `[0, I)`, in any order. The graph has to be on the CPU.

        Raises ValueError for an item out of range, or a graph elsewhere.
        """
        if self.device.type != "cpu":
            raise ValueError(f"item_rows: expected a graph on the CPU, got {self.device}; use graph.to('cpu')")
        rowptr, col = csr.some_rows(self.item_rowptr.numpy(), self.item_col.numpy(), items.numpy())
        arrays = (rowptr, col, *csr.transpose(rowptr, col, self.num_users))
        return ItemRows(items, *(torch.from_numpy(a) for a in arrays))

    def _half(self, x: Tensor, impl: str, rows: ItemRows | None, user_side: bool) -> Tensor:
        from mmkd import backends
        from mmkd.ops.spmm import plan_of, spmm

        row, col = self.scale_as(x.dtype).split([self.num_users, self.num_items])
        if rows is None:
            impl = backends.resolve("spmm", x, impl)
            r, rt = (self.user_rowptr, self.user_col), (self.item_rowptr, self.item_col)
            plans = plan_of(self, "users", impl), plan_of(self, "items", impl)
        else:
            r, rt, plans = (rows.user_rowptr, rows.user_col), (rows.rowptr, rows.col), (None, None)
            col = col.index_select(0, rows.items)
        if not user_side:
            r, rt, row, col, plans = rt, r, col, row, plans[::-1]
        return spmm(*r, x, row_scale=row, col_scale=col, transpose=rt, plans=plans, impl=impl)

    def to(self, device: torch.device | str) -> BipartiteGraph:
        """The same graph with its tensors on `device`."""
        tensors = (self.rowptr, self.col, self.user_rowptr, self.user_col, self.item_rowptr, self.item_col, self.scale)
        return BipartiteGraph(self.num_users, self.num_items, *(t.to(device) for t in tensors))

    def to_scipy(self) -> sp.csr_matrix:
        """`R` as scipy CSR of float32 ones, `U x I`."""
        col = self.user_col.cpu().numpy()
        ones = np.ones(col.size, dtype=np.float32)
        return sp.csr_matrix((ones, col, self.user_rowptr.cpu().numpy()), shape=(self.num_users, self.num_items))

    def __repr__(self) -> str:
        return f"BipartiteGraph({self.num_users} users, {self.num_items} items, {self.num_edges} edges, {self.device})"
