"""Recommendations from a finished run: original ids in, original ids out."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmkd.data.files import open_npz
from mmkd.data.ids import as_ids, first_duplicate, locate
from mmkd.data.npz import read_csr
from mmkd.finite import all_finite
from mmkd.serving.ranking import Ranking


class RunLoadError(ValueError):
    """A run folder that cannot be served; the message names the file and what is wrong."""


@dataclass(frozen=True)
class Recommendation:
    """One recommended item."""

    item: object  # original id
    score: float
    name: str | None = None


class Recommender:
    """A trained student: two tables and the ids they belong to.

    Args:
        user_emb, item_emb: floating `[U, d]`, `[I, d]`, finite.
        user_ids, item_ids: original ids by position, integers or text, each once.
        seen: sparse `U x I`, what a user already has.
        item_names: display text by position, or None.

    Raises:
        RunLoadError: parts that do not go together, ids that are there twice, NaN or Inf in a table.
    """

    def __init__(
        self, user_emb: Tensor, item_emb: Tensor, user_ids: np.ndarray, item_ids: np.ndarray, seen: sp.csr_matrix,
        item_names: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        _check_tables(user_emb, item_emb)
        for name, ids, rows in (("user_ids", user_ids, len(user_emb)), ("item_ids", item_ids, len(item_emb))):
            _check_ids(name, ids, rows)
        if item_names is not None and item_names.shape != (len(item_ids),):
            raise RunLoadError(f"item_names: expected {len(item_ids)} entries, got shape {item_names.shape}")
        self.user_emb, self.item_emb, self.seen = user_emb, item_emb, _checked_seen(seen, len(user_ids), len(item_ids))
        self.user_ids, self.item_ids, self.item_names = user_ids, item_ids, item_names
        self._position = {str(user): row for row, user in enumerate(user_ids.tolist())}
        self._ranking = Ranking(user_emb, item_emb, self.seen)

    def restricted(self, allow: Iterable | None = None, deny: Iterable | None = None) -> Recommender:
        """The same student recommending only items of `allow` (all, if not given) that are not in `deny`.

        Args:
            allow, deny: original item ids. An id of `allow` must be known; one of `deny` need not be.

        Raises:
            ValueError: an id of `allow` is unknown, or no item is left.
        """
        keep = np.ones(len(self.item_ids), bool)
        if allow is not None:
            keep[:] = False
            keep[self._item_rows("allow", allow)] = True
        if deny is not None:
            keep[self._item_rows("deny", deny, unknown_too=True)] = False
        rows = np.flatnonzero(keep)
        if not rows.size:
            raise ValueError(f"allow, deny: none of the {len(self.item_ids)} items is left to recommend")
        view = copy.copy(self)
        view._ranking = Ranking(self.user_emb, self.item_emb, self.seen, rows)
        return view

    def _item_rows(self, name: str, ids: Iterable, unknown_too: bool = False) -> np.ndarray:
        wanted = as_ids(np.asarray(ids if isinstance(ids, np.ndarray) else list(ids)))
        rows = locate(self.item_ids, wanted)
        if not unknown_too and (rows < 0).any():
            item = wanted[np.flatnonzero(rows < 0)[0]].item()
            near = _nearest(item, self.item_ids)
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise ValueError(f"{name}: {item!r} is not among the {len(self.item_ids)} items of this run{hint}")
        return rows[rows >= 0]

    def find(self, users: Iterable) -> np.ndarray:
        """Rows of original user ids, int64; -1 for an unknown id."""
        get = self._position.get
        return np.fromiter((get(str(user), -1) for user in users), np.int64)

    def positions(self, users: Iterable) -> np.ndarray:
        """Rows of original user ids, int64. An unknown id raises ValueError with the nearest known ones."""
        users = list(users)
        rows = self.find(users)
        if (rows < 0).any():
            raise ValueError(f"users: {self.unknown(users[int(np.argmax(rows < 0))])}")
        return rows

    def unknown(self, user: object) -> str:
        """What to say about an id that no user has: the nearest known ones."""
        near = _nearest(user, self.user_ids)
        hint = f"; near it: {', '.join(near)}" if near else ""
        return f"{user!r} is not among the {len(self.user_ids)} users of this run{hint}"

    def topk(self, rows: np.ndarray, k: int, exclude_seen: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Scores float32 `[n, k]` and item rows int64 `[n, k]` (-1: no item left) for user rows `[n]`."""
        if k < 1:
            raise ValueError(f"k: expected >= 1, got {k}")
        return self._ranking.topk(np.asarray(rows, np.int64), k, exclude_seen)

    def recommend(self, users, k: int = 10, exclude_seen: bool = True) -> list[list[Recommendation]]:
        """The `k` best items of each user, best first; fewer where fewer are left.

        Args:
            users: original ids, or a single one.
            k: at least 1.
            exclude_seen: leave out the items of the user's train and validation interactions.
        """
        users = [users] if isinstance(users, (str, bytes, int, np.integer)) else list(users)
        scores, ids = self.topk(self.positions(users), k, exclude_seen)
        return [
            [self._one(item, score) for item, score in zip(row, values, strict=True) if item >= 0]
            for row, values in zip(ids.tolist(), scores.tolist(), strict=True)
        ]

    def _one(self, item: int, score: float) -> Recommendation:
        name = None if self.item_names is None else str(self.item_names[item])
        return Recommendation(self.item_ids[item].item(), score, name)


