"""What a student's step minimises, from its table and the prompt (spec sections 2 to 4), in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkd.reference.distill_frozen import distill_frozen
from mmkd.reference.spmm import propagate, propagate_mixed


def prompt_state(stacked: Tensor, mixed: Tensor, modalities: int) -> Tensor:
    """`Z^m = V V^T S^m`, `[M, e, d]`, from `V = [W_P; b_P^T]`, `[e, k]`, and the `S^m` side by side, `[e, M d]`."""
    return torch.stack([stacked @ stacked.T @ part for part in mixed.chunk(modalities, 1)])


def student(
    rowptr: Tensor, col: Tensor, scale: Tensor, table: Tensor, num_layers: int, rows: Tensor, mixed_layers: bool,
    l2: Tensor | None, num_users: int, users: Tensor, candidates: Tensor, nodes: Tensor, content: Tensor, design: Tensor,
    ids: Tensor, omega: Tensor, prompt_weight: Tensor, prompt_bias: Tensor, mixed: Tensor, asked: Tensor, listed: Tensor,
    first_item: int, *settings,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`distill_frozen` of the propagated rows and the prompt's state, and the L2 term; the loss and its five summands.

    settings: as `distill_frozen` takes them, the four weights first.
    """
    own = (propagate_mixed if mixed_layers else propagate)(rowptr, col, scale, table, num_layers, rows)
    state = prompt_state(torch.cat([prompt_weight, prompt_bias[None]]), mixed, len(content))
    loss, terms = distill_frozen(
        own,
        num_users,
        users,
        candidates,
        nodes,
        content,
        design,
        ids,
        omega,
        state,
        asked,
        listed,
        first_item,
        *settings,
    )
    squares = own.new_zeros(()) if l2 is None else 0.5 * (l2 * table[rows].square().sum(1)).sum()
    by = terms.new_tensor(settings[0])
    return loss + squares, torch.cat([by * terms, squares.detach()[None]])
