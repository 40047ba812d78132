"""Sparse-dense products and LightGCN propagation in Triton (spec section 2).

One program makes one row, a tile of `[BLOCK_E, BLOCK_D]` neighbours at a time. A row with more than SPLIT entries is
cut: further programs write partial sums of SPLIT entries each, and the row's program adds them in order, so a popular
item neither serialises the launch nor makes the result depend on timing. The cut is planned in torch ops of static
shape (at most nnz // SPLIT pieces), without a sync.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from mmkd.kernels import launch

SPLIT = 512


@triton.jit
def _gather(rowptr_end, begin, col, x, value, col_scale, source, columns, d, acc, BLOCK_E: tl.constexpr):
    """acc + sum over entries [begin, end) of value * col_scale * x[col], `[BLOCK_D]`."""
    live_d = columns < d
    for start in range(begin, rowptr_end, BLOCK_E):
        entry = start + tl.arange(0, BLOCK_E).to(tl.int64)
        live = entry < rowptr_end
        c = tl.load(col + entry, mask=live, other=0).to(tl.int64)
        if source is not None:
            live = live & (tl.load(source + c, mask=live, other=0) != 0)
        tile = tl.load(x + c[:, None] * d + columns[None, :], mask=live[:, None] & live_d[None, :], other=0.0)
        tile = tile.to(acc.dtype)
        if value is not None:
            tile *= tl.load(value + entry, mask=live, other=0.0)[:, None]
        if col_scale is not None:
            tile *= tl.load(col_scale + c, mask=live, other=0.0)[:, None]
        acc += tl.sum(tile, 0)
    return acc


@triton.jit
def _spmm_pieces(
    rowptr, col, x, value, col_scale, source, needed, piece_row, piece_end, partial, n, d, DEGREE,
    SPLIT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0).to(tl.int64)
    row = tl.load(piece_row + piece)
    wanted = row < n
    if needed is not None:
        wanted = tl.load(needed + row, mask=wanted, other=0) != 0
    if wanted:
        columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        # the row's own program takes its first SPLIT entries, its pieces the rest
        hi = tl.load(rowptr + row + 1)
        first = tl.load(piece_end + row - 1, mask=row > 0, other=0)
        lo = tl.load(rowptr + row) + (piece - first + 1) * SPLIT
        acc = tl.zeros([BLOCK_D], partial.dtype.element_ty)
        acc = _gather(tl.minimum(hi, lo + SPLIT), lo, col, x, value, col_scale, source, columns, d, acc, BLOCK_E)
        tl.store(partial + piece * d + columns, acc, mask=columns < d)


@triton.jit
def _spmm_rows(
    rowptr, col, x, value, row_scale, col_scale, source, needed, add, piece_end, partial, out, d, divisor, DEGREE,
    SPLIT: tl.constexpr, DOUBLE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    wanted = True
    if needed is not None:
        wanted = tl.load(needed + row) != 0
    if wanted:
        columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        live_d = columns < d
        lo = tl.load(rowptr + row)
        hi = tl.load(rowptr + row + 1)
        acc = tl.zeros([BLOCK_D], tl.float64 if DOUBLE else tl.float32)
        if partial is not None:
            acc = _gather(tl.minimum(hi, lo + SPLIT), lo, col, x, value, col_scale, source, columns, d, acc, BLOCK_E)
            first = tl.load(piece_end + row - 1, mask=row > 0, other=0)
            for piece in range(first, tl.load(piece_end + row)):
                acc += tl.load(partial + piece * d + columns, mask=live_d, other=0.0)
        else:
            acc = _gather(hi, lo, col, x, value, col_scale, source, columns, d, acc, BLOCK_E)
        if row_scale is not None:
            acc *= tl.load(row_scale + row)
        if add is not None:
            acc += tl.load(add + row * d + columns, mask=live_d, other=0.0).to(acc.dtype)
        acc = acc / divisor
        tl.store(out + row * d + columns, acc.to(out.dtype.element_ty), mask=live_d)


@triton.jit
def _mark_neighbours(rowptr, col, rows, flags, BLOCK_E: tl.constexpr):
    row = tl.load(rows + tl.program_id(0))
    lo = tl.load(rowptr + row)
    hi = tl.load(rowptr + row + 1)
    for start in range(lo, hi, BLOCK_E):
        entry = start + tl.arange(0, BLOCK_E).to(tl.int64)
        live = entry < hi
        c = tl.load(col + entry, mask=live, other=0).to(tl.int64)
        tl.store(flags + c, tl.full([BLOCK_E], 1, tl.uint8), mask=live)


@triton.jit
def _sddmm(
    rows, col, a, b, row_scale, col_scale, out, nnz, d,
    DOUBLE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    live = entry < nnz
    r = tl.load(rows + entry, mask=live, other=0)
    c = tl.load(col + entry, mask=live, other=0).to(tl.int64)
    acc = tl.zeros([BLOCK_E], tl.float64 if DOUBLE else tl.float32)
    for start in range(0, d, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        mask = live[:, None] & (columns < d)[None, :]
        left = tl.load(a + r[:, None] * d + columns[None, :], mask=mask, other=0.0).to(acc.dtype)
        right = tl.load(b + c[:, None] * d + columns[None, :], mask=mask, other=0.0).to(acc.dtype)
        acc += tl.sum(left * right, 1)
    if row_scale is not None:
        acc *= tl.load(row_scale + r, mask=live, other=0.0)
    if col_scale is not None:
        acc *= tl.load(col_scale + c, mask=live, other=0.0)
    tl.store(out + entry, acc, mask=live)


_SHAPES = [
    triton.Config({"BLOCK_E": 16}, num_warps=2),
    triton.Config({"BLOCK_E": 8}, num_warps=1),
    triton.Config({"BLOCK_E": 32}, num_warps=4),
]
launch.tuned(_spmm_rows, _SHAPES, ["d", "DEGREE"])
launch.tuned(_spmm_pieces, _SHAPES, ["d", "DEGREE"])
launch.tuned(_sddmm, _SHAPES[::2], ["d"])
launch.tuned(_mark_neighbours, [triton.Config({"BLOCK_E": 128}, num_warps=1)], [])


def spmm_plan(rowptr: Tensor, nnz: int) -> Tensor:
    """What `plan` gives as one tensor, to be kept with the graph, and after it as many zeros as the bucket of the degree
    quantile: a number that is known from a shape needs no sync, nor do launches that are traced."""
    pieces = plan(rowptr, nnz) or ()
    return torch.cat([*pieces, rowptr.new_zeros(launch.degree_bucket(launch.degree_quantile(rowptr)))])


def _cut(rowptr: Tensor, nnz: int, kept: Tensor | None) -> tuple[tuple[Tensor, Tensor] | None, int]:
    """The pieces, and the bucket that keys the search for a configuration: of the quantile if `kept`, else of the mean."""
    n = rowptr.numel() - 1
    if kept is None:
        return plan(rowptr, nnz), launch.degree_bucket(nnz // max(1, n))
    count = nnz // SPLIT if nnz > SPLIT and n > 0 else 0
    pieces = (kept[:count], kept[count : count + n]) if count else None
    return pieces, kept.numel() - (count + n if count else 0)


def plan(rowptr: Tensor, nnz: int) -> tuple[Tensor, Tensor] | None:
    """How rows longer than SPLIT are cut: `(piece_row [nnz // SPLIT], piece_end [n])`. Pieces of row r are numbered
    `piece_end[r-1] .. piece_end[r]-1`; unused pieces have row n. None where no row can be that long."""
    if nnz <= SPLIT or rowptr.numel() < 2:
        return None
    pieces = (rowptr.diff() - 1).clamp(min=0) // SPLIT
    piece_end = pieces.cumsum(0)
    return torch.searchsorted(piece_end, torch.arange(nnz // SPLIT, device=rowptr.device), right=True), piece_end


def product(
    rowptr: Tensor, col: Tensor, x: Tensor, value: Tensor | None, row_scale: Tensor | None, col_scale: Tensor | None,
    cut: tuple[tuple[Tensor, Tensor] | None, int], *, add: Tensor | None = None, divisor: int = 1, source: Tensor | None = None,
    needed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`(add + row_scale * sum_j value * col_scale * x[col]) / divisor`, `[n, d]`. Rows of x whose `source` flag is 0
    count as zero and are not read; rows whose `needed` flag is 0 are left unwritten."""
    n, d = rowptr.numel() - 1, x.shape[1]
    out = x.new_empty(n, d)
    if n == 0 or d == 0:
        return out
    pieces, degree = cut
    block_d = launch.block(d, 16, 128)
    blocks = triton.cdiv(d, block_d)
    piece_row = piece_end = partial = None
    if pieces is not None:
        piece_row, piece_end = pieces
        partial = x.new_empty(piece_row.numel(), d, dtype=launch.accumulate_type(x.dtype))
        kernel = launch.choose(_spmm_pieces)
        wrap_triton(kernel)[(piece_row.numel(), blocks)](
            rowptr, col, x, value, col_scale, source, needed, piece_row, piece_end, partial, n, d, degree,
            SPLIT=SPLIT, BLOCK_D=block_d,
        )  # fmt: skip
    rows = launch.choose(_spmm_rows)
    wrap_triton(rows)[(n, blocks)](
        rowptr, col, x, value, row_scale, col_scale, source, needed, add, piece_end, partial, out, d, divisor, degree,
        SPLIT=SPLIT, DOUBLE=x.dtype == torch.float64, BLOCK_D=block_d,
    )  # fmt: skip
    return out


