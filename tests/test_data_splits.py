"""Splits: every pair in exactly one part, the right one, whatever the order of the rows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmkd.data import DataError, load
from mmkd.data.splits import TEST, TRAIN, VAL, leave_last_out, random_by_user, time_cut

PAIRS = st.sets(st.tuples(st.integers(0, 4), st.integers(0, 20)), min_size=1, max_size=60)
SHARES = st.sampled_from([(0.0, 0.0), (0.1, 0.1), (0.0, 0.2), (0.3, 0.0), (0.45, 0.5)])


def arrays(pairs, order_seed: int) -> tuple[np.ndarray, np.ndarray]:
    rows = np.asarray(sorted(pairs), np.int64)[np.random.default_rng(order_seed).permutation(len(pairs))]
    return rows[:, 0], rows[:, 1]


@given(PAIRS, SHARES, st.integers(0, 2**40), st.integers(0, 3))
def test_random_by_user(pairs, shares, seed, order):
    val, test = shares
    users, items = arrays(pairs, order)
    labels = random_by_user(users, items, val=val, test=test, seed=seed)
    for user in np.unique(users):
        mine = labels[users == user]
        assert (mine == TRAIN).sum() >= 1
        expected = min(int(len(mine) * test + 0.5), len(mine) - 1)
        assert (mine == TEST).sum() == expected
        assert (mine == VAL).sum() == min(int(len(mine) * val + 0.5), len(mine) - 1 - expected)
    other_users, other_items = arrays(pairs, order + 1)
    other = random_by_user(other_users, other_items, val=val, test=test, seed=seed)
    by_pair = dict(zip(zip(users.tolist(), items.tolist(), strict=True), labels.tolist(), strict=True))
    keys = zip(other_users.tolist(), other_items.tolist(), strict=True)
    assert dict(zip(keys, other.tolist(), strict=True)) == by_pair


def test_random_by_user_is_uniform_and_seeded():
    users, items = np.zeros(10, np.int64), np.arange(10)
    drawn = np.zeros(10)
    for seed in range(2000):
        drawn += random_by_user(users, items, val=0, test=0.2, seed=seed) == TEST
    assert drawn.sum() == 4000
    assert np.abs(drawn - 400).max() < 5 * np.sqrt(2000 * 0.2 * 0.8)


@given(PAIRS, st.integers(0, 100), st.integers(1, 5))
def test_leave_last_out(pairs, seed, moments):
    users, items = arrays(pairs, seed)
    times = np.random.default_rng(seed).integers(0, moments, len(users))
    labels = leave_last_out(users, items, times)
    for user in np.unique(users):
        mine = sorted(zip(*(a[users == user].tolist() for a in (times, items, labels)), strict=True))
        last = [VAL, TEST] if len(mine) >= 3 else [TRAIN, TRAIN]
        assert [row[2] for row in mine] == ([TRAIN] * len(mine) + last)[2:]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=80), SHARES)
def test_time_cut(times, shares):
    val, test = shares
    times = np.asarray(times)
    try:
        labels, cuts = time_cut(times, val=val, test=test)
    except DataError as error:
        assert "train set is empty" in str(error)
        return
    groups = [times[labels == label] for label in (TRAIN, VAL, TEST)]
    assert len(groups[TRAIN]) > 0
    present = [group for group in groups if len(group)]
    assert all(a.max() < b.min() for a, b in itertools.pairwise(present))
    assert (cuts[0] is None) == (val == 0) and (cuts[1] is None) == (test == 0)
    assert (len(groups[VAL]) == 0) or val > 0
    assert (len(groups[TEST]) == 0) == (test == 0)


def test_time_cut_shares():
    labels, cuts = time_cut(np.random.default_rng(0).permutation(1000), val=0.1, test=0.1)
    assert np.bincount(labels).tolist() == [800, 100, 100] and cuts == (800, 900)


@pytest.mark.parametrize("stamp", [str, lambda t: f"2024-01-{t + 1:02d}", lambda t: f"2024-01-{t + 1:02d}T10:00:00Z"])
def test_table_is_cut_by_its_timestamps(tmp_path, stamp):
    rows = [(u, t, stamp(t)) for t in range(20) for u in "ab"]
    order = np.random.default_rng(1).permutation(len(rows))
    path = tmp_path / "x.csv"
    path.write_text("user,item,timestamp\n" + "".join("{},{},{}\n".format(*rows[i]) for i in order))
    data = load(path)  # timestamps there: the default is the time cut
    assert [np.unique(part.indices).tolist() for part in (data.train, data.val, data.test)] == [
        list(range(16)),
        [16, 17],
        [18, 19],
    ]
    last = load(path, split="leave-last-out")
    assert last.val.indices.tolist() == [18, 18] and last.test.indices.tolist() == [19, 19]
    assert load(path, split="random", seed=1).fingerprint() != load(path, split="random", seed=2).fingerprint()


def test_repeated_pairs_do_not_leak_across_the_cut(tmp_path):
    path = tmp_path / "x.csv"
    rows = [("a", i, i) for i in range(10)] + [("a", 0, 99)]  # item 0 comes again after the cut
    path.write_text("user,item,timestamp\n" + "".join("{},{},{}\n".format(*row) for row in rows))
    data = load(path)
    assert 0 in data.train.indices and 0 not in data.test.indices


def test_one_moment_cannot_be_cut(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("user,item,timestamp\n1,1,5\n1,2,5\n")
    with pytest.raises(DataError, match=r"no pair is earlier than the first cut \(5\)"):
        load(path)


@pytest.mark.parametrize(("val", "test"), [(-0.1, 0.1), (0.1, 1.0), (0.5, 0.5)])
def test_shares_out_of_range(val, test):
    with pytest.raises(ValueError, match="fraction"):
        time_cut(np.arange(10), val=val, test=test)
