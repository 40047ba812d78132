from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from mmkd import ops
from mmkd.kernels import topk as kernels
from tests.ops.grid import DTYPES

EXCLUDE = (torch.tensor([0, 3, 3, 10, 11]), torch.tensor([4, 0, 69, 1, 2, 3, 33, 64, 5, 6, 9], dtype=torch.int32))


def whole(*shape, dtype=torch.float32, seed=0):
    """Small whole numbers: every sum is exact, and ties are everywhere."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(user_emb, item_emb, k, users=None, exclude=None):
    ours = ops.topk(user_emb, item_emb, k, users, exclude, impl="triton")
    truth = ops.topk(user_emb, item_emb, k, users, exclude, impl="reference")
    for o, t in zip(ours, truth, strict=True):
        assert o.dtype == t.dtype
        assert torch.equal(o, t)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 7, 64, 65])
@pytest.mark.parametrize("k", [1, 5, 80])  # more than there are items
def case_grid(k, d, dtype, poison_empty):
    users = None if d == 7 else torch.tensor([2, 0, 2])
    same(whole(4, d, dtype=dtype), whole(70, d, dtype=dtype, seed=1), k, users, EXCLUDE if d != 1 else None)


def case_order_of_item_ids_in_exclude_does_not_matter():
    rowptr, col = EXCLUDE[0], EXCLUDE[1].long()
    shuffled = torch.cat([col[a:b].flip(0) for a, b in pairwise(rowptr.tolist())])
    same(whole(4, 8), whole(70, 8, seed=1), 7, None, (rowptr, shuffled))


def case_users_in_chunks(monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 3)
    same(whole(4, 8), whole(70, 8, seed=1), 4, None, EXCLUDE)
    same(whole(4, 8), whole(70, 8, seed=1), 4, torch.tensor([1, 3, 0, 2, 2]), EXCLUDE)
    monkeypatch.setattr(kernels, "ALIVE", 3 * 70)
    monkeypatch.setattr(kernels, "CHUNK", 8192)
    assert kernels._users_at_a_time(70, 4, whole=True) == 3 and kernels._users_at_a_time(70, 1, whole=False) == 6
    for dtype in (torch.float64, torch.float32):
        same(whole(4, 8, dtype=dtype), whole(70, 8, dtype=dtype, seed=1), 4, None, EXCLUDE)


def case_tables_and_k_of_millions_fit_into_a_grid(monkeypatch):
    """Only the first axis of a grid goes beyond 65535."""
    grids = {}

    class Launch:
        def __init__(self, kernel):
            self.name, self.blocks = kernel.fn.__name__, kernel.configs[0].kwargs

        def __getitem__(self, grid):
            grids[self.name] = grid(self.blocks) if callable(grid) else grid
            return lambda *args, **kwargs: None

    monkeypatch.setattr(kernels, "wrap_triton", Launch)
    user_emb, item_emb = (torch.empty(n, 64, device="meta") for n in (8, 10_000_000))
    kernels.topk(user_emb, item_emb, 100_000, None, None, None)
    assert grids["_group_maxima"] == (10_000_000 // 64,) and grids["_score_groups"] == (8 * 100_000,)


def case_everything_excluded_nothing_asked_no_items():
    all_of_them = (torch.tensor([0, 40]), torch.arange(40, dtype=torch.int32))
    scores, ids = ops.topk(whole(1, 4), whole(40, 4), 3, None, all_of_them, impl="triton")
    assert scores.eq(float("-inf")).all() and ids.eq(-1).all()
    assert ops.topk(whole(2, 4), whole(9, 4), 3, torch.empty(0, dtype=torch.int64), impl="triton")[0].shape == (0, 3)
    assert ops.topk(whole(2, 4), whole(0, 4), 3, impl="triton")[1].eq(-1).all()


def case_nan_infinity_and_minus_zero():
    items = torch.tensor([[0.0], [float("nan")], [float("inf")], [-0.0], [float("-inf")], [1.0]])
    scores, ids = ops.topk(torch.ones(1, 1), items, 6, impl="triton")
    assert ids.tolist() == [[2, 5, 0, 3, -1, -1]]
    assert scores[0, 0] == float("inf") and scores[0, 2] == 0


def case_scores_are_close():
    user_emb, item_emb = torch.randn(3, 65), torch.randn(70, 65)
    scores, ids = ops.topk(user_emb, item_emb, 10, impl="triton")
    truth = (user_emb.double() @ item_emb.double().T).topk(10)
    torch.testing.assert_close(scores.double(), truth.values, rtol=1e-5, atol=1e-5)
    assert torch.equal(ids, truth.indices)
