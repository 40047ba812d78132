"""The typer application and what its commands share."""

from __future__ import annotations

import logging
import warnings

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Small recommenders from interactions plus item content: a multi-modal teacher distilled into a plain LightGCN.\n\n"
    "Start with: mmkd train --data demo",
)
console = Console(stderr=True)


class Friendly:
    """Turns the package's own errors into one message and exit code 1; anything else is a bug and keeps its traceback."""

    def __enter__(self) -> None:
        warnings.showwarning = lambda message, *_: console.print(f"[yellow]note:[/] {message}", highlight=False)
        logging.basicConfig(
            level=logging.INFO,
            format="%(message)s",
            handlers=[RichHandler(console=console, show_time=False, show_path=False)],
        )

    def __exit__(self, kind, error, traceback) -> bool:
        from mmkd.config import ConfigError
        from mmkd.data import DataError
        from mmkd.files import WriteError
        from mmkd.serving import RunLoadError
        from mmkd.training import CheckpointError, RunError, TrainingError

        missing = isinstance(error, ImportError) and "pip install" in str(error)  # an extra that is not there
        if missing or isinstance(
            error,
            (ConfigError, DataError, RunLoadError, CheckpointError, RunError, TrainingError, WriteError, ValueError),
        ):
            console.print(f"[red]error:[/] {escape(str(error))}", highlight=False)
            raise typer.Exit(1)
        return False
