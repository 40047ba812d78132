"""`mmkd report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmkd.cli.common import Friendly, app


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, trained on the same data.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    part: Annotated[
        str, typer.Option(help="val or test. Comparing runs is choosing, so it looks at validation unless told.")
    ] = "val",
    data: Annotated[str, typer.Option(help="The data set, where it is not at the place the runs' settings name.")] = "",
) -> None:
    """Compare runs on one HTML page: metrics, curves, cold and warm users and items, coverage, novelty, settings."""
    with Friendly():
        from mmkd.experiments.report import write_report

        typer.echo(f"Report: {write_report(runs, out, part, data)}")
