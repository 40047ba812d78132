"""`mmkd recommend`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from mmkd.cli.common import Friendly, app, console


@app.command()
def recommend(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    user: Annotated[list[str] | None, typer.Option("--user", help="Original user id; may be repeated.")] = None,
    users: Annotated[
        Path | None, typer.Option(help="A .parquet, .csv or .tsv of users (column user or user_id); needs --out.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to write user, rank, item, score: .parquet, .csv or .tsv.")
    ] = None,
    k: Annotated[int, typer.Option("-k", help="Items per user.")] = 10,
    exclude_seen: Annotated[
        bool, typer.Option("--exclude-seen/--include-seen", help="Leave out items the user already has.")
    ] = True,
    allow: Annotated[
        Path | None, typer.Option(help="Recommend only these items: .txt (one id a line), .csv, .tsv or .parquet.")
    ] = None,
    deny: Annotated[Path | None, typer.Option(help="Never recommend these items; the same kinds of file.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Add the user's items that carry the score.")] = False,
    reasons: Annotated[int, typer.Option(help="How many of them, with --explain.", min=1)] = 3,
    column: Annotated[str, typer.Option(help="The user column of --users, if it has another name.")] = "",
    skip_unknown: Annotated[
        bool, typer.Option("--skip-unknown", help="Leave out users the run does not know, instead of stopping.")
    ] = False,
) -> None:
    """Recommend to some users, printed, or to a file of users, written to a file."""
    with Friendly():
        from mmkd.serving import load, load_explainer, read_item_list, recommend_file

        if (users is None) == (not user):
            raise ValueError("name the users either with --user ID (may be repeated) or with --users FILE")
        if (users is None) != (out is None):
            raise ValueError("--users and --out go together: one names the file of users, the other the result")
        lists = {name: read_item_list(path) for name, path in (("allow", allow), ("deny", deny)) if path is not None}
        student = load(run)
        student = student.restricted(**lists) if lists else student
        explainer = load_explainer(run) if explain else None
        if users is not None:
            start = time.perf_counter()
            done = recommend_file(
                student, users, out, k=k, exclude_seen=exclude_seen, column=column or None, skip_unknown=skip_unknown,
                explainer=explainer, reasons=reasons,
            )  # fmt: skip
            seconds = time.perf_counter() - start
            left_out = f", {done.skipped:,} unknown left out" if done.skipped else ""
            console.print(
                f"{out}: {done.users:,} users{left_out}, {done.rows:,} rows, {seconds:.2f} s", highlight=False
            )
            return
        rows = student.positions(user)
        scores, items = student.topk(rows, k, exclude_seen)
        for row, name, values, ranked in zip(rows.tolist(), user, scores.tolist(), items, strict=True):
            ranked = ranked[ranked >= 0]
            why = explainer.reasons(row, ranked, reasons) if explainer else [[]] * len(ranked)
            for place, (item, score, because) in enumerate(zip(ranked.tolist(), values, why, strict=False), 1):
                label = "" if student.item_names is None else f"\t{student.item_names[item]}"
                because = "\tbecause " + ", ".join(f"{r.item} ({r.score:+.4f})" for r in because) if because else ""
                typer.echo(f"{name}\t{place}\t{student.item_ids[item].item()}\t{score:.4f}{label}{because}")
