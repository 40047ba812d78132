"""`mmkd data`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmkd.cli.common import Friendly, app


@app.command()
def data(
    files: Annotated[
        list[str], typer.Argument(help="A folder, or interactions and feature files; `demo`, `synthetic`.")
    ],
    format: Annotated[str, typer.Option(help="auto, npz, json, table, mmrec or recbole.")] = "auto",
    split: Annotated[
        str, typer.Option(help="given, random, leave-last-out or time. Default: what the files offer.")
    ] = "",
    convert: Annotated[
        Path | None, typer.Option(help="Write the data set, split as it is, to this folder (see --to).")
    ] = None,
    to: Annotated[str, typer.Option(help="npz, json, table, mmrec or recbole, with --convert.")] = "npz",
) -> None:
    """Print what was understood of a data set, without training; or convert it to another format."""
    with Friendly():
        from mmkd.data import convert as write
        from mmkd.data import describe, load

        dataset = load(files if len(files) > 1 else files[0], format=format, split=split or None)
        if convert is None:
            typer.echo(describe(dataset))
            return
        folder, lost = write(dataset, convert, to)
        typer.echo(f"{folder}: {dataset!r} as {to}")
        for sentence in lost:
            typer.echo(f"  not kept: {sentence}")
