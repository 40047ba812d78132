"""Frozen item features of one modality: kept as they are stored, prepared on the way into a product."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mmkd import ops
from mmkd.ops._checks import FLOATS, accumulate_type

BLOCK_ROWS = 4096


class FeatureTable:
    """``X = r * (values - mean) * scale`` of one modality as the teacher sees it.

    Preparation is an affine map per column whose constants come from the item table itself: ``center`` subtracts the
    column means and divides by one number (the root mean square of the column deviations), ``standardize`` divides
    every column by its own deviation (constant columns become 0). ``unit`` centres and then gives every row the length
    ``sqrt(d_m)`` (``r``, one number a row; a zero row stays zero): where the rows' norms differ much, as in an SVD of a
    graph, inner products otherwise follow the longest few. The prepared table is never built: products fold the map into
    the other factor and ``r`` into the result (:func:`project`), everything else reads prepared row blocks.

    Args:
        name: modality name, for messages.
        values: ``[I, d_m]``, any float or integer dtype, may be memory-mapped; shared, not copied, and never written.
        mode: ``"raw"``, ``"center"``, ``"standardize"`` or ``"unit"``.
        dtype: of prepared blocks and products (float32; float64 in tests).
        compute: ``"float32"`` multiplies in `dtype`; ``"bfloat16"`` rounds both factors of ``X W`` and of its gradient
            to bfloat16, sums in float32, and rounds each product once more.
        loaded: reads a memory-mapped table into memory, in its stored type.

    Raises:
        ValueError: not two-dimensional, or an unknown mode or compute type.
    """

    def __init__(
        self,
        name: str,
        values: np.ndarray | Tensor,
        mode: str = "standardize",
        dtype: torch.dtype = torch.float32,
        compute: str = "float32",
        loaded: bool = False,
    ) -> None:
        if values.ndim != 2:
            raise ValueError(f"modality '{name}': expected a table [items, width], got shape {tuple(values.shape)}")
        if mode not in ("raw", "center", "standardize", "unit"):
            raise ValueError(f"mode: expected raw, center, standardize or unit, got {mode!r}")
        if compute not in ("float32", "bfloat16"):
            raise ValueError(f"compute: expected float32 or bfloat16, got {compute!r}")
        self.name, self.dtype, self.compute = name, dtype, compute
        if loaded and isinstance(values, np.memmap):
            values = np.array(values)
        self.values = values if isinstance(values, Tensor) else _shared(values)
        mean, scale = _constants(self.values, mode)
        self.mean, self.scale = (None if mode == "raw" else c.to(self.values.device) for c in (mean, scale))
        self.row_scale: Tensor | None = None  # r, [I]
        if mode == "unit":
            norms = torch.cat([block.norm(dim=1) for block in self.blocks(dtype=torch.float64)])
            self.row_scale = torch.where(norms > 1e-12, self.width**0.5 / norms.clamp(min=1e-12), 0.0).to(dtype)

    @property
    def num_items(self) -> int:
        return self.values.shape[0]

    @property
    def width(self) -> int:
        return self.values.shape[1]

    def take(self, items: Tensor) -> FeatureTable:
        """The table of these rows alone, `items` int64 `[n]`, prepared with the constants of the whole one."""
        part = copy.copy(self)
        part.values = self.values.index_select(0, items)
        part.row_scale = None if self.row_scale is None else self.row_scale.index_select(0, items)
        return part

    def to(self, device: torch.device | str) -> FeatureTable:
        """Moves the table in place."""
        self.values = self.values.to(device)
        if self.mean is not None:
            self.mean, self.scale = self.mean.to(device), self.scale.to(device)
        if self.row_scale is not None:
            self.row_scale = self.row_scale.to(device)
        return self

    def blocks(self, rows: int = BLOCK_ROWS, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
        """Consecutive prepared row blocks ``[<= rows, d_m]``, in `dtype` (by default that of the table)."""
        dtype = dtype or self.dtype
        start = 0
        for block in self.values.split(rows):
            if self.mean is None:
                yield block.to(dtype)
                continue
            block = (block.double() - self.mean).mul_(self.scale)
            if self.row_scale is not None:
                block *= self.row_scale[start : start + len(block), None]
                start += len(block)
            yield block.to(dtype)

    def prepared(self) -> Tensor:
        """``X`` itself, ``[I, d_m]``, a table of its own: for a model that needs the vectors, not their products."""
        return torch.cat(list(self.blocks()))

    def column_sum(self) -> Tensor:
        """``1^T X``, ``[d_m]`` float64, on the CPU."""
        total = torch.zeros(self.width, dtype=torch.float64, device=self.values.device)
        for block in self.blocks(dtype=torch.float64):
            total += block.sum(0)
        return total.cpu()

    def moments(self, left: Tensor) -> Tensor:
        """``left^T X``, ``[k, d_m]`` float64, streamed over items; `left` is ``[I, k]``."""
        total = torch.zeros(left.shape[1], self.width, dtype=torch.float64, device=self.values.device)
        for rows, block in zip(left.split(BLOCK_ROWS), self.blocks(dtype=torch.float64), strict=True):
            total.addmm_(rows.to(total).T, block)
        return total

    def project(self, weight: Tensor, items: Tensor | None = None) -> Tensor:
        """``X W``, ``[I, d]``, differentiable in ``W``; ``items`` int64 ``[n]``: those rows alone.

        Few rows are copied before the product, many are picked out of the whole one: a copy lives until the backward pass.
        """
        if items is None:
            return project([self], [weight])
        if 4 * len(items) < self.num_items:
            return project([self.take(items)], [weight])
        return project([self], [weight]).index_select(0, items)

    def folded(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """``(W', t)`` with ``X W = r * (values W' + 1 t^T)``: ``W' = diag(scale) W``, ``t = -mean^T W'``; no ``t`` if raw.

        In bfloat16 the centred values are multiplied, for values far from 0 would lose their differences: no ``t``.
        """
        if self.mean is None:
            return weight, None
        weight = self.scale.to(weight.dtype)[:, None] * weight
        return weight, None if self.compute == "bfloat16" else -(self.mean.to(weight.dtype) @ weight)

    @property
    def in_place(self) -> bool:
        """Whether products may take the values where they lie, in the type they are stored in."""
        values = self.values
        there = values.device.type == "cpu" and values.is_contiguous() and values.dtype in FLOATS
        return there and self.compute == "float32"

    def _direct(self, dtype: torch.dtype) -> bool:
        return self.compute == "float32" and self.values.dtype == dtype

    def _work_blocks(self, rows: int = BLOCK_ROWS) -> Iterator[Tensor]:
        """The left factor of `values W'` in the type it is multiplied in, through one block of scratch memory."""
        kind = torch.bfloat16 if self.compute == "bfloat16" else self.dtype
        scratch = torch.empty(min(rows, self.num_items), self.width, dtype=kind, device=self.values.device)
        centred = torch.empty_like(scratch, dtype=self.dtype) if self._centres else None
        for block in self.values.split(rows):
            piece = scratch[: block.shape[0]]
            if centred is None:
                piece.copy_(block)
            else:
                piece.copy_(torch.sub(block, self.mean.to(self.dtype), out=centred[: block.shape[0]]))
            yield piece

    @property
    def _centres(self) -> bool:
        return self.compute == "bfloat16" and self.mean is not None

    def times(self, weight: Tensor, out: Tensor) -> None:
        """Writes ``values W'`` (centred values in bfloat16) into `out` ``[I, d]``, which may be columns of a wider table."""
        if self._direct(weight.dtype):
            torch.mm(self.values, weight, out=out)
            return
        start = 0
        for block in self._work_blocks():
            rows = out[start : start + block.shape[0]]
            if block.dtype == weight.dtype:
                torch.mm(block, weight, out=rows)
            else:
                rows.copy_(block @ weight.to(block.dtype))
            start += block.shape[0]

    def transposed_times(self, grad: Tensor) -> Tensor:
        """``values^T G``, ``[d_m, d]`` (centred values in bfloat16), the gradient of ``W'``."""
        if self._direct(grad.dtype):
            return self.values.T @ grad
        total = torch.zeros(self.width, grad.shape[1], dtype=grad.dtype, device=grad.device)
        start = 0
        for block in self._work_blocks():
            rows = grad[start : start + block.shape[0]]
            if block.dtype == grad.dtype:
                total.addmm_(block.T, rows)
            else:
                total += block.T @ rows.to(block.dtype)
            start += block.shape[0]
        return total


