"""A seeded generator of interactions whose taste can be read from the item features."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np

from .assemble import assemble
from .dataset import Dataset
from .errors import DataWarning
from .splits import by_label, random_by_user

__all__ = ["PAPER_SIZES", "of_size", "random_interactions", "synthetic"]

# users, items, interactions, feature widths (paper, Table 3)
PAPER_SIZES = {
    "tiktok": (14_343, 8_690, 276_637, (128, 128, 768)),
    "netflix": (43_739, 17_239, 609_341, (512, 768)),
    "electronics": (41_691, 21_479, 359_165, (4096, 1024)),
}

_MAX_ROUNDS = 200


def synthetic(
    num_users: int = 300,
    num_items: int = 200,
    num_interactions: int = 6000,
    *,
    modalities: Mapping[str, int] | None = None,
    latent_dim: int = 8,
    taste: float = 2.0,
    noise: float = 0.5,
    degree_sigma: float = 0.6,
    zipf: float = 0.6,
    val_fraction: float = 0.1,
    test_fraction: float = 0.1,
    seed: int = 0,
    name: str = "synthetic",
) -> Dataset:
    """Generate a data set with a planted modality signal.

    Users and items have latent vectors ``z ~ N(0, 1)^latent_dim``. User degrees are log-normal, items are
    proposed with Zipf popularity and accepted with probability ``sigmoid(taste * z_u . z_i /
    sqrt(latent_dim))``. Modality ``m`` is ``z_i W_m + noise * N(0, 1)``, ``W_m ~ N(0, 1/latent_dim)``, so
    the features tell the taste, and the more the smaller `noise`. ``taste=0`` plants nothing. Split at
    random by user.

    Args:
        num_interactions: pairs aimed at, train + val + test; a little fewer result when users want most of
            the items.
        modalities: name -> width; default ``{"image": 96, "text": 80}``.
        degree_sigma: spread of the log-normal user degrees.
        zipf: exponent of the item popularity.

    Returns:
        A `Dataset` with float32 features; the same arguments give the same bits.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    if num_users < 1 or num_items < 2 or latent_dim < 1:
        raise ValueError(
            f"expected num_users >= 1, num_items >= 2, latent_dim >= 1; got {num_users}, {num_items}, {latent_dim}"
        )
    if not num_users <= num_interactions <= num_users * num_items // 2:
        raise ValueError(
            f"num_interactions must be between num_users ({num_users}) and half of all pairs "
            f"({num_users * num_items // 2}), "
            f"got {num_interactions}"
        )
    rng = np.random.Generator(np.random.Philox(seed))
    user_taste = rng.standard_normal((num_users, latent_dim))
    item_taste = rng.standard_normal((num_items, latent_dim))
    degree = _degrees(rng, num_users, num_items, num_interactions, degree_sigma)
    users, items = _draw_pairs(rng, user_taste, item_taste, degree, taste / np.sqrt(latent_dim), zipf)
    features = {}
    for modality, width in ({"image": 96, "text": 80} if modalities is None else modalities).items():
        mixing = rng.standard_normal((latent_dim, width)) / np.sqrt(latent_dim)
        rows = (item_taste[:, :, None] * mixing).sum(1) if num_items * width < 1 << 16 else item_taste @ mixing
        features[modality] = (rows + noise * rng.standard_normal((num_items, width))).astype(np.float32)
    labels = random_by_user(users, items, val=val_fraction, test=test_fraction, seed=seed)
    parts = by_label(users, items, labels, val_fraction > 0, test_fraction > 0)
    note = f"generated: taste {taste:g}, noise {noise:g}, seed {seed}"
    return assemble(name, parts, np.arange(num_users), np.arange(num_items), features, notes=(note,))


