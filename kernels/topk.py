"""Exact top-k by inner product in Triton; the scores are never stored.

Items are taken in groups of 32. The k groups with the largest maxima (ties: lower group first) hold the k best items:
any item outside them is beaten by k maxima. So one kernel keeps the maximum of each group, torch picks k groups, and a
second kernel scores those again. A score and its id are packed into one 64-bit key whose order is "higher score first,
then lower id". Excluded items are a bit mask, one word a group.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from mmkd.kernels import launch

GROUP = 32
# Users at a time: at most CHUNK, and what is alive of them at most ALIVE numbers.
CHUNK, ALIVE = 8192, 2**25
EMPTY = -(2**63)


@triton.jit
def _exclude(rowptr, col, users, mask, words, items, BLOCK_E: tl.constexpr):
    """Sets the bits of one user's excluded items; mask: int32 `[n, words]`."""
    n = tl.program_id(0).to(tl.int64)
    user = n
    if users is not None:
        user = tl.load(users + n)
    lo = tl.load(rowptr + user)
    hi = tl.load(rowptr + user + 1)
    for start in range(lo, hi, BLOCK_E):
        entry = start + tl.arange(0, BLOCK_E).to(tl.int64)
        item = tl.load(col + entry, mask=entry < hi, other=-1).to(tl.int64)
        bit = tl.full([BLOCK_E], 1, tl.int32) << (item & 31).to(tl.int32)
        tl.atomic_or(mask + n * words + (item >> 5), bit, mask=(item >= 0) & (item < items), sem="relaxed")


@triton.jit
def _key(s, keep, number):
    """Orders by score, then by lower number; what is not kept, -inf and NaN come last of all."""
    bits = tl.where(s == 0, 0.0, s).to(tl.int32, bitcast=True)  # -0 ties with 0
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    return tl.where(keep & (s > float("-inf")), (ordered << 32) | (0xFFFFFFFF - number), -(2**63))


