"""The all-ranking protocol: what is masked, who is left out, how ties fall, and no leak from test."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from mmkd.data import Dataset
from mmkd.evaluation import (
    evaluate,
    evaluate_per_user,
    evaluate_scores,
    evaluate_scores_per_user,
    evaluator,
    metrics,
    rank_scores,
)
from mmkd.finite import all_finite


def csr(dense: np.ndarray) -> sp.csr_matrix:
    return sp.csr_matrix(dense.astype(np.float32))


def make(seed: int = 0, users: int = 50, items: int = 70) -> Dataset:
    """Disjoint random parts; a third of the users have nothing in validation."""
    rng = np.random.default_rng(seed)
    draw = rng.random((users, items))
    train, val, test = draw < 0.15, (draw >= 0.15) & (draw < 0.2), (draw >= 0.2) & (draw < 0.25)
    val[::3] = False
    return Dataset("made", csr(train), csr(val), csr(test), {}, np.arange(users), np.arange(items))


def integer_tables(dataset: Dataset, d: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Small integers: inner products are exact and full of ties."""
    generator = torch.Generator().manual_seed(1)
    return tuple(
        torch.randint(-2, 3, (n, d), generator=generator).float() for n in (dataset.num_users, dataset.num_items)
    )


def by_hand(scores: np.ndarray, dataset: Dataset, part: str, ks) -> dict[str, np.ndarray]:
    masked = dataset.train.toarray() > 0
    if part == "test":
        masked |= dataset.val.toarray() > 0
    relevant = getattr(dataset, part)
    rows = np.flatnonzero(np.diff(relevant.indptr))
    ranked = np.full((rows.size, max(ks)), -1)
    for place, user in enumerate(rows):
        items = [i for i in range(dataset.num_items) if not masked[user, i]]
        items.sort(key=lambda i, user=user: (-scores[user, i], i))
        items = items[: max(ks)]
        ranked[place, : len(items)] = items
    return metrics.per_user(ranked, relevant[rows], ks)


@pytest.mark.parametrize("part", ["val", "test"])
@pytest.mark.parametrize("chunk", [1, 1 << 22])
def test_both_ways_equal_ranking_by_hand(part, chunk, monkeypatch):
    monkeypatch.setattr(evaluator, "SCORES_PER_CHUNK", chunk)
    dataset = make()
    user_emb, item_emb = integer_tables(dataset)
    scores = (user_emb @ item_emb.T).numpy()
    ks = (5, 10, 100)  # 100 is more than there are items
    wanted = by_hand(scores, dataset, part, ks)
    tables = evaluate_per_user(user_emb, item_emb, dataset, part, ks)
    function = evaluate_scores_per_user(lambda users: scores[users], dataset, part, ks)
    for got in (tables, function):
        assert got.values.keys() == wanted.keys()
        for name, value in wanted.items():
            np.testing.assert_array_equal(got.values[name], value, err_msg=name)
    assert (np.diff(getattr(dataset, part).indptr)[tables.users] > 0).all()
    assert evaluate(user_emb, item_emb, dataset, part, ks) == tables.mean()
    assert tables.mean() == pytest.approx({name: value.mean() for name, value in wanted.items()})


def test_users_without_validation_items_are_left_out():
    dataset = make()
    got = evaluate_per_user(*integer_tables(dataset), dataset)
    assert got.users.tolist() == [u for u in range(50) if dataset.val[u].nnz]
    assert len(got.users) < 50
    assert all(len(value) == len(got.users) for value in got.values.values())
    assert set(got.values) == {f"{name}@{k}" for name in metrics.NAMES for k in (10, 20, 50)}


def test_validation_does_not_see_test():
    dataset = make()
    tables = integer_tables(dataset)
    other = replace(dataset, test=csr(np.random.default_rng(5).random((50, 70)) < 0.5))
    assert evaluate(*tables, dataset, "val") == evaluate(*tables, other, "val")
    assert evaluate(*tables, dataset, "test") != evaluate(*tables, other, "test")
    assert evaluate(*tables, replace(dataset, test=None), "val") == evaluate(*tables, dataset, "val")


def test_test_part_without_validation():
    dataset = replace(make(), val=None)
    user_emb, item_emb = integer_tables(dataset)
    full = replace(dataset, val=csr(np.zeros((50, 70))))
    assert evaluate(user_emb, item_emb, dataset, "test") == evaluate(user_emb, item_emb, full, "test")


def test_a_model_that_remembers_train_gains_nothing():
    dataset = make()
    seen = dataset.train.toarray()
    ranked_last = evaluate_scores(lambda users: 100 * seen[users], dataset, "val", (10,))
    blank = evaluate_scores(lambda users: 0 * seen[users], dataset, "val", (10,))
    assert ranked_last == blank


def test_inputs_are_not_written():
    dataset = make()
    scores = np.random.default_rng(0).random((50, 70)).astype(np.float32)
    before, train = scores.copy(), dataset.train.copy()
    evaluate_scores(lambda users: scores, replace(dataset, val=csr(np.ones((50, 70)) - dataset.train)), "val", (5,))
    assert np.array_equal(scores, before) and (dataset.train != train).nnz == 0


@pytest.mark.parametrize("seed", range(3))
def test_rank_scores_breaks_ties_by_id(seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, (30, 40)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.2] = -np.inf
    scores[0] = -np.inf
    scores[1, 3:] = -np.inf
    for k in (1, 7, 40):
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        wanted = np.where(np.take_along_axis(scores, order, axis=1) == -np.inf, -1, order)
        np.testing.assert_array_equal(rank_scores(scores, k), wanted)
    with pytest.raises(ValueError, match="expected 1 to 40"):
        rank_scores(scores, 41)


def test_refusals():
    dataset = make()
    user_emb, item_emb = integer_tables(dataset)
    with pytest.raises(ValueError, match="part: expected 'val' or 'test', got 'train'"):
        evaluate(user_emb, item_emb, dataset, "train")
    with pytest.raises(ValueError, match="part: 'test' of data set 'made' is missing"):
        evaluate(user_emb, item_emb, replace(dataset, test=None), "test")
    with pytest.raises(ValueError, match="part: 'val' of data set 'made' has no interactions"):
        evaluate(user_emb, item_emb, replace(dataset, val=csr(np.zeros((50, 70)))), "val")
    with pytest.raises(ValueError, match=r"user_emb: expected shape \[50, d\]"):
        evaluate(item_emb, item_emb, dataset)
    broken = item_emb.clone()
    broken[7, 1] = float("nan")
    with pytest.raises(ValueError, match="item_emb: row 7 holds NaN"):
        evaluate(user_emb, broken, dataset)
    with pytest.raises(ValueError, match=r"score_fn: expected scores of shape \(31, 70\), got \(31, 3\)"):
        evaluate_scores(lambda users: np.zeros((len(users), 3)), dataset)
    with pytest.raises(ValueError, match=r"score_fn: NaN among the scores of user [0-9]+"):
        evaluate_scores(lambda users: np.full((len(users), 70), np.nan), dataset)
    with pytest.raises(ValueError, match="ks: expected cut-offs >= 1, got 0"):
        evaluate(user_emb, item_emb, dataset, ks=(0,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_all_finite_sees_one_bad_number(dtype):
    table = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert all_finite(table) and all_finite(table[:0]) and all_finite(torch.tensor(2.0))
    for bad in (float("nan"), float("inf"), -float("inf")):
        for place in ((0, 0), (49, 6), (23, 3)):
            broken = table.clone()
            broken[place] = bad
            assert not all_finite(broken) and not all_finite(broken.T)
