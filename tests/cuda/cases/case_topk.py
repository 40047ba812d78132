"""topk: the CUDA kernel's own source against an exact ranking."""

from __future__ import annotations

import pytest
import torch
from budget import DTYPES

from mmkd import ops


def expected(user_emb, item_emb, k, users, exclude):
    """The ranking in float64; the tables hold small integers, so that scores are exact in every dtype and ties many."""
    scores = user_emb.double()[users] @ item_emb.double().T
    for row, u in enumerate(users.tolist()):
        if exclude is not None:
            scores[row, exclude[1][exclude[0][u] : exclude[0][u + 1]].long()] = -torch.inf
    order = torch.argsort(scores, dim=1, descending=True, stable=True)[:, :k]
    best = scores.gather(1, order)
    ids = torch.where(best == -torch.inf, -1, order)
    pad = k - best.shape[1]
    if pad > 0:
        best = torch.nn.functional.pad(best, (0, pad), value=-torch.inf)
        ids = torch.nn.functional.pad(ids, (0, pad), value=-1)
    return best, ids


def integers(n, d, dtype, high=3):
    return torch.randint(-high, high + 1, (n, d)).to(dtype)


def exclusions(users, items, per_row=7, index=torch.int32):
    col = torch.cat([torch.randperm(items)[:per_row] for _ in range(users)]).to(index)
    return torch.arange(users + 1) * per_row, col


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 7, 32, 64, 65, 128])
def case_topk(dtype, d, schedules):
    num_users, num_items, k = 70, 150, 20
    u, i = integers(num_users, d, dtype, 2), integers(num_items, d, dtype, 2)
    users = torch.randint(0, num_users, (67,))
    exclude = exclusions(num_users, num_items, index=torch.int64 if d == 7 else torch.int32)
    scores, ids = expected(u, i, k, users, exclude)
    for mine in schedules(lambda: ops.topk(u, i, k, users, exclude), seeds=(1,) if d > 32 else (1, 2)):
        assert torch.equal(mine[1], ids)
        assert torch.equal(mine[0].double(), scores)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [7, 64])
def case_long_lists(dtype, d, schedules):
    """More than 128 entries are kept in order as they come."""
    u, i = integers(9, d, dtype, 2), integers(170, d, dtype, 2)
    exclude = exclusions(9, 170)
    scores, ids = expected(u, i, 130, torch.arange(9), exclude)
    for mine in schedules(lambda: ops.topk(u, i, 130, exclude=exclude), seeds=(1,)):
        assert torch.equal(mine[1], ids)
        assert torch.equal(mine[0].double(), scores)


@pytest.mark.parametrize("k", [1, 33, 100, 128, 600], ids=lambda k: f"k={k}")
def case_any_k_and_several_ranges(k, schedules):
    """2000 items are cut into ranges; lists of 600, more than there are, do not fit in shared memory."""
    u, i = integers(3, 8, torch.float32), integers(2000 if k < 600 else 300, 8, torch.float32)
    exclude = exclusions(3, len(i), 11)
    scores, ids = expected(u, i, k, torch.arange(3), exclude)
    for mine in schedules(lambda: ops.topk(u, i, k, exclude=exclude), seeds=(1,)):
        assert torch.equal(mine[1], ids)
        assert torch.equal(mine[0].double(), scores)


def case_nothing_left_nan_and_infinity():
    u = torch.tensor([[1.0], [-1.0]])
    i = torch.tensor([[float("nan")], [2.0], [float("inf")], [3.0]])
    scores, ids = ops.topk(u, i, 4)
    assert ids.tolist() == [[2, 3, 1, -1], [1, 3, -1, -1]]
    assert scores[0, 0] == float("inf") and scores[1, 2] == -float("inf")
    everything = (torch.tensor([0, 4, 4]), torch.arange(4))
    scores, ids = ops.topk(u, i, 2, torch.tensor([0]), everything)
    assert ids.tolist() == [[-1, -1]] and (scores == -float("inf")).all()


def case_no_users_and_no_items():
    assert [t.shape for t in ops.topk(torch.randn(0, 4), torch.randn(9, 4), 3)] == [(0, 3), (0, 3)]
    _, ids = ops.topk(torch.randn(2, 4), torch.randn(0, 4), 3)
    assert ids.tolist() == [[-1] * 3] * 2


def case_out_of_range_stops_the_kernel():
    with pytest.raises(RuntimeError, match="a check in the kernel failed"):
        ops.topk(torch.randn(2, 4), torch.randn(9, 4), 3, torch.tensor([2]))
