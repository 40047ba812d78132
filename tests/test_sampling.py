"""The sampler: the documented stream, uniform draws, never an interacted negative, a pure function of its place."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from mmkd.data import sampling, synthetic
from mmkd.data.sampling import NEGATIVE, ROUNDS, Sampler, below, philox4x32

MASK = 0xFFFFFFFF


def philox_by_hand(counter, key):
    """Philox4x32-10 on Python integers, as in the paper."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & MASK, (p0 >> 32) ^ c[3] ^ k[1], p0 & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return c


def sample_by_hand(train, num_negatives, seed, b, step, epoch):
    """One sample of the documented stream in plain Python."""
    key = (seed & MASK, seed >> 32)
    rows = [train.indices[a:z].tolist() for a, z in zip(train.indptr, train.indptr[1:], strict=False)]
    active = [user for user, row in enumerate(rows) if row]
    num_items = train.shape[1]
    words = philox_by_hand((b, 0, step, epoch), key)
    user = active[words[0] * len(active) >> 32]
    row = rows[user]
    negatives = []
    for j in range(num_negatives):
        for attempt in range(sampling.ROUNDS + 1):
            word = philox_by_hand((b, NEGATIVE | attempt << 16 | j >> 2, step, epoch), key)[j & 3]
            if attempt == sampling.ROUNDS:
                others = [item for item in range(num_items) if item not in row]
                negatives.append(others[word * len(others) >> 32])
            elif word * num_items >> 32 not in row:
                negatives.append(word * num_items >> 32)
                break
    return user, row[words[1] * len(row) >> 32], negatives


def dense(mask) -> sparse.csr_matrix:
    return sparse.csr_matrix(np.asarray(mask, np.float32))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    """The vectors published with Random123."""
    assert tuple(int(word) for word in philox4x32(counter, key)) == expected


def test_philox_on_random_counters():
    """Checked against plain Python: NumPy's own Philox is the 4x64 one."""
    rng = np.random.default_rng(0)
    counter, key = rng.integers(0, 2**32, (4, 50), dtype=np.uint64), (123456789, 987654321)
    words = np.stack(philox4x32(tuple(counter), key), axis=1).tolist()
    assert words == [philox_by_hand([int(word) for word in column], key) for column in counter.T]


@given(st.integers(0, MASK), st.integers(1, MASK))
def test_below_is_multiply_high(word, bound):
    assert int(below(np.uint64(word), bound)) == word * bound >> 32 < bound


@pytest.mark.parametrize("rounds", [ROUNDS, 1, 2])
def test_stream_is_as_documented(monkeypatch, rounds):
    monkeypatch.setattr(sampling, "ROUNDS", rounds)
    rng = np.random.default_rng(2)
    train = dense(rng.random((9, 14)) < rng.random((9, 1)))
    full = np.diff(train.indptr) == 14
    train = dense(train.toarray() * ~full[:, None])
    sampler = Sampler(train, 6, 16, seed=2**63 + 12345)
    for epoch, step in ((0, 0), (3, 1), (2**32 - 1, 7)):
        batch = sampler.batch(epoch, step)
        for b in range(16):
            expected = sample_by_hand(train, 6, 2**63 + 12345, b, step, epoch)
            assert (batch.users[b], batch.pos[b], batch.neg[b].tolist()) == expected


@given(st.data())
def test_negatives_are_never_interacted(data):
    num_users, num_items = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 12))
    rows = data.draw(st.lists(st.sets(st.integers(0, num_items - 1), max_size=num_items - 1), min_size=num_users))
    if not any(rows):
        rows[0] = {0}
    mask = np.zeros((len(rows), num_items))
    for user, row in enumerate(rows):
        mask[user, sorted(row)] = 1
    seed = data.draw(st.integers(0, 2**64 - 1))
    batch = Sampler(dense(mask), data.draw(st.integers(1, 9)), 32, seed).batch(0, 0)
    assert batch.users.dtype == batch.pos.dtype == batch.neg.dtype == np.int64
    assert mask[batch.users, batch.pos].all()
    assert not mask[batch.users[:, None], batch.neg].any()
    assert batch.neg.min() >= 0 and batch.neg.max() < num_items