class _Project(torch.autograd.Function):
    """``[values_1 W'_1, ..., values_M W'_M]`` side by side; every product writes its columns, none is copied.

    A table with row scales becomes ``r * (values W' + 1 t^T)`` in place, for its ``t`` cannot wait for the caller.
    """

    @staticmethod
    def forward(ctx, tables: Sequence[FeatureTable], *factors: Tensor | None) -> Tensor:
        weights, shifts = factors[: len(tables)], factors[len(tables) :]
        ctx.tables, ctx.widths = tables, [weight.shape[1] for weight in weights]
        out = weights[0].new_empty(tables[0].num_items, sum(ctx.widths))
        for table, weight, shift, columns in zip(tables, weights, shifts, out.split(ctx.widths, 1), strict=True):
            table.times(weight, columns)
            if shift is not None:
                columns += shift
            if table.row_scale is not None:
                columns *= table.row_scale[:, None].to(columns.dtype)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        by_weight, by_shift = [], []
        count = len(ctx.tables)
        for m, (table, columns) in enumerate(zip(ctx.tables, grad.split(ctx.widths, 1), strict=True)):
            if table.row_scale is not None:
                columns = columns * table.row_scale[:, None].to(columns.dtype)
            by_weight.append(table.transposed_times(columns) if ctx.needs_input_grad[1 + m] else None)
            by_shift.append(columns.sum(0) if ctx.needs_input_grad[1 + count + m] else None)
        return None, *by_weight, *by_shift


