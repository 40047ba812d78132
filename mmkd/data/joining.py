"""New interactions join known ones: ids extended at the end, new pairs split, nothing known moves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import sparse

from . import splits
from .assemble import assemble, to_csr
from .dataset import Dataset
from .errors import DataError
from .ids import distinct, locate
from .pairs import Pairs, merge_pairs
from .table import RawInteractions

__all__ = ["Joined", "extend_ids", "join"]


@dataclass(frozen=True, eq=False)
class Joined:
    """What `join` made.

    Attributes:
        dataset: train = everything known and the new pairs that teach; val, test = new pairs only (None where their
            fraction is 0). Known users and items keep their positions, new ones follow in order of their ids.
        fresh: ``U x I``, the new pairs of train.
        known_users, known_items: how many there were before.
        repeated: pairs of the file that were known already.
    """

    dataset: Dataset
    fresh: sparse.csr_matrix
    known_users: int
    known_items: int
    repeated: int

    @property
    def pairs(self) -> int:
        """Distinct new pairs, in all parts."""
        held = (part.nnz for part in (self.dataset.val, self.dataset.test) if part is not None)
        return self.fresh.nnz + sum(held)


def extend_ids(known: np.ndarray, found: np.ndarray, what: str, path: Path) -> np.ndarray:
    """`known` followed by the ids of `found` that are not in it, sorted.

    Args:
        known: original ids by position, integers or text.
        found: ids of each row of `path`.
        what: "user" or "item", for messages.

    Raises:
        DataError: `known` are integers and a row of `found` is not.
    """
    if known.dtype.kind in "iu":
        if found.dtype.kind != "i":
            row, value = next((row, value) for row, value in enumerate(found.tolist(), 1) if not _is_integer(value))
            raise DataError(
                f"{path}: row {row}, {what} {value!r}: expected a whole number without leading zeros, as the {what} ids of "
                "the run are; map the ids as they were mapped for the run"
            )
        known = known.astype(np.int64)
    else:
        found = found.astype(str)
    return np.concatenate([known, distinct(found[locate(known, found) < 0])])


def _is_integer(text: str) -> bool:
    try:
        return str(np.int64(text)) == text
    except (ValueError, OverflowError):
        return False


def join(
    name: str,
    known: sparse.csr_matrix,
    user_ids: np.ndarray,
    item_ids: np.ndarray,
    rows: RawInteractions,
    path: Path,
    *,
    val_fraction: float = 0.1,
    test_fraction: float = 0.1,
    seed: int = 0,
    item_names: np.ndarray | None = None,
) -> Joined:
    """Known interactions plus the rows of one file, as a data set whose validation and test parts are new pairs.

    With timestamps the new pairs are cut at two moments, the latest are test; without, pairs are drawn at random, except
    those that are the only trace of a new user or item.

    Args:
        known: ``U x I`` CSR, everything interacted with so far.
        user_ids, item_ids: original ids by position.
        rows, path: the new interactions, and their file for messages.
        item_names: ``[I]`` text to show, or None; a new item shows its id.

    Raises:
        DataError: ids of another type than the known ones; no new pair in the file; too few of them to hold any out.
    """
    users, items = extend_ids(user_ids, rows.users, "user", path), extend_ids(item_ids, rows.items, "item", path)
    shape = (len(users), len(items))
    before = sparse.csr_matrix((known.data, known.indices, known.indptr), shape=known.shape)
    before.resize(shape)
    pairs = merge_pairs(locate(users, rows.users), locate(items, rows.items), rows.times)
    fresh = np.asarray(before[pairs.users, pairs.items]).ravel() == 0
    repeated, pairs = int((~fresh).sum()), pairs.select(fresh)
    if not len(pairs.users):
        raise DataError(f"{path}: all {repeated} pairs are known to the run already; expected at least one new pair")
    labels, note = _split(pairs, before, val_fraction, test_fraction, seed, path)
    parts = splits.by_label(pairs.users, pairs.items, labels, val_fraction > 0, test_fraction > 0)
    new = to_csr(*parts["train"], *shape)
    old = before.tocoo()
    parts["train"] = tuple(np.concatenate(both) for both in zip((old.row, old.col), parts["train"], strict=True))
    notes = (note,) + ((f"{repeated} pairs were known already",) if repeated else ())
    names = None if item_names is None else np.concatenate([item_names, items[len(item_ids) :].astype(str)])
    dataset = assemble(name, parts, users, items, {}, item_names=names, notes=notes, source=str(path))
    return Joined(dataset, new, len(user_ids), len(item_ids), repeated)


def _split(
    pairs: Pairs, before: sparse.csr_matrix, val: float, test: float, seed: int, path: Path
) -> tuple[np.ndarray, str]:
    splits.check_fractions(val, test)
    if pairs.times is not None:
        labels, cuts = splits.time_cut(pairs.times, val=val, test=test)
        note = f"new pairs cut by time at {' and '.join(str(c) for c in cuts if c is not None) or 'no moment'}"
    else:
        draw = np.random.Generator(np.random.Philox(seed)).permutation(len(pairs.users)) / len(pairs.users)
        labels = np.where(draw < test, splits.TEST, np.where(draw < test + val, splits.VAL, splits.TRAIN))
        labels[_only_traces(pairs.users, np.diff(before.indptr), labels)] = splits.TRAIN
        labels[_only_traces(pairs.items, np.bincount(before.indices, minlength=before.shape[1]), labels)] = splits.TRAIN
        note = f"new pairs split at random, seed {seed}"
    for part, label, share in (("train", splits.TRAIN, 1.0), ("val", splits.VAL, val), ("test", splits.TEST, test)):
        if share > 0 and not (labels == label).any():
            raise DataError(
                f"{path}: {len(pairs.users)} new pairs are too few to hold out {val:g} for validation and {test:g} for test "
                f"({part} is empty); set update.val_fraction=0 and update.test_fraction=0 to train on all of them unmeasured"
            )
    return labels.astype(np.uint8), note


def _only_traces(ids: np.ndarray, known_degree: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mask of the held-out pairs whose user (or item) has no train pair, old or new."""
    degree = known_degree + np.bincount(ids[labels == splits.TRAIN], minlength=len(known_degree))
    return (labels != splits.TRAIN) & (degree[ids] == 0)
