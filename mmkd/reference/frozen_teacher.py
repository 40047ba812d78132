"""spec section 3, the collapsed frozen teacher at a batch, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor, nn


def frozen_teacher(
    content: Tensor, design: Tensor, ids: Tensor, omega: Tensor, state: Tensor, nodes: Tensor, candidates: Tensor,
    first_item: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`F^m = C^m + K Z^m` at the nodes, the margin of `E^T`, and `F_u^m . F_i^m` of every candidate."""
    features = content[:, nodes] + design[nodes] @ state  # [M, 3B + n, d]
    count = len(candidates)
    joint = ids[nodes[: 3 * count]] + (
        omega[:, None, None] * nn.functional.normalize(features[:, : 3 * count], dim=-1)
    ).sum(0)
    user, observed, negative = joint.chunk(3)
    listed = first_item + candidates
    items = content[:, listed] + design[listed] @ state[:, None]  # [M, B, K, d]
    logits = (features[:, :count, None] * items).sum(-1)
    return (user * (observed - negative)).sum(-1), logits, features[:, 3 * count :]