def random_interactions(num_users: int, num_items: int, num_pairs: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Exactly `num_pairs` distinct (user, item) pairs: log-normal user degrees, Zipf-like item popularity, no taste."""
    rng = np.random.default_rng(seed)
    user_weight = rng.lognormal(0.0, 1.0, num_users)
    item_weight = 1.0 / np.arange(1, num_items + 1) ** 0.8
    item_weight = item_weight[rng.permutation(num_items)]
    user_weight, item_weight = user_weight / user_weight.sum(), item_weight / item_weight.sum()
    pairs = np.empty(0, dtype=np.int64)
    while pairs.size < num_pairs:  # duplicates are drawn again until the count is exact
        more = int((num_pairs - pairs.size) * 1.2) + 16
        drawn = rng.choice(num_users, more, p=user_weight) * num_items + rng.choice(num_items, more, p=item_weight)
        pairs = np.unique(np.concatenate([pairs, drawn]))
    pairs = rng.permutation(pairs)[:num_pairs]
    return pairs // num_items, pairs % num_items


def of_size(
    num_users: int, num_items: int, num_pairs: int, widths: Sequence[int], *, seed: int = 0, name: str = "sized"
) -> Dataset:
    """A data set of a given size to measure time and memory with: nothing can be learned from it.

    `num_pairs` train pairs of `random_interactions`, one random validation pair for at most 5,000 users, and normal
    float32 features `m0, m1, ...` of the given widths.
    """
    rng = np.random.default_rng(seed + 1)
    train = random_interactions(num_users, num_items, num_pairs, seed)
    users = np.arange(min(num_users, 5_000))
    held = (users, rng.integers(0, num_items, len(users)))
    known = np.isin(held[0] * num_items + held[1], train[0] * num_items + train[1])
    parts = {"train": train, "val": (held[0][~known], held[1][~known])}
    features = {f"m{i}": rng.standard_normal((num_items, width), dtype=np.float32) for i, width in enumerate(widths)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # some users have no train item, as in any such draw
        return assemble(name, parts, np.arange(num_users), np.arange(num_items), features, notes=("sizes only",))


def _degrees(rng: np.random.Generator, num_users: int, num_items: int, total: int, sigma: float) -> np.ndarray:
    """Log-normal degrees with the wanted sum, each between 1 and half of the items."""
    raw = rng.lognormal(0.0, sigma, num_users)
    degree = np.clip(np.rint(raw * total / raw.sum()), 1, max(1, num_items // 2)).astype(np.int64)
    while (rest := total - int(degree.sum())) != 0:
        room = np.flatnonzero(degree < max(1, num_items // 2)) if rest > 0 else np.flatnonzero(degree > 1)
        if not len(room):
            break
        chosen = rng.permutation(room)[: abs(rest)]
        degree[chosen] += np.sign(rest)
    return degree


def _draw_pairs(
    rng: np.random.Generator,
    user_taste: np.ndarray,
    item_taste: np.ndarray,
    degree: np.ndarray,
    scale: float,
    zipf: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Distinct (user, item) pairs, sorted: proposals by popularity, accepted by taste, until every user has
    his degree."""
    num_users, num_items = len(user_taste), len(item_taste)
    popularity = rng.permutation(np.arange(1, num_items + 1, dtype=np.float64) ** -zipf)
    cumulative = np.cumsum(popularity)
    pairs = np.empty(0, np.int64)
    missing = degree.copy()
    for _ in range(_MAX_ROUNDS):
        if not missing.any():
            break
        users = np.repeat(np.arange(num_users), 2 * missing)
        items = np.searchsorted(cumulative, rng.random(len(users)) * cumulative[-1], side="right")
        items = np.minimum(items, num_items - 1)
        accept = _sigmoid(scale * np.einsum("nk,nk->n", user_taste[users], item_taste[items])) > rng.random(len(users))
        fresh = np.setdiff1d(users[accept] * num_items + items[accept], pairs)
        fresh = fresh[rng.permutation(len(fresh))]
        fresh = fresh[np.argsort(fresh // num_items, kind="stable")]
        owner = fresh // num_items
        rank = np.arange(len(fresh)) - np.searchsorted(owner, owner)
        pairs = np.union1d(pairs, fresh[rank < missing[owner]])
        missing = degree - np.bincount(pairs // num_items, minlength=num_users)
    return pairs // num_items, pairs % num_items


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * x))
