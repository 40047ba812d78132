"""What a format with original ids hands to `load`, before ids are mapped, pairs merged and split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .table import RawInteractions

__all__ = ["ONE_FILE", "RawData"]

ONE_FILE = "interactions"  # the part of a source that is not split yet


@dataclass(frozen=True)
class RawData:
    """Interactions by part (or all under `ONE_FILE`), and features and names by item id.

    Attributes:
        name: what to call the data set. source: file or folder, for messages. described: its interaction files.
        parts: part -> rows. features: modality -> (ids `[n]`, array `[n, d]`). feature_paths: where they came from.
        names: (item ids, texts), or None. notes: what was decided, one sentence each.
    """

    name: str
    source: str
    described: str
    parts: Mapping[str, RawInteractions]
    features: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    feature_paths: Mapping[str, Path] = field(default_factory=dict)
    names: tuple[np.ndarray, np.ndarray] | None = None
    notes: tuple[str, ...] = ()
