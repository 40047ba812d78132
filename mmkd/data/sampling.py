"""Training batches as a pure function of (seed, epoch, step): the door to the C++ sampler.

The stream is written down in `mmkd/reference/sampling.py`; both give the same bits.
"""

from __future__ import annotations

import operator
from typing import Literal, NamedTuple

import numpy as np
from scipy import sparse

from mmkd import _host, csr
from mmkd.reference.sampling import ROUNDS

__all__ = ["Batch", "Sampler"]

_MAX_NEGATIVES = 4 << 16  # the stream numbers blocks of four negatives with 16 bits


class Batch(NamedTuple):
    """One training batch of internal ids, int64: `users` ``[B]`` and `candidates` ``[B, K]``, the positive first."""

    users: np.ndarray
    candidates: np.ndarray

    @property
    def pos(self) -> np.ndarray:
        """The observed item, ``[B]``."""
        return self.candidates[:, 0]

    @property
    def neg(self) -> np.ndarray:
        """The list negatives ``[B, K-1]``; the first is BPR's."""
        return self.candidates[:, 1:]


class Sampler:
    """Draws users, one positive each and ``num_negatives`` negatives, uniform over what the user has not got (spec section 5).

    Args:
        train: ``U x I`` CSR of the train interactions; every stored entry counts. It is copied.
        num_negatives: ``K - 1`` list negatives per sample; the first is BPR's. 1 is the pair sampler.
        batch_size: samples per batch ``B``.
        seed: 64-bit whole number.
        num_steps: batches per epoch; default ``ceil(num_train_edges / batch_size)``.
        num_threads: threads that draw a batch; the batch does not depend on it. More than one pays from about 10^5
            negatives a batch.
        draw: ``"users"``: every user is equally likely, then every one of his items; ``"pairs"``: every train pair is.

    Raises:
        TypeError: not a scipy CSR matrix. ValueError: a malformed one, no interactions, a user who has every item (no
            negative exists; the user is named), or an argument out of range.
    """

    def __init__(
        self,
        train: sparse.csr_matrix,
        num_negatives: int,
        batch_size: int,
        seed: int = 0,
        num_steps: int | None = None,
        num_threads: int = 1,
        draw: Literal["users", "pairs"] = "users",
    ) -> None:
        self.num_negatives = _in_range("num_negatives", num_negatives, 1, _MAX_NEGATIVES)
        self.batch_size = _in_range("batch_size", batch_size, 1, 2**32 - 1)
        self.seed = _in_range("seed", seed, 0, 2**64 - 1)
        self.num_threads = _in_range("num_threads", num_threads, 1, 1024)
        if draw not in ("users", "pairs"):
            raise ValueError(f"draw must be users or pairs, got {draw!r}")
        if not sparse.issparse(train) or train.format != "csr":
            raise TypeError(f"train must be a scipy CSR matrix, got {type(train).__name__}; call .tocsr()")
        rowptr, col = csr.from_scipy(train)
        self.num_users, self.num_items = (int(size) for size in train.shape)
        self.num_steps = (
            -(-len(col) // self.batch_size) if num_steps is None else _in_range("num_steps", num_steps, 1, 2**32 - 1)
        )
        self._host = _host.Sampler(rowptr, col, self.num_items, ROUNDS, draw == "pairs")

    def batch(self, epoch: int, step: int) -> Batch:
        """The batch of `step` in `epoch`: the same for every call, process and number of threads."""
        epoch, step = _in_range("epoch", epoch, 0, 2**32 - 1), _in_range("step", step, 0, 2**32 - 1)
        return Batch(*self._host.batch(self.seed, epoch, step, self.batch_size, self.num_negatives, self.num_threads))


def _in_range(name: str, value: int, low: int, high: int) -> int:
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r}") from None
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, got {value}")
    return value
