# ruff: noqa: I001  (the order of the imports is the order of --help)
"""`mmkd train | update | eval | recommend | export | data | features | info | bench | reproduce | report`: one file a command; importing them registers them with the application."""

from __future__ import annotations

import sys

from mmkd.cli import train, update, evaluate, recommend, export, data, features, info, bench, reproduce, report  # noqa: F401
from mmkd.cli.common import app


def main() -> None:
    """Entry point of `python -m mmkd`."""
    sys.exit(app())
