"""`mmkd train | eval | recommend | data | info`."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Small recommenders from interactions plus item content: a multi-modal teacher distilled into a plain LightGCN.\n\n"
    "Start with: mmkd train --data demo",
)
console = Console(stderr=True)


class _Friendly:
    """Turns the package's own errors into one message and exit code 1; anything else is a bug and keeps its traceback."""

    def __enter__(self) -> None:
        warnings.showwarning = lambda message, *_: console.print(f"[yellow]note:[/] {message}", highlight=False)
        logging.basicConfig(
            level=logging.INFO,
            format="%(message)s",
            handlers=[RichHandler(console=console, show_time=False, show_path=False)],
        )

    def __exit__(self, kind, error, traceback) -> bool:
        from mmkd.config import ConfigError
        from mmkd.data import DataError
        from mmkd.serving import RunLoadError
        from mmkd.training import CheckpointError, RunError, TrainingError

        if isinstance(
            error, (ConfigError, DataError, RunLoadError, CheckpointError, RunError, TrainingError, ValueError)
        ):
            console.print(f"[red]error:[/] {error}", highlight=False)
            raise typer.Exit(1)
        return False


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
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in --out.")] = False,
    show_settings: Annotated[
        bool, typer.Option("--show-settings", help="Print every setting with its default, and stop.")
    ] = False,
) -> None:
    """Train teacher and student, compare with the baselines, leave a run folder.

    The run folder holds the student's tables, the settings, the curves and summary.md. Weights are chosen on
    validation; the test part, where there is one, is read once at the end.
    """
    with _Friendly():
        from mmkd.config import Config, load_config
        from mmkd.training import train as run

        if show_settings:
            typer.echo(Config().to_yaml())
            return
        overrides = list(set_ or [])
        overrides += [f"data.path={data}"] if data else []
        overrides += [f"seed={seed}"] if seed is not None else []
        if resume and out is None:
            raise ValueError("--resume: name the run folder with --out")
        if resume and config is None and (out / "config.yaml").exists():
            config = out / "config.yaml"
        result = run(load_config(config, overrides), out=out, resume=resume)
        typer.echo(result.table)
        typer.echo(f"\nRun folder: {result.path}\nNext: mmkd recommend {result.path} --user ID -k 10")


@app.command("eval")
def evaluate_run(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    part: Annotated[str, typer.Option(help="val or test. Choose on val; look at test once.")] = "val",
    data: Annotated[str, typer.Option(help="The data set, where it is not at the place the run's settings name.")] = "",
) -> None:
    """Evaluate a run's student again, on the data it was trained on (the fingerprint is checked)."""
    with _Friendly():
        from safetensors.torch import load_file

        from mmkd.config import load_config
        from mmkd.data import load
        from mmkd.evaluation import evaluate
        from mmkd.serving import RunLoadError
        from mmkd.training.run_folder import RunFolder

        if not (run / "student.safetensors").exists():
            raise RunLoadError(f"{run}: no student.safetensors; it is no finished run folder")
        settings = load_config(run / "config.yaml")
        d = settings.data
        dataset = load(data or d.path, format=d.format, split=d.split, seed=settings.seed, **d.options)
        expected, got = RunFolder(run).info()["data"]["fingerprint"], dataset.fingerprint()
        if expected != got:
            raise RunLoadError(f"{run}: the data has changed since (fingerprint {expected[:12]}, now {got[:12]})")
        tables = load_file(run / "student.safetensors")
        for name, value in evaluate(
            tables["user_emb"], tables["item_emb"], dataset, part, settings.evaluation.ks
        ).items():
            typer.echo(f"{part} {name:<14} {value:.4f}")


@app.command()
def recommend(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    user: Annotated[list[str], typer.Option("--user", help="Original user id; may be repeated.")],
    k: Annotated[int, typer.Option("-k", help="Items per user.")] = 10,
    include_seen: Annotated[bool, typer.Option("--include-seen", help="Also items the user already has.")] = False,
) -> None:
    """Print the best items of some users."""
    with _Friendly():
        from mmkd.serving import load

        for name, items in zip(user, load(run).recommend(user, k, not include_seen), strict=True):
            for place, item in enumerate(items, 1):
                typer.echo(f"{name}\t{place}\t{item.item}\t{item.score:.4f}" + (f"\t{item.name}" if item.name else ""))


@app.command()
def data(
    files: Annotated[
        list[str], typer.Argument(help="A folder, or interactions and feature files; `demo`, `synthetic`.")
    ],
    format: Annotated[str, typer.Option(help="auto, npz, json or table.")] = "auto",
    split: Annotated[
        str, typer.Option(help="given, random, leave-last-out or time. Default: what the files offer.")
    ] = "",
) -> None:
    """Print what was understood of a data set, without training."""
    with _Friendly():
        from mmkd.data import describe, load

        typer.echo(describe(load(files if len(files) > 1 else files[0], format=format, split=split or None)))


@app.command()
def info() -> None:
    """Versions, what is built and loaded, which implementation each op uses and why not the others."""
    from mmkd import backends

    typer.echo(backends.report())


def main() -> None:
    """Entry point of `python -m mmkd`."""
    sys.exit(app())