def spmm(
    rowptr: Tensor,
    col: Tensor,
    x: Tensor,
    value: Tensor | None,
    row_scale: Tensor | None,
    col_scale: Tensor | None,
    t_rowptr: Tensor | None,
    t_col: Tensor | None,
    plan: Tensor | None = None,
    t_plan: Tensor | None = None,
) -> Tensor:
    """`out[r] = row_scale[r] * sum_j value[j] * col_scale[col[j]] * x[col[j]]`. The transpose is for the backward."""
    launch.check_index(col, x.shape[0], "col")
    return product(rowptr, col, x, value, row_scale, col_scale, _cut(rowptr, col.numel(), plan))


def entry_rows(rowptr: Tensor, nnz: int) -> Tensor:
    """The row of every entry, int64 `[nnz]`."""
    rows = torch.arange(rowptr.numel() - 1, device=rowptr.device)
    return torch.repeat_interleave(rows, rowptr.diff(), output_size=nnz)


def sddmm(
    rowptr: Tensor, col: Tensor, a: Tensor, b: Tensor, row_scale: Tensor | None, col_scale: Tensor | None
) -> Tensor:
    """`out[j] = row_scale[r] * col_scale[col[j]] * <a[r], b[col[j]]>`: the gradient of `value`."""
    launch.check_index(col, b.shape[0], "col")
    nnz, d = col.numel(), a.shape[1]
    out = a.new_empty(nnz, dtype=launch.accumulate_type(a.dtype))
    if nnz == 0:
        return out
    kernel = launch.choose(_sddmm)
    wrap_triton(kernel)[lambda meta: (triton.cdiv(nnz, meta["BLOCK_E"]),)](
        entry_rows(rowptr, nnz), col, a, b, row_scale, col_scale, out, nnz, d,
        DOUBLE=a.dtype == torch.float64, BLOCK_D=launch.column_block(a),
    )  # fmt: skip
    return out


