"""`mmkd train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmkd.cli.common import Friendly, app

_DATA, _SETTINGS, _RUN = "Data", "Settings", "Run folder, interruption, logging"


def _complete_setting(incomplete: str) -> list[str]:
    from mmkd.config import known_keys

    return [f"{key}=" for key in known_keys() if key.startswith(incomplete)]


def _complete_logger(incomplete: str) -> list[str]:
    from mmkd.training.loggers import LOGGERS

    return [name for name in LOGGERS if name.startswith(incomplete)]


@app.command()
def train(
    data: Annotated[
        str,
        typer.Option(
            help="Folder or file of interactions and features; `demo` and `synthetic` are built in.",
            show_default="demo, or what --config says",
            rich_help_panel=_DATA,
        ),
    ] = "",
    model: Annotated[
        str,
        typer.Option(
            help="mmkd (teacher, then student), or one model alone: lightgcn, bm3, lattice, ...",
            show_default="mmkd, or what --config says",
            rich_help_panel=_SETTINGS,
        ),
    ] = "",
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file of settings; a run folder's config.yaml fits.",
            show_default="built-in defaults",
            rich_help_panel=_SETTINGS,
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="One setting, e.g. --set teacher.lr=1e-3; may be repeated.",
            show_default="none",
            rich_help_panel=_SETTINGS,
            autocompletion=_complete_setting,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of everything random.", show_default="0, or what --config says", rich_help_panel=_SETTINGS
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu or cuda.", show_default="CUDA where torch has it", rich_help_panel=_SETTINGS)
    ] = "",
    amp: Annotated[
        str,
        typer.Option(
            help="bf16: half the bytes in training; weights and results stay float32.",
            show_default="off",
            rich_help_panel=_SETTINGS,
        ),
    ] = "",
    profile: Annotated[
        bool,
        typer.Option(
            "--profile",
            help="Profile 20 steps of every stage; print and keep where their time goes.",
            show_default="off",
            rich_help_panel=_RUN,
        ),
    ] = False,
    show_settings: Annotated[
        bool,
        typer.Option(
            "--show-settings",
            help="Print every setting with its default, and stop.",
            show_default="off",
            rich_help_panel=_SETTINGS,
        ),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Run folder.", show_default="runs/<data>-<time>", rich_help_panel=_RUN)
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with the interrupted run in --out.", show_default="off", rich_help_panel=_RUN
        ),
    ] = False,
    log: Annotated[
        list[str] | None,
        typer.Option(
            "--log",
            help="tensorboard, wandb or mlflow, besides metrics.jsonl; may be repeated.",
            show_default="metrics.jsonl alone",
            rich_help_panel=_RUN,
            autocompletion=_complete_logger,
        ),
    ] = None,
) -> None:
    """Train teacher and student, compare with the baselines, leave a run folder.

    The run folder holds the student's tables, the settings, the curves and summary.md. Weights are chosen on
    validation; the test part, where there is one, is read once at the end. Ctrl-C and SIGTERM stop after the step at
    hand and save a checkpoint; go on with --resume --out FOLDER.
    """
    with Friendly():
        from mmkd.config import Config, load_config
        from mmkd.training import RunStopped, stop_on_signals
        from mmkd.training import train as run

        if show_settings:
            typer.echo(Config().to_yaml())
            return
        overrides = list(set_ or [])
        overrides += [f"data.path={data}"] if data else []
        overrides += [f"model={model}"] if model else []
        overrides += [f"seed={seed}"] if seed is not None else []
        overrides += ["profile=20"] if profile else []
        overrides += [f"device={device}"] if device else []
        overrides += [f"amp={amp}"] if amp else []
        overrides += [f"log=[{', '.join(log)}]"] if log else []
        if resume:
            config = _config_of(out, config, bool(data))
        try:
            with stop_on_signals() as stop:
                result = run(load_config(config, overrides), out=out, resume=resume, stop=stop)
        except RunStopped as stopped:
            typer.echo(stopped)
            return
        typer.echo(result.table)
        typer.echo(f"\nRun folder: {result.path}\nNext: mmkd recommend {result.path} --user ID -k 10")


def _config_of(out: Path | None, config: Path | None, data_given: bool) -> Path | None:
    """Where the settings of a resumed run are: its own, unless others are named (and then compared)."""
    if out is None:
        raise ValueError("--resume: name the run folder with --out")
    if config is None and (out / "config.yaml").exists():
        return out / "config.yaml"
    if config is None and not data_given:
        raise ValueError(
            f"--resume: {out} holds no run that got as far as writing its settings; start it without --resume"
        )
    return config
