"""The generator: seeded, of the size asked for, and with a signal that features carry."""

from __future__ import annotations

import numpy as np
import pytest

from mmkd.data import load, synthetic


def test_same_seed_same_bits():
    first, again, other = synthetic(seed=5), synthetic(seed=5), synthetic(seed=6)
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    assert load("synthetic", seed=5).fingerprint() == first.fingerprint()


@pytest.mark.parametrize("size", [(300, 200, 6000), (50, 20, 400), (2000, 1000, 30000), (4, 2, 4)])
def test_size(size):
    num_users, num_items, total = size
    data = synthetic(*size, modalities={"a": 70}, val_fraction=0, test_fraction=0.2, seed=1)
    assert (data.num_users, data.num_items) == (num_users, num_items) and data.val is None
    assert data.features["a"].shape == (num_items, 70) and data.features["a"].dtype == np.float32
    assert 0.98 * total <= data.train.nnz + data.test.nnz <= total
    assert np.diff(data.train.indptr).min() >= 1


def mean_rank_by_content(taste: float) -> float:
    """How a user's validation items rank (0 best, 0.5 chance) by similarity to his train items' features."""
    data = synthetic(400, 300, 9000, taste=taste, noise=0.3, zipf=0.0, seed=3)
    rows = data.features["image"] / np.linalg.norm(data.features["image"], axis=1, keepdims=True)
    scores = (data.train @ rows) @ rows.T
    scores[data.train.nonzero()] = -np.inf
    users, items = data.val.nonzero()
    return float((scores[users] > scores[users, items][:, None]).mean())


def test_features_tell_the_taste():
    assert mean_rank_by_content(3.0) < 0.35
    assert abs(mean_rank_by_content(0.0) - 0.45) < 0.1


@pytest.mark.parametrize("size", [(0, 5, 5), (5, 1, 5), (10, 10, 9), (10, 10, 51)])
def test_sizes_that_do_not_fit(size):
    with pytest.raises(ValueError, match="got"):
        synthetic(*size)
