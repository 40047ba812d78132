"""Metrics against their definitions, one user at a time, and against ranx."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkd.evaluation import metrics

KS = (1, 3, 10, 20)
RANX = {"recall": "recall", "ndcg": "ndcg", "precision": "precision", "hit": "hit_rate", "mrr": "mrr", "map": "map"}


def naive(ranked: list[int], relevant: set[int], k: int) -> dict[str, float]:
    """The formulas of the specification, spelt out for one user."""
    top = ranked[:k]
    places = [j for j, item in enumerate(top, 1) if item in relevant]
    ideal = sum(1 / math.log2(j + 1) for j in range(1, min(k, len(relevant)) + 1))
    return {
        "recall": len(places) / len(relevant),
        "ndcg": sum(1 / math.log2(j + 1) for j in places) / ideal,
        "precision": len(places) / k,
        "hit": float(bool(places)),
        "mrr": 1 / places[0] if places else 0.0,
        "map": sum(n / j for n, j in enumerate(places, 1)) / len(relevant),
    }


def case(seed: int, n: int = 40, num_items: int = 60, width: int = 20) -> tuple[np.ndarray, sp.csr_matrix]:
    rng = np.random.default_rng(seed)
    ranked = np.stack([rng.permutation(num_items)[:width] for _ in range(n)])
    density = rng.choice([0.0, 0.02, 0.1, 0.6], size=(n, 1))
    return ranked, sp.csr_matrix((rng.random((n, num_items)) < density).astype(np.float32))


def row_sets(relevant: sp.csr_matrix) -> list[set[int]]:
    return [set(relevant.indices[a:b].tolist()) for a, b in zip(relevant.indptr[:-1], relevant.indptr[1:], strict=True)]


@pytest.mark.parametrize("seed", range(5))
def test_equals_a_loop_over_users(seed):
    ranked, relevant = case(seed)
    ranked[::3, 15:] = -1
    values = metrics.per_user(ranked, relevant, KS)
    assert set(values) == {f"{name}@{k}" for name in metrics.NAMES for k in KS}
    seen_empty = 0
    for row, wanted in enumerate(row_sets(relevant)):
        for k in KS:
            for name in metrics.NAMES:
                got = values[f"{name}@{k}"][row]
                if not wanted:
                    assert math.isnan(got)
                    seen_empty += 1
                else:
                    assert got == pytest.approx(naive(ranked[row].tolist(), wanted, k)[name], abs=1e-14)
    assert seen_empty > 0


@pytest.fixture(scope="module")
def ranx():
    """ranx with numba's compiler off: compiling takes minutes, the interpreter a tenth of a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NUMBA_DISABLE_JIT", "1")  # read when numba is first imported
        yield pytest.importorskip("ranx")


@pytest.mark.parametrize("k", [10, 20, 50])
def test_equals_ranx(k, ranx):
    ranked, relevant = case(7, n=60, num_items=300, width=50)
    wanted = {f"u{row}": {f"i{i}": 1 for i in items} for row, items in enumerate(row_sets(relevant)) if items}
    run = {f"u{r}": {f"i{i}": 1.0 - j / 100 for j, i in enumerate(ranked[r].tolist())} for r in range(60)}
    run = {user: run[user] for user in wanted}
    assert 10 < len(wanted) < 60
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = [f"{theirs}@{k}" for theirs in RANX.values()]
        theirs = ranx.evaluate(ranx.Qrels(wanted), ranx.Run(run), names)
    ours = metrics.mean(metrics.per_user(ranked, relevant, (k,)))
    for name, other in RANX.items():
        assert ours[f"{name}@{k}"] == pytest.approx(theirs[f"{other}@{k}"], abs=1e-12), name


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 30))
def test_bounds_and_order(seed, n, num_items):
    ranked, relevant = case(seed, n, num_items, num_items)
    ks = tuple(range(1, num_items + 1))
    values = metrics.per_user(ranked, relevant, ks)
    kept = np.diff(relevant.indptr) > 0
    for name in metrics.NAMES:
        stacked = np.stack([values[f"{name}@{k}"][kept] for k in ks])
        assert (stacked >= 0).all() and (stacked <= 1 + 1e-12).all()
        if name in ("recall", "hit", "mrr", "map"):
            assert (np.diff(stacked, axis=0) >= -1e-15).all()  # never falls as K grows
    assert (values[f"recall@{num_items}"][kept] == 1).all()  # everything ranked: everything found


def test_a_perfect_ranking_is_one():
    relevant = sp.csr_matrix(np.eye(4, 30, k=3) + np.eye(4, 30, k=9))
    ranked = np.stack([np.r_[r + 3, r + 9, np.setdiff1d(np.arange(30), [r + 3, r + 9])] for r in range(4)])
    mean = metrics.mean(metrics.per_user(ranked, relevant, (2, 10)))
    for name in ("recall@2", "ndcg@2", "precision@2", "hit@2", "mrr@2", "map@2", "ndcg@10", "map@10", "recall@10"):
        assert mean[name] == pytest.approx(1.0, abs=1e-15), name
    assert mean["precision@10"] == pytest.approx(0.2)


def test_relevant_may_be_unsorted_and_repeat_a_pair():
    relevant = sp.csr_matrix((np.ones(4), np.array([5, 2, 5, 1]), np.array([0, 3, 4])), shape=(2, 6))
    before = relevant.indices.copy()
    hits = metrics.hit_matrix(np.array([[5, 0, 2], [2, 1, 5]]), relevant)
    assert hits.tolist() == [[True, False, True], [False, True, False]]
    assert (relevant.indices == before).all()
    assert metrics.per_user(np.array([[5, 0, 2], [2, 1, 5]]), relevant, (3,))["recall@3"].tolist() == [1.0, 1.0]


def test_means_leave_out_users_with_nothing_relevant():
    relevant = sp.csr_matrix(np.array([[1, 0, 0], [0, 0, 0]]))
    values = metrics.per_user(np.array([[0, 1], [0, 1]]), relevant, (1,))
    assert metrics.mean(values)["recall@1"] == 1.0
    with pytest.raises(ValueError, match="no user has anything relevant"):
        metrics.mean(metrics.per_user(np.array([[0]]), sp.csr_matrix((1, 3)), (1,)))


def test_refusals():
    relevant = sp.csr_matrix(np.eye(2, 5))
    with pytest.raises(ValueError, match=r"row 1 holds id 5, expected -1 or \[0, 5\)"):
        metrics.hit_matrix(np.array([[0, 1], [2, 5]]), relevant)
    with pytest.raises(ValueError, match="row 1 holds item 1 more than once"):
        metrics.hit_matrix(np.array([[0, 1], [1, 1]]), relevant)
    with pytest.raises(ValueError, match=r"expected shape \[2, k\]"):
        metrics.hit_matrix(np.zeros((3, 2), dtype=int), relevant)
    with pytest.raises(TypeError, match="expected integer item ids, got dtype float64"):
        metrics.hit_matrix(np.zeros((2, 2)), relevant)
    with pytest.raises(ValueError, match=r"at least max\(ks\) = 3 columns, got 2"):
        metrics.per_user(np.array([[0, 1], [1, 0]]), relevant, (1, 3))
    for ks, error in (((), ValueError), ((0,), ValueError), ((1.5,), TypeError), ((True,), TypeError)):
        with pytest.raises(error, match=r"^ks: expected"):
            metrics.check_ks(ks)
