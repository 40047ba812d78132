"""`mmkd bench ...`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from mmkd.cli.common import Friendly, app

bench = typer.Typer(
    no_args_is_help=True, help="Measure: parameters, time and memory of a method, or the ops. Keep the machine idle."
)
app.add_typer(bench, name="bench")


@bench.command()
def compactness(
    data: Annotated[str, typer.Option(help="A data set, as for `mmkd train`.")] = "",
    size: Annotated[
        str,
        typer.Option(
            help="Instead: random data of this size: tiktok, netflix, electronics, or USERSxITEMSxPAIRS:WIDTH,..."
        ),
    ] = "",
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="One setting, e.g. --set dim=32; may be repeated.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Timed steps per model; an epoch is extrapolated from their median.")] = 20,
    out: Annotated[Path | None, typer.Option(help="Also write the tables here, as markdown.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Also write every number here.")] = None,
) -> None:
    """Teacher against student: time per epoch, memory, parameters (paper, Table 6), and parameters by tensor (Table 8)."""
    with Friendly():
        from mmkd.config import load_config
        from mmkd.files import write_json, write_text
        from mmkd.training.compactness import compactness as measure
        from mmkd.training.compactness import report

        if bool(data) == bool(size):
            raise ValueError("expected either --data or --size")
        with tempfile.TemporaryDirectory(prefix="mmkd-size-") as scratch:
            path = data or str(_sized(size, Path(scratch)))
            overrides = [f"data.path={json.dumps(path)}", *(["data.format=npz"] if size else []), *(set_ or [])]
            result = measure(load_config(config, overrides), steps)
        text = report(result)
        typer.echo(text)
        if out is not None:
            write_text(out, text)
        if json_ is not None:
            write_json(json_, result)


def _sized(size: str, folder: Path) -> Path:
    """Writes random data of the asked size, features and all, as a folder that is mapped when it is read."""
    import re

    from mmkd.data.npz import write_npz
    from mmkd.data.synthesis import PAPER_SIZES, of_size

    found = re.fullmatch(r"(\d+)x(\d+)x(\d+):(\d+(?:,\d+)*)", size)
    if size in PAPER_SIZES:
        users, items, pairs, widths = PAPER_SIZES[size]
    elif found:
        users, items, pairs = (int(word) for word in found.groups()[:3])
        widths = tuple(int(word) for word in found[4].split(","))
    else:
        raise ValueError(
            f"--size: expected {', '.join(PAPER_SIZES)} or USERSxITEMSxPAIRS:WIDTH,..., e.g. 2000x1000x30000:512,768, got {size!r}"
        )
    return write_npz(of_size(users, items, pairs, widths), folder / (size if size in PAPER_SIZES else "random"))


@bench.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def ops(context: typer.Context) -> None:
    """Every op against its rivals: `pytest bench/` of a checkout; what follows is handed to pytest."""
    with Friendly():
        folder = Path(__file__).parents[2] / "bench"
        if not (folder / "harness.py").exists():
            raise ValueError(
                f"{folder}: not there; the op benches are part of a checkout, not of the installed package"
            )
    raise typer.Exit(subprocess.run([sys.executable, "-m", "pytest", str(folder), *context.args]).returncode)
