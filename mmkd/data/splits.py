"""Splits of distinct pairs into train, validation and test: one uint8 label a pair, 0, 1 or 2."""

from __future__ import annotations

import numpy as np

from .errors import DataError

__all__ = [
    "TEST",
    "TRAIN",
    "VAL",
    "by_label",
    "check_fractions",
    "leave_last_out",
    "random_by_user",
    "time_cut",
]

TRAIN, VAL, TEST = 0, 1, 2


def check_fractions(val: float, test: float) -> None:
    """Raise ValueError unless both are in [0, 1) and leave something to train on."""
    for name, value in (("val_fraction", val), ("test_fraction", test)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1), got {value}")
    if val + test >= 1:
        raise ValueError(f"val_fraction + test_fraction must be below 1 to leave a train set, got {val} + {test}")


def _rank_in_group(groups: np.ndarray, *keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rank from the end (0 = last by `keys`) of each element in its group, and the group's size."""
    order = np.lexsort((*keys[::-1], groups))
    sizes = np.bincount(groups) if len(groups) else np.zeros(0, np.int64)
    end = np.cumsum(sizes)
    rank = np.empty(len(groups), np.int64)
    rank[order] = end[groups[order]] - 1 - np.arange(len(groups))
    return rank, sizes[groups]


def random_by_user(
    users: np.ndarray, items: np.ndarray, *, val: float = 0.1, test: float = 0.1, seed: int = 0
) -> np.ndarray:
    """Draw each user's validation and test pairs at random.

    A user with `n` pairs gives ``round(n * test)`` (halves up) of them to test and ``round(n * val)`` to
    validation, and keeps at least one for train. The result depends on the set of pairs and the seed, not on
    the order of the rows.
    """
    check_fractions(val, test)
    order = np.lexsort((items, users))
    key = np.empty(len(users))
    key[order] = np.random.Generator(np.random.Philox(seed)).random(len(users))
    rank, size = _rank_in_group(np.asarray(users, np.int64), key, np.asarray(items))
    num_test = np.minimum((size * test + 0.5).astype(np.int64), size - 1)
    num_val = np.minimum((size * val + 0.5).astype(np.int64), size - 1 - num_test)
    labels = np.full(len(users), TRAIN, np.uint8)
    labels[rank < num_test + num_val] = VAL
    labels[rank < num_test] = TEST
    return labels


def leave_last_out(users: np.ndarray, items: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Each user's last pair is test, the one before it validation, the others train.

    A user with fewer than three pairs stays in train. Equal times are ordered by item id.
    """
    rank, size = _rank_in_group(np.asarray(users, np.int64), times, np.asarray(items))
    labels = np.full(len(users), TRAIN, np.uint8)
    labels[(rank == 1) & (size >= 3)] = VAL
    labels[(rank == 0) & (size >= 3)] = TEST
    return labels


def time_cut(times: np.ndarray, *, val: float = 0.1, test: float = 0.1) -> tuple[np.ndarray, tuple]:
    """Cut the whole set at two moments: train is before the first, test from the second on.

    The cuts are the times at positions ``floor(n (1 - val - test))`` and ``floor(n (1 - test))`` of the
    sorted times; pairs of one moment are never separated.

    Returns:
        labels, and ``(first cut, second cut)``; a cut is None where its part has fraction 0.

    Raises:
        DataError: nothing is left for train (too many pairs at one moment).
    """
    check_fractions(val, test)
    ordered = np.sort(times)
    labels = np.full(len(times), TRAIN, np.uint8)
    cuts: list = [None, None]
    for index, (part, share) in enumerate(((VAL, val + test), (TEST, test))):
        if share > 0 and (part == TEST or val > 0):
            position = min(int(np.floor(len(times) * (1 - share) + 1e-9)), len(times) - 1)
            cuts[index] = ordered[position].item()
            labels[times >= cuts[index]] = part
    if len(times) and not (labels == TRAIN).any():
        raise DataError(
            "time split: no pair is earlier than the first cut "
            f"({cuts[0] if cuts[0] is not None else cuts[1]}), so the "
            "train set is empty; use smaller fractions or another split"
        )
    return labels, tuple(cuts)


def by_label(
    users: np.ndarray, items: np.ndarray, labels: np.ndarray, val: bool = True, test: bool = True
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Pairs by part name; a part that is not asked for is left out."""
    wanted = {"train": TRAIN} | ({"val": VAL} if val else {}) | ({"test": TEST} if test else {})
    return {part: (users[labels == label], items[labels == label]) for part, label in wanted.items()}
