# ruff: noqa: I001  (the order of the imports is the order of --help)
"""`mmkd train | update | eval | recommend | bench | data | info`: one file a command; importing them registers them with the application."""

from __future__ import annotations

import sys

from mmkd.cli import train, update, evaluate, recommend, bench, data, info  # noqa: F401
from mmkd.cli.common import app


def main() -> None:
    """Entry point of `python -m mmkd`."""
    sys.exit(app())
