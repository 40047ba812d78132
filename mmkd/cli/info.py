"""`mmkd info`."""

from __future__ import annotations

import typer

from mmkd.cli.common import app


@app.command()
def info() -> None:
    """Versions, what is built and loaded, which implementation each op uses and why not the others."""
    from mmkd import backends

    typer.echo(backends.report())
