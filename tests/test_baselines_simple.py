"""Popularity and item-kNN: their formulas in dense float64, what they may read, and that they are worth beating."""

from __future__ import annotations

import warnings
from dataclasses import asdict, replace

import numpy as np
import pytest
import scipy.sparse as sp

from mmkd.data import Dataset, load, synthetic
from mmkd.evaluation import evaluate_scores
from mmkd.models.baselines import ItemKNN, Popularity, item_knn


def csr(dense: np.ndarray) -> sp.csr_matrix:
    return sp.csr_matrix(dense.astype(np.float32))


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """Users and items in four groups; popular items first; one user without train items, one item nobody has."""
    rng = np.random.default_rng(0)
    users, items = 120, 60
    same = rng.integers(0, 4, users)[:, None] == (np.arange(items) % 4)[None]
    have = rng.random((users, items)) < np.where(same, 0.5, 0.05) * np.linspace(1.2, 0.4, items)
    have[0], have[:, 59] = False, False
    part = rng.random((users, items))
    train, val, test = have & (part < 0.7), have & (part >= 0.7) & (part < 0.85), have & (part >= 0.85)
    return Dataset("groups", csr(train), csr(val), csr(test), {}, np.arange(users), np.arange(items))


def similarity(train: np.ndarray, neighbors: int, shrink: float, weight: float, power: float) -> np.ndarray:
    """Column j: the neighbours of item j."""
    degree, popularity = np.maximum(train.sum(1), 1), np.maximum(train.sum(0), 1)
    s = train.T @ (degree[:, None] ** -weight * train) / (np.sqrt(popularity)[:, None] * popularity**power + shrink)
    np.fill_diagonal(s, 0.0)
    for j in range(len(s)):
        order = np.argsort(-s[:, j], kind="stable")
        s[order[neighbors:], j] = 0.0
    return s


@pytest.mark.parametrize("settings", [(5, 10.0, 0.0, 0.5), (20, 0.0, 0.5, 0.25), (500, 2.0, 1.0, 0.0)])
@pytest.mark.parametrize("block", [1, 1 << 22])
def test_item_knn_is_its_formula(dataset, settings, block, monkeypatch):
    monkeypatch.setattr(item_knn, "ENTRIES_PER_BLOCK", block)
    model = ItemKNN(*settings).fit(dataset)
    train = dataset.train.toarray().astype(np.float64)
    wanted = train @ similarity(train, *settings)
    users = np.array([3, 0, 119, 3])
    np.testing.assert_allclose(model.scores(users), wanted[users], rtol=2e-6, atol=1e-7)
    assert model.scores(users).dtype == np.float32
    assert (model.scores(np.array([0])) == 0).all()
    assert model.num_parameters == np.count_nonzero(similarity(train, *settings))
    assert model.trials == {}


def test_plain_cosine_is_sklearns(dataset):
    pairwise = pytest.importorskip("sklearn.metrics.pairwise")
    wanted = pairwise.cosine_similarity(dataset.train.T.toarray())
    np.fill_diagonal(wanted, 0.0)
    model = ItemKNN(60, 0.0, 0.0, 0.5).fit(dataset)
    np.testing.assert_allclose(model.similarity.toarray(), wanted, atol=1e-6)


def test_popularity_counts_train_only(dataset):
    model = Popularity().fit(dataset)
    scores = model.scores(np.array([5, 1]))
    np.testing.assert_array_equal(scores[0], dataset.train.toarray().sum(0))
    np.testing.assert_array_equal(scores[0], scores[1])
    assert model.num_parameters == dataset.num_items


@pytest.mark.parametrize("model", [Popularity, ItemKNN])
def test_the_test_part_is_never_read(dataset, model):
    class Closed(Dataset):
        @property
        def test(self):
            raise AssertionError("a baseline read the test part while fitting")

        @test.setter
        def test(self, value):
            raise AssertionError

    closed = object.__new__(Closed)
    closed.__dict__.update({name: value for name, value in vars(dataset).items() if name != "test"})
    users = np.arange(10)
    np.testing.assert_array_equal(model().fit(closed).scores(users), model().fit(dataset).scores(users))


@pytest.mark.parametrize(("block", "kept"), [(1, 1 << 23), (1 << 9, 0), (1 << 9, 4000)])
def test_pairs_that_are_kept_change_nothing(dataset, block, kept, monkeypatch):
    truth = ItemKNN().fit(dataset)
    monkeypatch.setattr(item_knn, "ENTRIES_PER_BLOCK", block)
    monkeypatch.setattr(item_knn, "ENTRIES_KEPT", kept)
    model = ItemKNN().fit(dataset)
    assert model.trials == truth.trials and (model.similarity != truth.similarity).nnz == 0


def test_every_trial_is_that_of_its_settings(dataset):
    for settings, metric in ItemKNN().fit(dataset).trials.items():
        alone = ItemKNN(**asdict(settings)).fit(dataset)
        assert metric == evaluate_scores(alone.scores, dataset, "val", (20,))["recall@20"], settings


def test_nothing_of_a_search_that_broke_off_is_left(dataset, monkeypatch):
    model, truth = ItemKNN(), ItemKNN().fit(dataset)
    other = synthetic(60, 90, 900, seed=8)

    def broken(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(item_knn, "evaluate_scores", broken)
        model.fit(other)
    assert model.fit(dataset).trials == truth.trials


def test_settings_are_the_best_of_validation_and_repeat(dataset):
    model = ItemKNN().fit(dataset)
    assert model.trials[model.settings] == max(model.trials.values())
    assert model.trials[model.settings] == evaluate_scores(model.scores, dataset, "val", (20,))["recall@20"]
    assert len(model.trials) <= 18
    again = ItemKNN().fit(dataset)
    assert again.settings == model.settings and (again.similarity != model.similarity).nnz == 0
    assert model.fit(dataset).settings == again.settings  # a second fit chooses anew
    given = ItemKNN(neighbors=7, shrink=3.0).fit(dataset)
    assert (given.settings.neighbors, given.settings.shrink) == (7, 3.0) and given.trials


def test_without_validation_the_defaults_hold(dataset):
    for val in (None, csr(np.zeros(dataset.train.shape))):
        model = ItemKNN(neighbors=9).fit(replace(dataset, val=val))
        assert model.settings == item_knn.KNNSettings(neighbors=9) and model.trials == {}


def test_groups_are_found(dataset):
    knn = evaluate_scores(ItemKNN().fit(dataset).scores, dataset, "test", (10,))["recall@10"]
    popularity = evaluate_scores(Popularity().fit(dataset).scores, dataset, "test", (10,))["recall@10"]
    assert knn > 1.5 * popularity


def test_refusals():
    for name, value in (("neighbors", 0), ("shrink", -1.0), ("shrink", float("nan")), ("user_weight", 3.0)):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            ItemKNN(**{name: value})
    for model in (ItemKNN(), Popularity()):
        with pytest.raises(RuntimeError, match="call fit"):
            model.scores(np.array([0]))


def test_strong_on_real_data(shared_data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiktok = load(shared_data / "tiktok")
    popularity = evaluate_scores(Popularity().fit(tiktok).scores, tiktok, "val", (20,))["recall@20"]
    assert popularity == pytest.approx(0.0626, abs=5e-4)
    knn = ItemKNN(200, 10.0, 1.0, 0.25).fit(tiktok)  # what the search finds there
    assert evaluate_scores(knn.scores, tiktok, "val", (20,))["recall@20"] > 0.095
