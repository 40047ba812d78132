"""Files that are either whole or not there: written to a temporary name in the same folder, then renamed."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomic(path: Path, write: Callable[[Path], object]) -> Path:
    """Calls `write(temporary)` and renames the result to `path`; on any error the temporary file is removed.

    The temporary name keeps the suffix, because some writers add their own when it is missing.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        write(temporary)
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_text(path: Path, text: str) -> Path:
    """`text` as UTF-8, atomically."""
    return write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> Path:
    """`value` as indented JSON, atomically."""
    return write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")
