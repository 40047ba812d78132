"""topk: exact, ties by lower id, exclusions, and everything that can be missing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkd import ops
from tests.ops.grid import DIMS, DTYPES


def exclusions(num_users, num_items, seed=0, index=torch.int32):
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(num_items)[: rng.integers(0, num_items // 2 + 1)] for _ in range(num_users)]  # unsorted
    rowptr = torch.tensor([0, *np.cumsum([len(r) for r in rows])])
    return rowptr, torch.from_numpy(np.concatenate([*rows, np.empty(0, int)])).to(index)


def whole_numbers(n, d, dtype, seed):
    """Small integers: every score is exact in every dtype, so ids must agree to the last, ties included."""
    return torch.randint(-3, 4, (n, d), generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", DIMS)
def test_grid_is_exact_with_ties(d, dtype, cpu_isa, poison_empty):
    user_emb, item_emb = whole_numbers(25, d, dtype, 1), whole_numbers(83, d, dtype, 2)
    for k in (1, 10, 83, 100):
        for exclude in (None, exclusions(25, 83), exclusions(25, 83, index=torch.int64)):
            ours = ops.topk(user_emb, item_emb, k, exclude=exclude)
            truth = ops.topk(user_emb.double(), item_emb.double(), k, exclude=exclude, impl="reference")
            assert ours[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert torch.equal(ours[1], truth[1])
            assert torch.equal(ours[0].double(), truth[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_real_scores_within_rounding(dtype, cpu_isa):
    torch.manual_seed(0)
    user_emb, item_emb = torch.randn(100, 64).to(dtype), torch.randn(700, 64).to(dtype)
    scores, ids = ops.topk(user_emb, item_emb, 50)
    truth = user_emb.double() @ item_emb.double().T
    torch.testing.assert_close(scores.double(), truth.gather(1, ids), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(scores.double(), truth.topk(50).values, atol=1e-4, rtol=1e-5)
    assert all(row.unique().numel() == 50 for row in ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("k", [1, 7, 50, 400])
def test_scores_that_rise_fall_or_saw_and_their_best_excluded(k, dtype, cpu_isa):
    """Every item counts when it comes, and buffers are cut many times; the excluded ones are the best of all."""
    n = 3000
    rising, saw = torch.arange(n, dtype=dtype) - n / 2, (torch.arange(n) * 37 % 101).to(dtype)
    zeros = torch.where(torch.arange(n) % 2 == 0, 0.0, -0.0).to(dtype)
    item_emb = torch.stack([rising, -rising, saw, torch.minimum(rising, rising.flip(0)), zeros], 1)
    user_emb = torch.eye(5, dtype=dtype)
    best = user_emb @ item_emb.T
    taken = best.topk(1200).indices.to(torch.int32)
    for exclude in (None, (torch.arange(6) * 1200, taken.reshape(-1))):
        ours = ops.topk(user_emb, item_emb, k, exclude=exclude)
        truth = ops.topk(user_emb.double(), item_emb.double(), k, exclude=exclude, impl="reference")
        assert torch.equal(ours[1], truth[1]) and torch.equal(ours[0].double(), truth[0])


def test_a_subset_of_users_in_any_order_with_repeats():
    user_emb, item_emb, exclude = torch.randn(40, 8), torch.randn(60, 8), exclusions(40, 60)
    users = torch.tensor([39, 0, 0, 17])
    everyone = ops.topk(user_emb, item_emb, 5, exclude=exclude)
    some = ops.topk(user_emb, item_emb, 5, users=users, exclude=exclude)
    assert torch.equal(some[0], everyone[0][users]) and torch.equal(some[1], everyone[1][users])


def test_fewer_items_than_k_are_padded():
    exclude = (torch.tensor([0, 3, 3]), torch.tensor([0, 1, 2]))
    scores, ids = ops.topk(torch.ones(2, 4), torch.ones(3, 4), 5, exclude=exclude)
    assert ids.tolist() == [[-1] * 5, [0, 1, 2, -1, -1]]
    assert scores[0].eq(-torch.inf).all() and scores[1].tolist() == [4, 4, 4, -torch.inf, -torch.inf]


def test_nothing_to_rank():
    empty = torch.empty(0, dtype=torch.int64)
    assert ops.topk(torch.randn(3, 4), torch.randn(5, 4), 2, users=empty)[1].shape == (0, 2)
    assert ops.topk(torch.randn(0, 4), torch.randn(5, 4), 2)[1].shape == (0, 2)
    assert ops.topk(torch.randn(3, 4), torch.randn(0, 4), 2)[1].eq(-1).all()


def test_nan_is_never_returned(cpu_isa):
    item_emb = torch.randn(40, 8)
    item_emb[::3] = float("nan")
    scores, ids = ops.topk(torch.randn(9, 8), item_emb, 40)
    assert not scores.isnan().any() and not (ids[ids >= 0] % 3 == 0).any()
    assert (ids >= 0).sum(1).eq(26).all()


def test_bit_equal_for_any_number_of_threads():
    user_emb, item_emb, exclude = torch.randn(500, 64), torch.randn(900, 64), exclusions(500, 900)
    before, seen = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        seen.append(ops.topk(user_emb, item_emb, 20, exclude=exclude))
    torch.set_num_threads(before)
    assert torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[0][1], seen[1][1])


def test_views_opcheck_and_compile():
    user_emb, item_emb = torch.randn(8, 12).T, torch.randn(30, 16)[:, ::2]
    torch.testing.assert_close(ops.topk(user_emb, item_emb, 4)[0], ops.topk(user_emb, item_emb, 4, impl="reference")[0])
    rowptr, col = exclusions(12, 30)
    args = (user_emb.contiguous(), item_emb.contiguous(), 4, torch.tensor([1, 5]), rowptr, col)
    torch.library.opcheck(torch.ops.mmkd.topk.default, args)
    compiled = torch.compile(lambda u, i: ops.topk(u, i, 4), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(user_emb, item_emb)[1], ops.topk(user_emb, item_emb, 4)[1])
    assert not ops.topk(user_emb.requires_grad_(), item_emb, 4)[0].requires_grad


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.integers(1, 70), st.integers(1, 9), st.integers(1, 80), st.integers(0, 2**31 - 1))
def test_random_problems_equal_the_reference(num_users, num_items, d, k, seed):
    user_emb, item_emb = (
        whole_numbers(num_users, d, torch.float32, seed),
        whole_numbers(num_items, d, torch.float32, seed + 1),
    )
    exclude = exclusions(num_users, num_items, seed)
    ours, truth = (ops.topk(user_emb, item_emb, k, exclude=exclude, impl=impl) for impl in ("cpp", "reference"))
    assert torch.equal(ours[0], truth[0]) and torch.equal(ours[1], truth[1])


def test_errors_name_the_argument():
    u, i = torch.randn(3, 4), torch.randn(5, 4)
    rowptr, col = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2])
    cases = [
        (ValueError, "k: expected >= 1", lambda: ops.topk(u, i, 0)),
        (RuntimeError, "users: entry 0 is 3, expected", lambda: ops.topk(u, i, 1, users=torch.tensor([3]))),
        (ValueError, r"exclude\[0\] \(rowptr\): expected shape", lambda: ops.topk(u, i, 1, exclude=(rowptr[:2], col))),
        (RuntimeError, r"exclude\[1\] \(col\): entry 2 is 5", lambda: ops.topk(u, i, 1, exclude=(rowptr, col + torch.tensor([0, 0, 3])))),
        (RuntimeError, r"falls from 3 to 2", lambda: ops.topk(u, i, 1, exclude=(torch.tensor([0, 3, 2, 3]), col))),
        (RuntimeError, r"end at len\(col\) = 3", lambda: ops.topk(u, i, 1, exclude=(torch.tensor([0, 1, 2, 9]), col))),
        (TypeError, r"exclude\[1\] \(col\): expected", lambda: ops.topk(u, i, 1, exclude=(rowptr, col.float()))),
        (TypeError, "item_emb: expected", lambda: ops.topk(u, i.double(), 1)),
    ]  # fmt: skip
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
