"""The student's whole loss straight from the constants of a collapsed teacher, whose features are never stored."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkd import backends, reference
from mmkd.ops._checks import check_index, check_same_device, check_shape, dense
from mmkd.ops._registry import call, differentiable_loss, on_register
from mmkd.ops.distill import (
    SETTINGS,
    check_batch,
    checked_settings,
    checked_weights,
    distill_loss,
    modalities_of,
    schema_settings,
)
from mmkd.ops.frozen_teacher import check_frozen, frozen_teacher


def distill_frozen_loss(
    table: Tensor, num_users: int, users: Tensor, candidates: Tensor, nodes: Tensor | None, content: Tensor, design: Tensor,
    ids: Tensor, omega: Tensor, state: Tensor, asked: Tensor, listed: Tensor, first_item: int, *,
    weights: tuple[float, float, float, float] = (1.0, 0.1, 0.1, 0.01), pair_tau: float = 1.0,
    pair_kind: str = "bernoulli", alpha: float = 1.0, beta: float = 1.0, list_tau: float = 1.0,
    list_weight: str = "coupled", gamma: float = 2.0, list_modalities: Tensor | None = None,
    emb_modalities: Tensor | None = None, impl: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The student's loss without its L2 term (paper, Eq. 12) where the teacher is frozen but for its prompt:

        distill_loss(table, ..., *frozen_teacher(content, ..., state, ...))

    in one pass over the batch. A few samples at a time the teacher is asked, the losses are taken, and what they want of
    the teacher goes into the gradient of `state`, while the rows are in a core's cache: they are read once, and no row of the
    teacher's features or of their gradients is stored, only margins and logits. Differentiable in `table` and `state`.

    Args:
        table, num_users, users, candidates, nodes: the student's, as in :func:`distill_loss`; nodes may be None where
            `weights[3]` is 0.
        content, design, ids, omega, state, first_item: the teacher's, as in :func:`frozen_teacher`.
        asked: int64 `[3B + n]`, the node ids of the batch's users, observed items and BPR's negatives, then of the n `nodes` (none
            where `weights[3]` is 0).
        listed: int64 `[B, K]`, the item ids of `candidates`.
        weights, pair_tau, pair_kind, alpha, beta, list_tau, list_weight, gamma, list_modalities, emb_modalities: as in
            :func:`distill_loss`.
        impl: `auto`, `reference` or `cpp` (one dtype for all, float32 or float64, at most 16 modalities in EmbKD). Off the CPU,
            and for a table of another dtype than the constants, `auto` is the two ops.

    Returns:
        The loss, a scalar, and `[4]`, BPR, PairKD, ListKD and EmbKD, unweighted, without gradient, 0 where the weight is 0.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, range or device (named). RuntimeError: an index out
        of range; a second derivative (of `impl="cpp"`).
    """
    check_batch(table, num_users, users, candidates)
    check_frozen(content, design, ids, omega, state, asked, "asked", listed, "listed", first_item)
    by = checked_weights(weights)
    settings = checked_settings(pair_tau, pair_kind, alpha, beta, list_tau, list_weight, gamma)
    nodes = checked_nodes(nodes, by, users)
    check_shape(asked, "asked", (3 * len(users) + len(nodes),))
    check_shape(listed, "listed", tuple(candidates.shape))
    check_shape(table, "table", (len(table), content.shape[2]))
    index = ("users", users), ("candidates", candidates), ("nodes", nodes)
    check_same_device(("table", table), *index, ("content", content))
    if not by[2]:
        candidates, listed = candidates[:, :2], listed[:, :0]
    student = table, num_users, users, candidates, nodes
    teacher = content, design, ids, omega, state, asked, listed, first_item
    if impl == "auto" and (table.device.type != "cpu" or table.dtype != content.dtype):
        return composed(student, teacher, by, settings, list_modalities, emb_modalities)
    if table.dtype != content.dtype:
        raise TypeError(f"table: expected {content.dtype}, as content, for impl={impl!r}, got {table.dtype}")
    modalities = modalities_of(content, table, list_modalities, emb_modalities)
    which = backends.resolve("distill_frozen", table, impl)
    if which == "reference":
        return reference.distill_frozen(*student, *teacher, by, *settings, *modalities)
    return _fused(which, student, teacher, by, settings, modalities)


def checked_nodes(nodes: Tensor | None, by, users: Tensor) -> Tensor:
    if by[3] and nodes is None:
        raise ValueError("nodes: expected a tensor, got None; without one, weights[3] is to be 0")
    nodes = nodes if by[3] else users.new_empty(0)
    check_index(nodes, "nodes")
    return nodes


def _fused(which, student, teacher, by, settings, modalities) -> tuple[Tensor, Tensor]:
    table, num_users, *index = student
    *tensors, first_item = teacher
    grad = torch.is_grad_enabled()
    need = [grad and t.requires_grad for t in (table, teacher[4])]
    loss, terms, *_ = call(
        which, "distill_frozen", dense(table), int(num_users), *map(dense, index), *map(dense, tensors), first_item,
        *modalities, *by, *schema_settings(*settings), *need,
    )  # fmt: skip
    return loss, terms.detach()


def composed(student, teacher, by, settings, list_modalities, emb_modalities) -> tuple[Tensor, Tensor]:
    """The same from the two ops: any device, a table of any dtype."""
    table, num_users, users, candidates, nodes = student
    margin, logits, targets = frozen_teacher(*teacher)
    loss, terms = distill_loss(
        table, num_users, users, candidates, margin, logits, nodes, targets.to(table.dtype), weights=by,
        list_modalities=list_modalities, emb_modalities=emb_modalities, **dict(zip(SETTINGS, settings, strict=True)),
    )  # fmt: skip
    if not any(by[1:]):
        loss = loss + teacher[4][:0].sum(dtype=loss.dtype)  # of the state too, though nothing is asked of it
    return loss, terms


@on_register
def _register(ns: str, ops) -> None:
    if not hasattr(ops, "distill_frozen"):
        return

    def fake(table, num_users, users, candidates, nodes, content, design, ids, omega, state, *rest):
        grads = (t.new_empty(t.shape if need else (0,)) for t, need in zip((table, state), rest[-2:], strict=True))
        return table.new_empty(()), table.new_empty(4), *grads

    torch.library.register_fake(f"{ns}::distill_frozen", fake)
    differentiable_loss(ns, "distill_frozen", (0, 9))  # table, state
