"""Table gradients without atomics: edges sorted by the row they add to, one program per row that receives any.

The losses scatter with atomics by default; under torch.use_deterministic_algorithms(True) they hand their edges here.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from mmkd.kernels import launch


@triton.jit
def _scatter_segments(
    target, order, source, weight, table, out, edges, d,
    DOUBLE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    row = tl.load(target + head)
    before = tl.load(target + head - 1, mask=head > 0, other=-1)
    if row != before:
        columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        live_d = columns < d
        acc = tl.zeros([BLOCK_D], tl.float64 if DOUBLE else tl.float32)
        start = head
        more = True
        while more:
            position = start + tl.arange(0, BLOCK_E)
            live = tl.load(target + position, mask=position < edges, other=-1) == row
            edge = tl.load(order + position, mask=live, other=0)
            w = tl.load(weight + edge, mask=live, other=0.0)
            r = tl.load(source + edge, mask=live, other=0)
            tile = tl.load(table + r[:, None] * d + columns[None, :], mask=live[:, None] & live_d[None, :], other=0.0)
            acc += tl.sum(w[:, None] * tile.to(acc.dtype), 0)
            start += BLOCK_E
            more = tl.sum(live.to(tl.int32), 0) == BLOCK_E
        tl.store(out + row * d + columns, acc.to(out.dtype.element_ty), mask=live_d)


launch.tuned(_scatter_segments, [triton.Config({"BLOCK_E": 8}, num_warps=1)], [])


def scatter_rows(like: Tensor, target: Tensor, source: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    """`out[r] = sum over edges e with target[e] = r of weight[e] * table[source[e]]`, shaped like `like`; the sum runs
    in the order of the edges. target, source: int64 `[E]`; weight: accumulator type `[E]`."""
    out = torch.zeros_like(like)
    edges, d = target.numel(), like.shape[1]
    if edges == 0 or d == 0:
        return out
    by_row, order = torch.sort(target, stable=True)
    block_d = launch.block(d, 16, 128)
    kernel = launch.choose(_scatter_segments)
    wrap_triton(kernel)[(edges, triton.cdiv(d, block_d))](
        by_row, order, source, weight, table, out, edges, d, DOUBLE=like.dtype == torch.float64, BLOCK_D=block_d
    )
    return out


def atomic_target(table: Tensor, need: bool) -> Tensor | None:
    """Zeros in the accumulator type for atomics to add to; None if the gradient is not needed."""
    return torch.zeros_like(table, dtype=launch.accumulate_type(table.dtype)) if need else None


def finished(grad: Tensor | None, table: Tensor) -> Tensor:
    """An atomic target in the table's type; an empty tensor where there is none."""
    return table.new_empty(0) if grad is None else grad.to(table.dtype)