@triton.jit
def _group_maxima(
    user_emb, item_emb, users, mask, keys, count, items, groups, d,
    WIDEN: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """keys: int64 `[count, groups]`, the best score of each group and the group's number."""
    PER: tl.constexpr = BLOCK_I // 32
    # one axis, users first: the other axes of a grid end at 65535
    across = tl.cdiv(count, BLOCK_U)
    tile = (tl.program_id(0) // across).to(tl.int64)
    n = (tl.program_id(0) % across).to(tl.int64) * BLOCK_U + tl.arange(0, BLOCK_U)
    live_u = n < count
    user = n
    if users is not None:
        user = tl.load(users + n, mask=live_u, other=0)
    i = tile * BLOCK_I + tl.arange(0, BLOCK_I)
    live_i = i < items
    s = tl.zeros([BLOCK_U, BLOCK_I], tl.float32)
    for start in range(0, d, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        live_d = columns < d
        e = tl.load(user_emb + user[:, None] * d + columns[None, :], mask=live_u[:, None] & live_d[None, :], other=0.0)
        f = tl.load(item_emb + i[:, None] * d + columns[None, :], mask=live_i[:, None] & live_d[None, :], other=0.0)
        if WIDEN:
            e = e.to(tl.float32)
            f = f.to(tl.float32)
        s = tl.dot(e, tl.trans(f), s, input_precision="ieee")
    keep = live_u[:, None] & live_i[None, :] & (s == s)
    s = tl.reshape(tl.where(keep, s, float("-inf")), [BLOCK_U, PER, 32])
    g = tile * PER + tl.arange(0, PER)
    place = n[:, None] * groups + g[None, :]
    live = live_u[:, None] & (g < groups)[None, :]
    if mask is not None:
        word = tl.load(mask + place, mask=live, other=0)
        bit = (word[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
        s = tl.where(bit == 0, s, float("-inf"))
    tl.store(keys + place, _key(tl.max(s, 2), live, g[None, :]), mask=live)


@triton.jit
def _score_groups(
    user_emb, item_emb, users, mask, picked, keys, items, groups, wanted, d, BLOCK_D: tl.constexpr
):  # fmt: skip
    """keys: int64 `[count, wanted, 32]`, score and id of every item of the picked groups (-1: none)."""
    slot = tl.program_id(0).to(tl.int64)
    n = slot // wanted
    g = tl.load(picked + slot)
    user = n
    if users is not None:
        user = tl.load(users + n)
    bit = tl.arange(0, 32)
    i = g * 32 + bit
    keep = (i >= 0) & (i < items)  # g = -1: none
    s = tl.zeros([32], tl.float32)
    for start in range(0, d, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        live_d = columns < d
        e = tl.load(user_emb + user * d + columns, mask=live_d, other=0.0).to(tl.float32)
        f = tl.load(item_emb + i[:, None] * d + columns[None, :], mask=keep[:, None] & live_d[None, :], other=0.0)
        s += tl.sum(e[None, :] * f.to(tl.float32), 1)
    if mask is not None:
        word = tl.load(mask + n * groups + g, mask=g >= 0, other=0)
        keep = keep & (((word >> bit) & 1) == 0)
    tl.store(keys + slot * 32 + bit, _key(s, keep, i))


launch.tuned(_exclude, [triton.Config({"BLOCK_E": 64}, num_warps=1)], [])
launch.tuned(
    _group_maxima,
    [triton.Config({"BLOCK_U": u, "BLOCK_I": i}, num_warps=w) for u, i, w in ((64, 64, 4), (64, 128, 8))],
    ["d"],
)
launch.tuned(_score_groups, [triton.Config({}, num_warps=w) for w in (2, 1)], ["d"])


def _excluded(rowptr: Tensor, col: Tensor, users: Tensor | None, count: int, items: int) -> Tensor:
    words = triton.cdiv(items, GROUP)
    mask = torch.zeros(count, words, dtype=torch.int32, device=rowptr.device)
    kernel = launch.choose(_exclude)
    wrap_triton(kernel)[(count,)](rowptr, col, users, mask, words, items)
    return mask


def _fused(
    user_emb: Tensor, item_emb: Tensor, k: int, users: Tensor | None, mask: Tensor | None, count: int
) -> tuple[Tensor, Tensor]:
    items, d = item_emb.shape
    groups = triton.cdiv(items, GROUP)
    maxima = torch.empty(count, groups, dtype=torch.int64, device=user_emb.device)
    kernel = launch.choose(_group_maxima)
    wrap_triton(kernel)[lambda meta: (triton.cdiv(count, meta["BLOCK_U"]) * triton.cdiv(items, meta["BLOCK_I"]),)](
        user_emb, item_emb, users, mask, maxima, count, items, groups, d,
        WIDEN=launch.INTERPRETED,  # the interpreter's dot takes bfloat16 for integers
        BLOCK_D=launch.block(d, 16, 64 // item_emb.element_size()),
    )  # fmt: skip
    wanted = min(k, groups)
    best = torch.topk(maxima, wanted, dim=1).values  # keys are distinct or EMPTY: no ties to break
    picked = (0xFFFFFFFF - (best & 0xFFFFFFFF)).masked_fill(best == EMPTY, -1)
    keys = torch.empty(count, wanted * GROUP, dtype=torch.int64, device=user_emb.device)
    kernel = launch.choose(_score_groups)
    wrap_triton(kernel)[(count * wanted,)](
        user_emb, item_emb, users, mask, picked, keys, items, groups, wanted, d,
        BLOCK_D=launch.column_block(item_emb, 64),
    )  # fmt: skip
    best = torch.topk(keys, k, dim=1).values
    ordered = (best >> 32).to(torch.int32)
    scores = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    ids = 0xFFFFFFFF - (best & 0xFFFFFFFF)
    return scores.masked_fill(best == EMPTY, float("-inf")), ids.masked_fill(best == EMPTY, -1)


def _sorted(
    user_emb: Tensor, item_emb: Tensor, k: int, users: Tensor | None, mask: Tensor | None, count: int
) -> tuple[Tensor, Tensor]:
    acc = launch.accumulate_type(user_emb.dtype)
    rows = user_emb[:count] if users is None else user_emb[users]
    scores = rows.to(acc) @ item_emb.to(acc).T
    scores = scores.masked_fill(scores.isnan(), float("-inf"))
    if mask is not None:
        i = torch.arange(item_emb.shape[0], device=mask.device)
        scores = scores.masked_fill(((mask[:, i >> 5] >> (i & 31)) & 1) != 0, float("-inf"))
    best, ids = scores.sort(dim=1, descending=True, stable=True)
    best, ids = best[:, :k], ids[:, :k]
    return best, ids.masked_fill(best == float("-inf"), -1)


def _users_at_a_time(items: int, k: int, whole: bool) -> int:
    """`whole`: all scores of a user are alive at once, not the maxima and the picked groups alone."""
    groups = triton.cdiv(items, GROUP)
    return max(1, min(CHUNK, ALIVE // (items if whole else groups + min(k, groups) * GROUP)))


def topk(
    user_emb: Tensor, item_emb: Tensor, k: int, users: Tensor | None, rowptr: Tensor | None, col: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scores and item ids `[n, k]`, best first, ties by lower id; -inf and -1 where fewer than k are left."""
    items, count = item_emb.shape[0], user_emb.shape[0] if users is None else users.numel()
    if users is not None:
        launch.check_index(users, user_emb.shape[0], "users")
    acc = launch.accumulate_type(user_emb.dtype)
    found = min(k, items)
    scores = torch.full((count, k), float("-inf"), dtype=acc, device=user_emb.device)
    ids = torch.full((count, k), -1, dtype=torch.int64, device=user_emb.device)
    if found == 0:
        return scores, ids
    select = _sorted if acc == torch.float64 or items > 2**31 - 1 else _fused
    step = _users_at_a_time(items, found, select is _sorted)
    for begin in range(0, count, step):
        end = min(count, begin + step)
        rows = user_emb if users is not None else user_emb[begin:end]
        chunk = None if users is None else users[begin:end]
        bounds = rowptr if rowptr is None or users is not None else rowptr[begin : end + 1]
        mask = None if bounds is None else _excluded(bounds, col, chunk, end - begin, items)
        scores[begin:end, :found], ids[begin:end, :found] = select(rows, item_emb, found, chunk, mask, end - begin)
    return scores, ids
