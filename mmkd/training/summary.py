"""`summary.md` and `curves.png`: what a person looks at when a run is over."""

from __future__ import annotations

from dataclasses import dataclass

from mmkd.config import Config
from mmkd.data import Dataset
from mmkd.files import write_atomic, write_text
from mmkd.training.run_folder import RunFolder

COLUMNS = ("recall@20", "ndcg@20", "recall@50", "ndcg@50")


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    method: str
    metrics: dict[str, float]
    parameters: int
    seconds: float


def markdown_table(rows: list[Row], part: str) -> str:
    """The comparison as a markdown table, the best of each column in bold."""
    where = {"test": "test", "val": "validation", "none": "nothing to evaluate on"}[part]
    columns = [c for c in COLUMNS if rows and c in rows[0].metrics]
    lines = [
        "| " + " | ".join([f"method ({where})", *columns, "parameters", "seconds"]) + " |",
        "| --- |" + " ---: |" * (len(columns) + 2),
    ]
    best = {c: max(row.metrics[c] for row in rows) for c in columns}
    for row in rows:
        cells = [f"**{row.metrics[c]:.4f}**" if row.metrics[c] == best[c] else f"{row.metrics[c]:.4f}" for c in columns]
        lines.append("| " + " | ".join([row.method, *cells, f"{row.parameters:,}", f"{row.seconds:.1f}"]) + " |")
    return "\n".join(lines)


def write_summary(
    folder: RunFolder, dataset: Dataset, rows: list[Row], part: str, heads: dict[str, float], config: Config
) -> str:
    """Writes `summary.md` (and `curves.png` where matplotlib is installed); returns the table."""
    table = markdown_table(rows, part)
    plotted = plot_curves(folder, config)
    text = [
        f"# {dataset.name}",
        "",
        f"{dataset.num_users:,} users, {dataset.num_items:,} items, {dataset.train.nnz:,} train interactions; seed {config.seed}. "
        "Weights were chosen on validation"
        + (
            ", the test part was read once, at the end."
            if part == "test"
            else "; there is no test part, so the table is validation."
        ),
        "",
        table,
        "",
        "Seconds are training time; parameters of item-knn are the similarities it keeps. The student serves two tables of "
        f"width {config.dim}, without features.",
    ]
    if heads:
        text += ["", "Validation recall@20 of the teacher and of each modality's head alone:", ""]
        text += [f"- {name or 'teacher'}: {value:.4f}" for name, value in heads.items()]
    text += [
        "",
        "![training curves](curves.png)" if plotted else "No plot: `pip install mmkd[plot]` brings matplotlib.",
        "",
    ]
    write_text(folder.path / "summary.md", "\n".join(text))
    return table


def plot_curves(folder: RunFolder, config: Config) -> bool:
    """Validation metric and loss of every stage over epochs, as `curves.png`; False where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    metric = f"val_{config.evaluation.metric}"
    lines = folder.metrics()
    stages = list(dict.fromkeys(line["stage"] for line in lines))
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for stage in stages:
        own = [line for line in lines if line["stage"] == stage]
        seen = [line for line in own if metric in line]
        if seen:
            left.plot([line["epoch"] for line in seen], [line[metric] for line in seen], marker=".", label=stage)
        right.plot([line["epoch"] for line in own], [line["loss"] for line in own], label=stage)
    left.set(xlabel="epoch", ylabel=f"validation {config.evaluation.metric}")
    right.set(xlabel="epoch", ylabel="loss", yscale="log")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(frameon=False)
    write_atomic(folder.path / "curves.png", lambda temporary: figure.savefig(temporary, dpi=120))
    return True