def csr_transpose(rowptr: Tensor, col: Tensor, num_cols: int) -> tuple[Tensor, Tensor, Tensor]:
    """`(rowptr, col, perm)` of the transposed pattern; entry j of it is entry `perm[j]` of the given one."""
    launch.check_index(col, num_cols, "col")
    by_col, perm = torch.sort(col, stable=True)
    bounds = torch.arange(num_cols + 1, device=col.device, dtype=col.dtype)
    return torch.searchsorted(by_col, bounds), entry_rows(rowptr, col.numel())[perm].to(col.dtype), perm


def _flags(index: Tensor, size: int) -> Tensor:
    ones = torch.ones(index.shape, dtype=torch.uint8, device=index.device)
    return torch.zeros(size, dtype=torch.uint8, device=index.device).scatter_(0, index, ones)


def _neighbours(rowptr: Tensor, col: Tensor, rows: Tensor, flags: Tensor) -> Tensor:
    """Sets the flags of all neighbours of `rows`."""
    if rows.numel():
        mark = launch.choose(_mark_neighbours)
        wrap_triton(mark)[(rows.numel(),)](rowptr, col, rows, flags)
    return flags


def propagate(
    rowptr: Tensor,
    col: Tensor,
    scale: Tensor,
    x: Tensor,
    num_layers: int,
    rows: Tensor | None,
    plan: Tensor | None = None,
) -> Tensor:
    """`1/(L+1) * sum_l Â^l x` in Horner's form, `h <- x + Â h`; the last layer for `rows` only, the one before for
    their neighbours only."""
    launch.check_index(col, x.shape[0], "col")
    if rows is not None:
        launch.check_index(rows, x.shape[0], "rows")
    if num_layers == 0:
        return x.clone() if rows is None else x[rows]
    cut, h = _cut(rowptr, col.numel(), plan), x
    for layer in range(1, num_layers + 1):
        needed = None
        if rows is not None and layer == num_layers:
            needed = _flags(rows, x.shape[0])
        elif rows is not None and layer == num_layers - 1:
            needed = _neighbours(rowptr, col, rows, torch.zeros_like(scale, dtype=torch.uint8))
        divisor = num_layers + 1 if layer == num_layers else 1
        h = product(rowptr, col, h, None, scale, scale, cut, add=x, divisor=divisor, needed=needed)
    return h if rows is None else h[rows]


def propagate_backward(
    rowptr: Tensor,
    col: Tensor,
    scale: Tensor,
    grad: Tensor,
    num_layers: int,
    rows: Tensor | None,
    plan: Tensor | None = None,
) -> Tensor:
    """Â is symmetric: the same operator, and with `rows` its first layer gathers from them only."""
    if rows is None:
        return propagate(rowptr, col, scale, grad, num_layers, None, plan)
    launch.check_index(rows, scale.shape[0], "rows")
    wide = grad.to(launch.accumulate_type(grad.dtype))  # repeated rows add up before anything is rounded
    g = wide.new_zeros(scale.shape[0], grad.shape[1]).index_add(0, rows, wide)
    h, source = g, _flags(rows, scale.shape[0])
    cut = _cut(rowptr, col.numel(), plan)
    for layer in range(1, num_layers + 1):
        divisor = num_layers + 1 if layer == num_layers else 1
        h = product(rowptr, col, h, None, scale, scale, cut, add=g, divisor=divisor, source=source)
        source = None
    return h.to(grad.dtype)
