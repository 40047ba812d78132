"""`mmkd recommend`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmkd.cli.common import Friendly, app


@app.command()
def recommend(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    user: Annotated[list[str], typer.Option("--user", help="Original user id; may be repeated.")],
    k: Annotated[int, typer.Option("-k", help="Items per user.")] = 10,
    include_seen: Annotated[bool, typer.Option("--include-seen", help="Also items the user already has.")] = False,
) -> None:
    """Print the best items of some users."""
    with Friendly():
        from mmkd.serving import load

        for name, items in zip(user, load(run).recommend(user, k, not include_seen), strict=True):
            for place, item in enumerate(items, 1):
                typer.echo(f"{name}\t{place}\t{item.item}\t{item.score:.4f}" + (f"\t{item.name}" if item.name else ""))
