"""`mmkd reproduce`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmkd.cli.common import Friendly, app


@app.command()
def reproduce(
    what: Annotated[str, typer.Argument(help="search, table4 ... table8, figure3, figure4, figure5, or all.")],
    data: Annotated[str, typer.Option(help="Data set, as for `mmkd train`.")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of tables 4 and 5.")] = 5,
    quick: Annotated[
        bool, typer.Option("--quick", help="Two epochs, one seed, a narrow model: shows that it runs.")
    ] = False,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings every cell starts from.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="One setting, e.g. --set teacher.lr=1e-3.")] = None,
    models: Annotated[str, typer.Option(help="Of search: some models only, separated by commas.")] = "",
    jobs: Annotated[
        int,
        typer.Option(
            "--jobs",
            "-j",
            min=1,
            help="Runs at a time, each with its share of the threads.",
        ),
    ] = 1,
    out: Annotated[Path | None, typer.Option(help="Folder. Default: results/<data>[-quick].")] = None,
) -> None:
    """Rerun a table or figure of the paper: markdown, CSV and a figure, from one training run a cell.

    `search` tunes every model with the same budget on validation; tables made after it use what it chose.
    Finished cells are read back, interrupted ones go on where they stopped; cells are shared between tables.
    On a CPU one job a core is fastest, if the memory holds that many runs.
    """
    with Friendly():
        from mmkd.config import load_config
        from mmkd.experiments import EXPERIMENTS
        from mmkd.experiments.cells import Study
        from mmkd.training import RunStopped, stop_on_signals

        names = list(EXPERIMENTS) if what == "all" else [what]
        if names[0] not in EXPERIMENTS:
            raise ValueError(f"reproduce: expected {', '.join(EXPERIMENTS)} or all, got {what!r}")
        overrides = [*(set_ or []), *([f"data.path={data}"] if data else []), "progress=false"]
        settings = load_config(config, overrides)
        if quick and not data:
            settings.data.path = "synthetic"
        place = out or Path("results") / (Path(settings.data.path).name + ("-quick" if quick else ""))
        study = Study(place, settings, seeds, quick, jobs)
        some = [part.strip() for part in models.split(",") if part.strip()]
        if some and what != "search":
            raise ValueError(f"--models: expected only with search, got {what}; other tables compare all models")
        try:
            with stop_on_signals() as study.stop:
                for name in names:
                    path = EXPERIMENTS[name](study, some) if some else EXPERIMENTS[name](study)
                    typer.echo(path.read_text(encoding="utf-8").split("\n## ")[0].strip() + f"\n\n-> {path}\n")
        except RunStopped:
            typer.echo(f"stopped; what is finished is kept in {place}, and the same command goes on from there")
