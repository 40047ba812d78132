"""`mmkd data`."""

from __future__ import annotations

from typing import Annotated

import typer

from mmkd.cli.common import Friendly, app


@app.command()
def data(
    files: Annotated[
        list[str], typer.Argument(help="A folder, or interactions and feature files; `demo`, `synthetic`.")
    ],
    format: Annotated[str, typer.Option(help="auto, npz, json or table.")] = "auto",
    split: Annotated[
        str, typer.Option(help="given, random, leave-last-out or time. Default: what the files offer.")
    ] = "",
) -> None:
    """Print what was understood of a data set, without training."""
    with Friendly():
        from mmkd.data import describe, load

        typer.echo(describe(load(files if len(files) > 1 else files[0], format=format, split=split or None)))
