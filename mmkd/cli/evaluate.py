"""`mmkd eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmkd.cli.common import Friendly, app


@app.command("eval")
def evaluate_run(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    part: Annotated[str, typer.Option(help="val or test. Choose on val; look at test once.")] = "val",
    data: Annotated[str, typer.Option(help="The data set, where it is not at the place the run's settings name.")] = "",
) -> None:
    """Evaluate a run's student again, on the data it was trained on (the fingerprint is checked)."""
    with Friendly():
        from mmkd.config import load_config
        from mmkd.evaluation import evaluate
        from mmkd.serving import load
        from mmkd.training.run_folder import RunFolder

        student, ks = load(run), load_config(run / "config.yaml").evaluation.ks
        dataset = RunFolder(run).dataset(data)
        for name, value in evaluate(student.user_emb, student.item_emb, dataset, part, ks).items():
            typer.echo(f"{part} {name:<14} {value:.4f}")
