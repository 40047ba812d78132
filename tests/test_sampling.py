"""The sampler: the documented stream, uniform draws, never an interacted negative, a pure function of its place."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse, stats

from mmkd import _host, csr
from mmkd.data import Sampler, synthetic
from mmkd.reference import sampling as reference
from mmkd.reference.sampling import NEGATIVE, ROUNDS, below, philox4x32
from tests.ops.matrices import patterns

MASK = 0xFFFFFFFF


def philox_by_hand(counter, key):
    """Philox4x32-10 on Python integers, as in the paper."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & MASK, (p0 >> 32) ^ c[3] ^ k[1], p0 & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return c


def sample_by_hand(train, num_negatives, seed, b, step, epoch, rounds):
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
        for attempt in range(rounds + 1):
            word = philox_by_hand((b, NEGATIVE | attempt << 16 | j >> 2, step, epoch), key)[j & 3]
            if attempt == rounds:
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


@pytest.fixture(params=["generic", "avx2", "avx512"])
def host_isa(request):
    """Draws with the kernels of one instruction set."""
    try:
        _host.set_cpu_isa(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield
    _host.set_cpu_isa("")


@pytest.mark.parametrize("rounds", [ROUNDS, 1, 2])
@pytest.mark.parametrize("implementation", [reference.Sampler, _host.Sampler], ids=["numpy", "cpp"])
def test_stream_is_as_documented(implementation, rounds):
    rng = np.random.default_rng(2)
    train = dense(rng.random((9, 14)) < rng.random((9, 1)))
    full = np.diff(train.indptr) == 14
    train = dense(train.toarray() * ~full[:, None])
    sampler = implementation(*csr.from_scipy(train), 14, rounds)
    seed = 2**63 + 12345
    for epoch, step in ((0, 0), (3, 1), (2**32 - 1, 7)):
        users, candidates = sampler.batch(seed, epoch, step, 16, 6)
        for b in range(16):
            user, pos, negatives = sample_by_hand(train, 6, seed, b, step, epoch, rounds)
            assert (users[b], candidates[b].tolist()) == (user, [pos, *negatives])


@settings(max_examples=100)
@given(patterns(max_rows=20, max_cols=700, full=False), st.data())
def test_cpp_and_numpy_draw_the_same_bits(pattern, data):
    rowptr, col, num_items = pattern.rowptr, pattern.col, pattern.num_cols
    rounds = data.draw(st.sampled_from([1, 2, ROUNDS]))
    seed = data.draw(st.integers(0, 2**64 - 1))
    epoch, step = data.draw(st.integers(0, MASK)), data.draw(st.integers(0, MASK))
    size, count = data.draw(st.integers(0, 200)), data.draw(st.integers(1, 40))
    by_pair = data.draw(st.booleans())
    truth = reference.Sampler(rowptr, col, num_items, rounds, by_pair).batch(seed, epoch, step, size, count)
    ours = _host.Sampler(rowptr, col, num_items, rounds, by_pair).batch(
        seed, epoch, step, size, count, data.draw(st.integers(1, 5))
    )
    for a, b in zip(ours, truth, strict=True):
        assert a.dtype == np.int64 and np.array_equal(a, b)


def test_every_instruction_set_draws_the_same_bits(host_isa):
    train = synthetic(seed=0).train
    rowptr, col = csr.from_scipy(train)
    crowded = np.sort(np.random.default_rng(0).permutation(700)[:650])  # a row that is searched, not scanned
    for matrix in ((rowptr, col, train.shape[1]), (np.array([0, 650]), crowded, 700)):
        ours = _host.Sampler(*matrix, ROUNDS).batch(7, 1, 2, 777, 37)
        truth = reference.Sampler(*matrix, ROUNDS).batch(7, 1, 2, 777, 37)
        assert all(np.array_equal(a, b) for a, b in zip(ours, truth, strict=True))


def test_pairs_are_drawn_uniformly():
    train = dense(
        np.array([[1, 1, 1, 1, 1, 1, 0], [0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 0, 0]])
    )
    batch = Sampler(train, 2, 90_000, seed=5, draw="pairs").batch(0, 0)
    counts = np.bincount(batch.users * 7 + batch.pos, minlength=28).reshape(4, 7)
    assert np.array_equal(counts > 0, train.toarray() > 0)
    assert np.abs(counts[counts > 0] - 10_000).max() < 500  # 5 standard deviations
    with pytest.raises(ValueError, match="draw must be users or pairs, got 'edges'"):
        Sampler(train, 2, 9, draw="edges")


def test_any_number_of_threads_draws_the_same_bits():
    train = synthetic(seed=0).train
    first = Sampler(train, 10, 5000, seed=3).batch(4, 5)
    for threads in (2, 3, 7, 1000):
        again = Sampler(train, 10, 5000, seed=3, num_threads=threads).batch(4, 5)
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    shared = Sampler(train, 10, 5000, seed=3, num_threads=2)
    with ThreadPoolExecutor(4) as pool:  # the interpreter lock is released: calls run side by side
        for again in pool.map(lambda _: shared.batch(4, 5), range(16)):
            assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_item_ids_beyond_int32():
    ids = np.array([5, 2**31 + 1, 2**32 - 3])
    train = sparse.csr_matrix((np.ones(3, np.float32), ids, np.array([0, 3])), shape=(1, 2**32 - 1))
    sampler = Sampler(train, 8, 500, seed=1)
    batch = sampler.batch(0, 0)
    assert set(batch.pos.tolist()) == set(ids.tolist())
    assert batch.neg.min() >= 0 and batch.neg.max() >= 2**31 and not np.isin(batch.neg, ids).any()
    truth = reference.Sampler(train.indptr, train.indices, 2**32 - 1).batch(1, 0, 0, 500, 8)
    assert np.array_equal(batch.candidates, truth[1])
    with pytest.raises(ValueError, match=r"num_items: expected 1 to 2\^32 - 1, got 4294967296"):
        Sampler(sparse.csr_matrix((np.ones(3), ids, np.array([0, 3])), shape=(1, 2**32)), 1, 4)


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


def uniform(counts: np.ndarray) -> bool:
    """Pearson's chi-square against equal probabilities; one good sampler in 10^5 would fail."""
    return stats.chisquare(counts).pvalue > 1e-5


def test_draws_are_uniform():
    mask = np.zeros((6, 20), np.float32)
    mask[[0, 1, 1, 2, 2, 2, 4, 5], [3, 0, 19, 5, 6, 7, 1, 2]] = 1  # user 3 has no train item
    mask[5, :18] = 1  # most first draws of user 5 are refused
    batch = Sampler(dense(mask), 4, 200_000, seed=9).batch(1, 2)
    users = np.bincount(batch.users, minlength=6)
    assert users[3] == 0 and uniform(users[[0, 1, 2, 4, 5]])
    for user in (2, 5):
        mine, has = batch.users == user, mask[user] == 1
        pos, neg = (np.bincount(ids[mine].ravel(), minlength=20) for ids in (batch.pos, batch.neg))
        assert pos[~has].sum() == 0 and uniform(pos[has])
        assert neg[has].sum() == 0 and uniform(neg[~has])
    # negatives of one sample are independent of each other: all pairs (first, second) are as likely
    mine = batch.neg[batch.users == 2]
    left = np.searchsorted(np.flatnonzero(mask[2] == 0), mine)
    assert uniform(np.bincount(left[:, 0] * 17 + left[:, 1], minlength=17 * 17))
    assert not uniform(np.bincount(np.minimum(left[:, 0], left[:, 1]), minlength=17))  # what the test can see


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


def test_unsorted_rows_and_duplicates_are_sorted_and_merged():
    col, rowptr = np.array([4, 2, 4, 0, 1]), np.array([0, 3, 3, 5])
    messy = sparse.csr_matrix((np.ones(5, np.float32), col, rowptr), shape=(3, 6))
    tidy = dense([[0, 0, 1, 0, 1, 0], [0] * 6, [1, 1, 0, 0, 0, 0]])
    a, b = (Sampler(m, 3, 64, seed=8).batch(0, 0) for m in (messy, tidy))
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert messy.indices.tolist() == [4, 2, 4, 0, 1]


@pytest.mark.parametrize("multiple", [1, 16, 100])
@pytest.mark.parametrize(
    ("num_users", "num_items", "size", "width", "extra"),
    [
        (50, 70, 40, 5, 9), (64, 128, 200, 1, 0), (1, 1, 1, 2, None), (5, 5, 0, 3, 2), (3, 200, 7, 0, 5), (130, 2, 64, 2, 1),
        (64, 64, 300, 3, 300),
    ],
)  # fmt: skip
def test_compact_is_unique_and_its_inverse(num_users, num_items, size, width, extra, multiple, host_isa):
    rng = np.random.default_rng(0)
    users, candidates = rng.integers(0, num_users, size), rng.integers(0, num_items, (size, width))
    nodes = None if extra is None else rng.integers(0, num_users + num_items, extra)
    rows, first_item, local_users, local, where, counts, touched, touched_counts = _host.compact(
        users, candidates, num_users, num_items, nodes, multiple
    )
    ids = [users, (candidates + num_users).ravel(), [] if nodes is None else nodes]
    distinct = np.unique(np.concatenate(ids).astype(np.int64))
    own, items = distinct[distinct < num_users], distinct[distinct >= num_users]
    assert (
        first_item == len(own) + -len(own) % multiple and len(rows) - first_item == len(items) + -len(items) % multiple
    )
    assert np.array_equal(rows[: len(own)], own) and np.array_equal(rows[first_item:][: len(items)], items)
    filling = rows[len(own) : first_item], rows[first_item + len(items) :] - num_users  # any of their kind
    assert all(np.array_equal(f, np.arange(len(f)) % n) for f, n in zip(filling, (num_users, num_items), strict=True))
    assert np.array_equal(rows[local_users], users)
    assert np.array_equal(rows[local + first_item], candidates + num_users)
    assert np.array_equal(rows[where], [] if nodes is None else nodes)
    seen = np.concatenate([local_users, (local[:, :2] + first_item).ravel()])
    assert counts.dtype == np.float32 and np.array_equal(counts, np.bincount(seen, minlength=len(rows)))
    known = np.flatnonzero(counts)
    assert np.array_equal(touched[: len(known)], rows[known])
    assert np.array_equal(touched_counts[: len(known)], counts[known]) and not touched_counts[len(known) :].any()
    assert len(touched) == len(touched_counts) == len(known) + -len(known) % multiple
    assert touched.min(initial=0) >= 0 and touched.max(initial=0) < num_users + num_items


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"users": [0, 9]}, "users: entry 1 is 9, expected"),
        ({"users": [0]}, "candidates: expected 1 rows"),
        ({"candidates": [[0, 1], [-1, 2]]}, "candidates: entry 2 is -1, expected"),
        ({"candidates": [0, 1]}, "candidates: expected 2 dimension"),
        ({"extra": [8]}, "extra: entry 0 is 8, expected"),
        ({"num_items": -1}, "num_items: expected >= 0"),
        ({"multiple": 0}, "multiple: expected 1 to"),
    ],
)
def test_compact_refuses(change, message):
    good = {"users": [0, 2], "candidates": [[0, 1], [4, 2]], "num_users": 3, "num_items": 5, "extra": [7]}
    arguments = {k: np.array(v, np.int64) if isinstance(v, list) else v for k, v in (good | change).items()}
    with pytest.raises(ValueError, match=message):
        _host.compact(**arguments)


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
    with pytest.raises(ValueError, match="num_threads"):
        Sampler(good, 1, 4, num_threads=0)
    with pytest.raises(ValueError, match="epoch"):
        Sampler(good, 1, 4).batch(-1, 0)
