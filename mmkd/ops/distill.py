"""The student's whole loss in one call: BPR, PairKD, ListKD and EmbKD over one table, and one gradient for it."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkd import backends, reference
from mmkd.ops._checks import (
    accumulate_type,
    check_floating,
    check_index,
    check_no_grad,
    check_rank,
    check_same_device,
    check_shape,
    dense,
    loss_weights,
    vector,
)
from mmkd.ops._registry import call, differentiable_loss, on_register
from mmkd.ops.bpr_kd import KINDS, bpr_loss, bpr_pair_kd_loss
from mmkd.ops.emb_kd import emb_kd_loss
from mmkd.ops.list_kd import WEIGHTS, list_kd_loss

SETTINGS = ("pair_tau", "pair_kind", "alpha", "beta", "list_tau", "list_weight", "gamma")  # in the reference's order


def distill_loss(
    table: Tensor, num_users: int, users: Tensor, candidates: Tensor, teacher_margin: Tensor | None = None,
    teacher_logits: Tensor | None = None, nodes: Tensor | None = None, targets: Tensor | None = None, *,
    weights: tuple[float, float, float, float] = (1.0, 0.1, 0.1, 0.01), pair_tau: float = 1.0,
    pair_kind: str = "bernoulli", alpha: float = 1.0, beta: float = 1.0, list_tau: float = 1.0,
    list_weight: str = "coupled", gamma: float = 2.0, list_modalities: Tensor | None = None,
    emb_modalities: Tensor | None = None, impl: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The student's loss without its L2 term (paper, Eq. 12):

        w_0 BPR + w_1 PairKD + w_2 ListKD + w_3 EmbKD

    of `bpr_loss`, `pair_kd_loss`, `list_kd_loss` and `emb_kd_loss`, with observed item and BPR's negative the first two
    candidates. Scores are taken once for all of them, and each row of the table's gradient is written once, on the way
    forward; a backward pass hands it over. A part is left out where its weight is 0.

    Args:
        table: `[n, d]`, float32, float64, bfloat16 or float16: users, then items; what `propagate(rows=...)` gives.
        num_users: how many of its rows are users.
        users: int64 `[B]`, rows of the users. candidates: int64 `[B, K]`, `K >= 2`, counted from the first item.
        teacher_margin: `[B]`, for PairKD. teacher_logits: `[M, B, K]` or `[B, K]`, for ListKD. Both get gradients if they ask.
        nodes: int64 `[k]`, rows of the table that EmbKD looks at, repeats allowed. targets: `[M, k, d]` or `[k, d]`, the table's
            dtype, what they are to point at; get gradients if they ask.
        weights: of the four, `>= 0`; the defaults are those of `mmkd train`.
        pair_tau, pair_kind, alpha, beta, list_tau, list_weight, gamma: as the losses' own `tau`, `kind`, `weight`, `gamma`.
        list_modalities, emb_modalities: `[M]`, weights of the modalities in ListKD (1/M each if not given) and in EmbKD (1).
        impl: `auto`, `reference`, `cpp` (float32 and float64, at most 16 modalities in EmbKD) or `cuda`. `auto` is :func:`composed`
            in 16 bits on a CPU, in float16 on a GPU (gradients made for an incoming 1 would be rounded before a loss scale
            reaches them) and where there is no kernel. Under `torch.use_deterministic_algorithms` a GPU composes whatever is
            asked for: the kernel adds by atomics.

    Returns:
        The loss, a scalar (float32; float64 for float64 tables), and `[4]`, BPR, PairKD, ListKD and EmbKD, unweighted,
        without gradient, 0 where the weight is 0.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, range or device (named). RuntimeError: an index out
        of range; a second derivative (of a kernel).
    """
    arguments = _checked(
        table, num_users, users, candidates, teacher_margin, teacher_logits, nodes, targets, weights, list_modalities,
        emb_modalities,
    )  # fmt: skip
    settings = checked_settings(pair_tau, pair_kind, alpha, beta, list_tau, list_weight, gamma)
    sixteen = table.dtype not in (torch.float32, torch.float64)
    if impl == "cpp" and sixteen:
        raise TypeError(f"table: expected float32 or float64 for impl='cpp', got {table.dtype}")
    if impl == "auto" and not _fusible(table):
        return composed(*arguments, *settings)
    which = backends.resolve("distill", table, impl)
    if which == "cuda" and torch.are_deterministic_algorithms_enabled():
        return composed(*arguments, *settings)
    if which == "reference":
        *tensors, by, list_modalities, emb_modalities = arguments
        return reference.distill(*tensors, by, *settings, list_modalities, emb_modalities)
    return _fused(which, *arguments, *settings)


def _fusible(table: Tensor) -> bool:
    """Whether there is a kernel for all losses of such a table at once."""
    kind = table.device.type
    if kind == "cpu":
        return table.dtype in (torch.float32, torch.float64)
    return kind == "cuda" and table.dtype != torch.float16 and backends.why_not("distill", "cuda", kind) is None


