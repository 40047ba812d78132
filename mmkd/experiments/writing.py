"""What an experiment leaves behind: markdown, CSV and a figure of the same name, and how it differs from the paper."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from mmkd.config import Config
from mmkd.experiments.cells import Study
from mmkd.files import write_atomic, write_text
from mmkd.training.run_folder import versions

# Section 4.1.3 and 4.5 of the paper: (setting here, its value there).
PAPER = (
    ("dim", "64 (32 in Table 8)"),
    ("teacher.lr", "searched in 3.5e-4 .. 9.8e-3"),
    ("teacher.neighbors", "no item-item graphs (0)"),
    ("teacher.shared_negatives", "BPR with one negative (0)"),
    ("teacher.fusion", "one weight for all modalities (fixed)"),
    ("student.lr", "searched in 2.5e-4 .. 8.5e-4"),
    ("student.init", "xavier"),
    ("student.l2", "one of 2.5e-3, 7.4e-3, 2.1e-2"),
    ("distill.pair_kind", "Eq. 5 as printed takes the log of a negative number"),
    ("distill.list_weight", "coupled (Eq. 10, its first sign corrected)"),
    ("distill.modality_weights", "one weight for all modalities (uniform)"),
    ("distill.emb_sample", "all items and users"),
)


def setting(config: Config, path: str) -> Any:
    """The value at a dotted path."""
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def differences(study: Study) -> list[str]:
    """One markdown line a setting the paper names: its value there and here; first what no setting shows."""
    lines = [
        f"- data: {study.name}; the paper's are Netflix, Tiktok and Electronics",
        "- selection: on validation only, test read once (the released code selects on test)",
    ]
    if study.quick:
        lines.append(
            "- quick form: 2 epochs, d = 16, one seed: it shows that everything runs, its numbers mean nothing"
        )
    return lines + [f"- {name}: paper {there}; here {setting(study.config, name)}" for name, there in PAPER]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A markdown table, the first column left, the others right."""
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def write(study: Study, name: str, title: str, body: str, records: list[dict[str, Any]], figure=None) -> Path:
    """`<name>.md`, `<name>.csv` and, where there is a figure, `<name>.png`. Returns the markdown file.

    Cells of other code than this are named in it; the next page starts its own list.
    """
    v = versions()
    text = [f"# {title}", "", body, ""]
    if figure is not None:
        write_atomic(study.out / f"{name}.png", lambda temporary: figure.savefig(temporary, dpi=120))
        text += [f"![{title}]({name}.png)", ""]
    if study.older:
        names = ", ".join(f"`{cell}`" for cell in sorted(study.older))
        text += [
            f"Trained by another version of this code, and again where their folders in `cells` are removed: {names}.",
            "",
        ]
        study.older.clear()
    text += ["## What differs from the paper", "", *differences(study), ""]
    text += [f"mmkd {v['mmkd']}, torch {v['torch']}, {v['platform']}, {v['threads']} threads, {v['started']}.", ""]
    buffer = io.StringIO()
    columns = list(dict.fromkeys(key for record in records for key in record))
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    study.out.mkdir(parents=True, exist_ok=True)
    write_text(study.out / f"{name}.csv", buffer.getvalue())
    return write_text(study.out / f"{name}.md", "\n".join(text))


def new_figure(columns: int, rows: int = 1, size: tuple[float, float] = (4.2, 3.4)):
    """A matplotlib figure and its axes `[rows, columns]`. ValueError where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("figures need matplotlib: pip install mmkd[plot]") from None
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def bars(labels: list[str], means: list[float], spread: list[float], metric: str):
    """A bar chart with error bars."""
    figure, axes = new_figure(1, size=(max(5.0, 0.6 * len(labels)), 3.6))
    axes[0, 0].bar(labels, means, yerr=spread, color="#4878a8", capsize=3)
    axes[0, 0].set(ylabel=metric)
    axes[0, 0].tick_params(axis="x", rotation=45)
    axes[0, 0].grid(axis="y", alpha=0.3)
    return figure
