"""`mmkd export`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from mmkd.cli.common import Friendly, app

# typer needs the choices when the module is read; `mmkd.serving.FORMATS` would bring torch with it. A test holds them equal.
Format = Enum("Format", {name: name for name in ("safetensors", "parquet", "faiss", "onnx")}, type=str)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    to: Annotated[Format, typer.Option("--to", help="safetensors: one file; the others: a folder.")],
    out: Annotated[Path | None, typer.Option(help="Where. Default: RUN/export/<format>.")] = None,
) -> None:
    """Write a student's tables with their ids, for a vector index, an ONNX runtime, or any program that reads tables."""
    with Friendly():
        from mmkd.serving import export as write

        default = run / "export" / ("student.safetensors" if to.value == "safetensors" else to.value)
        typer.echo(write(run, to.value, out or default))