def _fused(
    which, table, num_users, users, candidates, margin, logits, nodes, targets, weights, list_m, emb_m, pair_tau,
    pair_kind, alpha, beta, list_tau, list_weight, gamma,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grad = torch.is_grad_enabled()
    need = [grad and t is not None and t.requires_grad for t in (table, margin, logits, targets)]
    tensors = (None if t is None else dense(t) for t in (margin, logits, nodes, targets))
    loss, terms, *_ = call(
        which, "distill", dense(table), int(num_users), dense(users), dense(candidates), *tensors, list_m, emb_m,
        *map(float, weights),
        *schema_settings(pair_tau, pair_kind, alpha, beta, list_tau, list_weight, gamma), *need,
    )  # fmt: skip
    return loss, terms.detach()


def checked_settings(
    pair_tau: float, pair_kind: str, alpha: float, beta: float, list_tau: float, list_weight: str, gamma: float
) -> tuple:
    """The losses' settings in the reference's order, or the error that names the one that is wrong."""
    if pair_kind not in KINDS:
        raise ValueError(f"pair_kind: expected one of {', '.join(KINDS)}, got {pair_kind!r}")
    if list_weight not in WEIGHTS:
        raise ValueError(f"list_weight: expected one of {', '.join(WEIGHTS)}, got {list_weight!r}")
    _check_numbers(pair_tau=pair_tau, list_tau=list_tau, alpha=alpha, beta=beta, gamma=gamma)
    return pair_tau, pair_kind, alpha, beta, list_tau, list_weight, gamma


def schema_settings(
    pair_tau: float, pair_kind: str, alpha: float, beta: float, list_tau: float, list_weight: str, gamma: float
) -> tuple:
    """The same as the kernels take them."""
    numbers = float(alpha), float(beta), float(list_tau)
    return float(pair_tau), pair_kind == "bernoulli", *numbers, list_weight == "coupled", float(gamma)


def composed(
    table, num_users, users, candidates, margin, logits, nodes, targets, weights, list_m, emb_m, pair_tau, pair_kind,
    alpha, beta, list_tau, list_weight, gamma,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same from the ops of the single losses: any device, any dtype."""
    user_emb, item_emb = table.split([num_users, len(table) - num_users])
    terms: list[Tensor | None] = [None] * 4
    pair = user_emb, item_emb, users, candidates[:, 0], candidates[:, 1]
    if weights[1]:
        terms[:2] = bpr_pair_kd_loss(*pair, margin, tau=pair_tau, kind=pair_kind)
    elif weights[0]:
        terms[0] = bpr_loss(*pair)
    if weights[2]:
        terms[2] = list_kd_loss(
            user_emb, item_emb, users, candidates, logits, alpha=alpha, beta=beta, tau=list_tau, weight=list_weight,
            modality_weights=list_m,
        )  # fmt: skip
    if weights[3]:
        terms[3] = emb_kd_loss(table.index_select(0, nodes), targets, gamma=gamma, modality_weights=emb_m)
    acc = accumulate_type(table.dtype)
    kept = [t if w else None for w, t in zip(weights, terms, strict=True)]
    zero = table.new_zeros((), dtype=acc) if any(weights) else table[:0].sum(dtype=acc)  # still part of the graph
    loss = sum((w * t for w, t in zip(weights, kept, strict=True) if t is not None), zero)
    return loss, torch.stack([(zero if t is None else t).detach() for t in kept])


def _checked(
    table, num_users, users, candidates, teacher_margin, teacher_logits, nodes, targets, weights, list_m, emb_m
) -> tuple:
    """The arguments, conformed: what a part of weight 0 would take is left out."""
    check_batch(table, num_users, users, candidates)
    weights = checked_weights(weights)
    _check_there(weights, teacher_margin, teacher_logits, nodes, targets)
    acc = accumulate_type(table.dtype)
    margin, logits, nodes, targets = (
        _teacher_margin(teacher_margin, users, acc) if weights[1] else None,
        _teacher_logits(teacher_logits, candidates, acc) if weights[2] else None,
        nodes if weights[3] else users.new_empty(0),
        _targets(targets, nodes, table) if weights[3] else None,
    )
    if not weights[2]:
        candidates = candidates[:, :2]
    at = (("users", users), ("candidates", candidates), ("teacher_margin", margin), ("teacher_logits", logits))
    check_same_device(("table", table), *at, ("nodes", nodes), ("targets", targets))
    heads, aims = (0 if t is None else len(t) for t in (logits, targets))
    list_m = modality_weights(list_m, "list_modalities", heads, table, 1.0 / max(1, heads))
    emb_m = modality_weights(emb_m, "emb_modalities", aims, table, 1.0)
    return table, num_users, users, candidates, margin, logits, nodes, targets, weights, list_m, emb_m


def check_batch(table: Tensor, num_users: int, users: Tensor, candidates: Tensor) -> None:
    """A table of users, then items, and a batch of lists over it."""
    check_floating(table, "table")
    check_rank(table, "table", 2)
    check_lists(len(table), "table", num_users, users, candidates)


def check_lists(count: int, of: str, num_users: int, users: Tensor, candidates: Tensor) -> None:
    """A batch of lists over `count` rows of the argument `of`, users, then items."""
    if isinstance(num_users, bool) or not hasattr(num_users, "__index__"):
        raise TypeError(f"num_users: expected an int, got {type(num_users).__name__}")
    if not 0 <= num_users <= count:
        raise ValueError(f"num_users: expected 0 to {count}, the rows of {of}, got {num_users}")
    check_index(users, "users")
    check_index(candidates, "candidates", rank=2)
    check_shape(candidates, "candidates", (len(users), candidates.shape[1]))
    if candidates.shape[1] < 2:
        raise ValueError(
            f"candidates: expected K >= 2, the observed item and a negative, got K = {candidates.shape[1]}"
        )


def checked_weights(weights) -> tuple[float, float, float, float]:
    return loss_weights(weights, "four", ("BPR", "PairKD", "ListKD", "EmbKD"))


def _check_there(weights, teacher_margin, teacher_logits, nodes, targets) -> None:
    wanted = (
        (1, "teacher_margin", teacher_margin), (2, "teacher_logits", teacher_logits), (3, "nodes", nodes),
        (3, "targets", targets),
    )  # fmt: skip
    for place, name, t in wanted:
        if weights[place] and t is None:
            raise ValueError(f"{name}: expected a tensor, got None; without one, weights[{place}] is to be 0")


def _check_numbers(**numbers: float) -> None:
    for name, number in numbers.items():
        least = 1 if name == "gamma" else 0
        if not (number > 0 if name.endswith("tau") else number >= least):
            raise ValueError(f"{name}: expected {'> 0' if name.endswith('tau') else f'>= {least}'}, got {number}")


def _teacher_margin(t: Tensor, users: Tensor, acc: torch.dtype) -> Tensor:
    check_floating(t, "teacher_margin")
    check_shape(t, "teacher_margin", tuple(users.shape))
    return t.to(acc)


def _teacher_logits(t: Tensor, candidates: Tensor, acc: torch.dtype) -> Tensor:
    check_floating(t, "teacher_logits")
    t = t.unsqueeze(0) if t.dim() == 2 else t
    check_rank(t, "teacher_logits", 3)
    check_shape(t, "teacher_logits", (t.shape[0], *candidates.shape))
    return t.to(acc)


def _targets(t: Tensor, nodes: Tensor, table: Tensor) -> Tensor:
    check_index(nodes, "nodes")
    t = t.unsqueeze(0) if isinstance(t, Tensor) and t.dim() == 2 else t
    check_floating(t, "targets", table.dtype)
    check_rank(t, "targets", 3)
    check_shape(t, "targets", (t.shape[0], len(nodes), table.shape[1]))
    return t


def modality_weights(t: Tensor | None, name: str, count: int, table: Tensor, otherwise: float) -> Tensor:
    """`[count]` in the accumulator type; `otherwise` where none are given."""
    if t is not None:
        check_floating(t, name)
    check_no_grad(t, name)
    acc = accumulate_type(table.dtype)
    if t is None or not count:
        return table.new_full((count,), otherwise, dtype=acc)
    check_same_device(("table", table), (name, t))
    return vector(t, name, count, acc)


def modalities_of(
    content: Tensor, table: Tensor, list_modalities: Tensor | None, emb_modalities: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The weights that a teacher's modalities have in ListKD and in EmbKD, as the kernels take them."""
    heads = len(content)
    return (
        modality_weights(list_modalities, "list_modalities", heads, table, 1.0 / max(1, heads)),
        modality_weights(emb_modalities, "emb_modalities", heads, table, 1.0),
    )


@on_register
def _register(ns: str, ops) -> None:
    if not hasattr(ops, "distill"):
        return

    def fake(table, num_users, users, candidates, margin, logits, nodes, targets, *rest):
        acc = accumulate_type(table.dtype)
        by = 1.0, *rest[3:6]  # the weights of PairKD, ListKD and EmbKD
        like = zip((table, margin, logits, targets), by, (table.dtype, acc, acc, table.dtype), rest[-4:], strict=True)
        grads = (
            table.new_empty(t.shape if need and w and t is not None else (0,), dtype=dtype)
            for t, w, dtype, need in like
        )
        return table.new_empty((), dtype=acc), table.new_empty(4, dtype=acc), *grads

    torch.library.register_fake(f"{ns}::distill", fake)
    differentiable_loss(ns, "distill", (0, 4, 5, 7))  # table, margin, logits, targets