def test_almost_full_row_uses_the_exact_fallback():
    mask = np.ones((2, 5000), np.float32)
    mask[0, [17, 4242]] = 0
    mask[1] = 0
    mask[1, 3] = 1
    batch = Sampler(dense(mask), 8, 2000, seed=4).batch(0, 0)
    picked = batch.neg[batch.users == 0]
    assert set(picked.ravel().tolist()) == {17, 4242}
    share = (picked == 17).mean()
    assert abs(share - 0.5) < 5 * 0.5 / np.sqrt(picked.size)


def test_draws_are_uniform():
    mask = np.zeros((6, 20), np.float32)
    mask[[0, 1, 1, 2, 2, 2, 4, 5], [3, 0, 19, 5, 6, 7, 1, 2]] = 1  # user 3 has no train item
    batch = Sampler(dense(mask), 4, 200_000, seed=9).batch(1, 2)
    users = np.bincount(batch.users, minlength=6)
    assert users[3] == 0 and np.abs(users[[0, 1, 2, 4, 5]] - 40_000).max() < 5 * 200
    mine = batch.users == 2
    positives = np.bincount(batch.pos[mine], minlength=20)[5:8] / mine.sum()
    assert np.abs(positives - 1 / 3).max() < 5 * np.sqrt(2 / 9 / mine.sum())
    negatives = np.bincount(batch.neg[mine].ravel(), minlength=20) / (4 * mine.sum())
    assert negatives[5:8].sum() == 0
    assert np.abs(np.delete(negatives, [5, 6, 7]) - 1 / 17).max() < 5 * np.sqrt(1 / 17 / (4 * mine.sum()))


def test_pure_function_of_seed_epoch_step():
    train = synthetic(seed=0).train
    sampler = Sampler(train, 10, 64, seed=1)
    first = sampler.batch(2, 3)
    sampler.batch(0, 0)
    for again in (sampler.batch(2, 3), Sampler(train, 10, 64, seed=1).batch(2, 3)):
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (sampler.batch(3, 2), sampler.batch(2, 4), Sampler(train, 10, 64, seed=1 + 2**32).batch(2, 3)):
        assert not np.array_equal(first.neg, other.neg)
    # a wider sampler draws the same users, positives and first negatives; a longer batch only adds samples
    wide = Sampler(train, 20, 128, seed=1).batch(2, 3)
    assert np.array_equal(wide.users[:64], first.users) and np.array_equal(wide.pos[:64], first.pos)
    assert np.array_equal(wide.neg[:64, :10], first.neg)


def test_num_steps():
    train = synthetic(seed=0).train
    assert Sampler(train, 1, 1000).num_steps == -(-train.nnz // 1000)
    assert Sampler(train, 1, 1000, num_steps=7).num_steps == 7


def test_input_is_not_changed():
    train = sparse.csr_matrix((np.ones(3, np.float32), np.array([2, 0, 2]), np.array([0, 3])), shape=(1, 4))
    batch = Sampler(train, 3, 50).batch(0, 0)
    assert set(batch.neg.ravel().tolist()) <= {1, 3} and set(batch.pos.tolist()) <= {0, 2}
    assert train.indices.tolist() == [2, 0, 2]


def test_refusals():
    train = dense([[1, 0], [1, 1]])
    with pytest.raises(ValueError, match="user 1 has all 2 items"):
        Sampler(train, 1, 4)
    good = dense([[1, 0], [0, 1]])
    with pytest.raises(ValueError, match="no interactions"):
        Sampler(dense(np.zeros((2, 2))), 1, 4)
    with pytest.raises(TypeError, match="CSR"):
        Sampler(good.tocsc(), 1, 4)
    for options, message in (
        ({"num_negatives": 0}, "num_negatives must be between 1"),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
    ):
        with pytest.raises(ValueError, match=message):
            Sampler(good, **({"num_negatives": 1, "batch_size": 4} | options))
    with pytest.raises(TypeError, match="seed must be a whole number"):
        Sampler(good, 1, 4, seed=0.5)
    with pytest.raises(ValueError, match="epoch"):
        Sampler(good, 1, 4).batch(-1, 0)