def project(
    tables: Sequence[FeatureTable], weights: Sequence[Tensor], design: Tensor | None = None, added: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``mask * ([X_1 W_1, ..., X_M W_M] + D A)``, ``[I, M d]``, differentiable in the weights ``[d_m, d]`` and ``A``.

    Args:
        design, added: ``D``, ``[I, e]``, whose last column is ones, and ``A``, ``[e, M d]``: what else a layer adds, its bias
            among it.
        mask: ``[I, M d]``, of dropout.
    """
    folded = [table.folded(weight) for table, weight in zip(tables, weights, strict=True)]
    if mask is not None and (mask.dtype != weights[0].dtype or mask.dim() != 2 or mask.shape[1] == 1):
        return project(tables, weights, design, added) * mask
    if _in_one_pass(tables, weights, design):
        rows = [weight if t is None else torch.cat([weight, t[None]]) for weight, t in folded]
        values, scales = [table.values.detach() for table in tables], [table.row_scale for table in tables]
        return ops.project(values, rows, scales=scales, design=design, added=added, mask=mask)
    product = _composed(tables, folded, design, added)
    return product if mask is None else product.mul_(mask)  # nobody needs it without


def _in_one_pass(tables: Sequence[FeatureTable], weights: Sequence[Tensor], design: Tensor | None) -> bool:
    """Whether :func:`mmkd.ops.project` takes tables and weights as they are: the values lie on a CPU row after row, and their
    type goes with the weights', all of one type and width."""
    dtype, width = weights[0].dtype, weights[0].shape[1]
    others = [table.row_scale for table in tables] + [design]
    if any(w.dtype != dtype or w.shape[1] != width for w in weights) or dtype not in (torch.float32, torch.float64):
        return False
    if any(t is not None and t.dtype != dtype for t in others):
        return False
    return all(table.in_place and accumulate_type(table.values.dtype) == dtype for table in tables)


def _composed(tables: Sequence[FeatureTable], folded, design: Tensor | None, added: Tensor | None) -> Tensor:
    """:func:`project` of tables that are converted block by block, or are not on a CPU."""
    scaled = [table.row_scale is not None for table in tables]
    product = _Project.apply(
        tuple(tables),
        *(weight for weight, _ in folded),
        *(t if r else None for r, (_, t) in zip(scaled, folded, strict=True)),
    )
    shifts = [None if r else t for r, (_, t) in zip(scaled, folded, strict=True)]
    shift = None  # joins what is added anyway, so that the affine preparation costs no pass over [I, M d]
    if any(t is not None for t in shifts):
        zeros = (weight.new_zeros(weight.shape[1]) for weight, _ in folded)
        shift = torch.cat([none if t is None else t for none, t in zip(zeros, shifts, strict=True)])
    if design is None:
        return product if shift is None else product + shift
    last = added[-1] if shift is None else added[-1] + shift
    if len(added) == 1:
        return product.add_(last)
    return product.addmm_(design, added if shift is None else torch.cat([added[:-1], last[None]]))


def with_ones(x: Tensor) -> Tensor:
    """``[x 1]``: one more column, of ones."""
    return torch.cat([x, x.new_ones(x.shape[0], 1)], 1)


def _shared(values: np.ndarray) -> Tensor:
    if not values.dtype.isnative:
        values = values.astype(values.dtype.newbyteorder("="))
    if values.dtype.kind == "u" and values.dtype.itemsize > 1:
        values = values.astype(np.float32 if values.dtype.itemsize == 2 else np.float64)  # torch has no sums of these
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # read only here
        return torch.from_numpy(values)


def _constants(values: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Column means and reciprocal deviations, ``[d_m]`` float64."""
    mean = values.new_zeros(values.shape[1], dtype=torch.float64)
    if mode == "raw" or not len(values):
        return mean, torch.ones_like(mean)
    for block in values.split(BLOCK_ROWS):
        mean += block.double().sum(0)
    mean /= len(values)
    square = torch.zeros_like(mean)
    for block in values.split(BLOCK_ROWS):
        square += (block.double() - mean).square_().sum(0)
    deviation = (square / len(values)).sqrt()
    floor = 1e-6 * torch.maximum(mean.abs(), deviation.max())
    if mode in ("center", "unit"):
        deviation = deviation.square().mean().sqrt().expand_as(mean)
    usable = deviation > floor
    return mean, torch.where(usable, 1.0, 0.0).double() / torch.where(usable, deviation, 1.0)
