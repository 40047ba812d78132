"""`mmkd update`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmkd.cli.common import Friendly, app


@app.command()
def update(
    run: Annotated[Path, typer.Argument(help="A finished run folder; it stays as it is.")],
    new: Annotated[
        Path, typer.Option(help="New interactions: CSV, TSV or Parquet with columns user, item[, timestamp].")
    ],
    out: Annotated[Path | None, typer.Option(help="The new run folder. Default: runs/<data>-update-<time>.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="One setting, e.g. --set update.lr=1e-4; may be repeated.")
    ] = None,
    column: Annotated[
        list[str] | None, typer.Option("--column", help="A column named otherwise, e.g. --column user=customer.")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option("--ignore", help="A column to leave out; may be repeated.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted update in --out.")] = False,
) -> None:
    """Let new interactions, users and items join a run: its student is fine-tuned into a new run folder.

    Prints time and accuracy before and after on new interactions that were held out. Item features are not needed.
    """
    with Friendly():
        from mmkd.training import RunStopped, stop_on_signals
        from mmkd.training import update as run_update

        if resume and out is None:
            raise ValueError("--resume: name the run folder with --out")
        columns = dict(word.split("=", 1) if "=" in word else (word, "") for word in column or [])
        if "" in columns.values():
            raise ValueError(
                f"--column: expected role=name, e.g. user=customer, got {next(k for k in columns if not columns[k])!r}"
            )
        try:
            with stop_on_signals() as stop:
                result = run_update(
                    run, new, out=out, resume=resume, overrides=list(set_ or []), columns=columns, ignore=ignore or [],
                    stop=stop,
                )  # fmt: skip
        except RunStopped as stopped:
            typer.echo(stopped)
            return
        typer.echo(result.table)
        typer.echo(f"\nRun folder: {result.path}\nNext: mmkd recommend {result.path} --user ID -k 10")