def _nearest(user: object, ids: np.ndarray) -> list[str]:
    """Up to three known ids: the nearest numbers for a number, the most alike texts for a text."""
    text = str(user)
    if ids.dtype.kind in "iu":
        digits = text.removeprefix("-")
        if not (digits.isdecimal() and len(digits) < 19):
            return [str(known) for known in ids[:3].tolist()]
        distance = np.abs(ids.astype(np.float64) - int(text))
        return [str(known) for known in ids[np.argsort(distance, kind="stable")[:3]].tolist()]
    return difflib.get_close_matches(text, ids.tolist(), n=3, cutoff=0.4)


def _check_tables(user_emb: Tensor, item_emb: Tensor) -> None:
    for name, table in (("user_emb", user_emb), ("item_emb", item_emb)):
        if table.ndim != 2 or not table.is_floating_point():
            raise RunLoadError(f"{name}: expected a floating [n, d] table, got {table.dtype} {tuple(table.shape)}")
        if not all_finite(table):
            raise RunLoadError(f"{name}: holds NaN or Inf, so nothing can be ranked by it; train again")
    if user_emb.shape[1] != item_emb.shape[1] or user_emb.dtype != item_emb.dtype:
        raise RunLoadError(
            f"item_emb: expected width and dtype of user_emb ({user_emb.shape[1]}, {user_emb.dtype}), "
            f"got {item_emb.shape[1]}, {item_emb.dtype}"
        )


def _check_ids(name: str, ids: np.ndarray, rows: int) -> None:
    if ids.shape != (rows,):
        raise RunLoadError(f"{name}: expected {rows} ids, one for each row of the table, got shape {ids.shape}")
    if ids.dtype.kind not in "iuU":
        raise RunLoadError(f"{name}: expected integers or text, got dtype {ids.dtype}")
    twice = first_duplicate(ids)
    if twice is not None:
        raise RunLoadError(f"{name}: {ids[twice[0]].item()!r} is there twice, at rows {twice[0]} and {twice[1]}")


def _checked_seen(seen: sp.csr_matrix, num_users: int, num_items: int) -> sp.csr_matrix:
    if seen.shape != (num_users, num_items):
        raise RunLoadError(f"seen: expected shape {(num_users, num_items)} to go with the ids, got {seen.shape}")
    try:
        seen.check_format(full_check=True)  # reading a file does not look at the column numbers
    except ValueError as error:
        raise RunLoadError(f"seen: not a valid sparse matrix ({error})") from None
    return seen.sorted_indices()


def load_layer0(run_dir: str | Path, student: Recommender) -> tuple[Tensor, Tensor]:
    """The layer-0 tables of a run's student, floating `[U, d]` and `[I, d]`: those its tables are the propagation of.

    Raises:
        RunLoadError: they are missing, of another shape or dtype than the student's tables, or hold NaN or Inf.
    """
    path, found = Path(run_dir) / "student.safetensors", []
    try:
        tables = load_file(path)
    except (SafetensorError, OSError) as error:
        raise RunLoadError(f"{path}: damaged or missing: {error}") from error
    for name, like in (("user_emb0", student.user_emb), ("item_emb0", student.item_emb)):
        table = tables.get(name)
        if table is None or (table.shape, table.dtype) != (like.shape, like.dtype) or not all_finite(table):
            raise RunLoadError(
                f"{path}: expected a finite {name}, {like.dtype} {tuple(like.shape)}, found "
                + ("none" if table is None else f"{table.dtype} {tuple(table.shape)}")
            )
        found.append(table)
    return found[0], found[1]


def load(run_dir: str | Path) -> Recommender:
    """The student of a run folder, ready to recommend.

    Raises:
        RunLoadError: a file is missing, damaged, or does not go with the others. Nothing is ever unpickled.
    """
    path = Path(run_dir)
    if not (path / "student.safetensors").exists():
        state = (
            "the run has not finished; go on with --resume"
            if (path / "config.yaml").exists()
            else "it is no run folder"
        )
        raise RunLoadError(f"{path}: no student.safetensors: {state}")
    try:
        tables = load_file(path / "student.safetensors")
        ids, seen = open_npz(path / "ids.npz"), read_csr(path / "seen.npz")
        return Recommender(
            tables["user_emb"], tables["item_emb"], ids["user_ids"], ids["item_ids"], seen, ids.get("item_names")
        )
    except RunLoadError as error:
        raise RunLoadError(f"{path}: {error}") from None
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise RunLoadError(f"{path}: a file of the run is damaged or missing: {error}") from error
