"""`mmkd train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmkd.cli.common import Friendly, app


@app.command()
def train(
    data: Annotated[
        str, typer.Option(help="Folder or file of interactions and features; `demo` and `synthetic` are built in.")
    ] = "",
    config: Annotated[Path | None, typer.Option(help="YAML file of settings; a run folder's config.yaml fits.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="One setting, e.g. --set teacher.lr=1e-3; may be repeated.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. Default: runs/<data>-<time>.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda. Default: CUDA where torch has it.")] = "",
    amp: Annotated[str, typer.Option(help="bf16: half the bytes in training; weights and results stay float32.")] = "",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in --out.")] = False,
    show_settings: Annotated[
        bool, typer.Option("--show-settings", help="Print every setting with its default, and stop.")
    ] = False,
) -> None:
    """Train teacher and student, compare with the baselines, leave a run folder.

    The run folder holds the student's tables, the settings, the curves and summary.md. Weights are chosen on
    validation; the test part, where there is one, is read once at the end.
    """
    with Friendly():
        from mmkd.config import Config, load_config
        from mmkd.training import train as run

        if show_settings:
            typer.echo(Config().to_yaml())
            return
        overrides = list(set_ or [])
        overrides += [f"data.path={data}"] if data else []
        overrides += [f"seed={seed}"] if seed is not None else []
        overrides += [f"device={device}"] if device else []
        overrides += [f"amp={amp}"] if amp else []
        if resume and out is None:
            raise ValueError("--resume: name the run folder with --out")
        if resume and config is None and (out / "config.yaml").exists():
            config = out / "config.yaml"
        result = run(load_config(config, overrides), out=out, resume=resume)
        typer.echo(result.table)
        typer.echo(f"\nRun folder: {result.path}\nNext: mmkd recommend {result.path} --user ID -k 10")
