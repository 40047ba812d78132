"""One self-contained HTML page that compares finished runs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mmkd import ops
from mmkd.config import Config, load_config
from mmkd.data import Dataset, load_configured
from mmkd.evaluation import evaluate_per_user, metrics
from mmkd.evaluation.evaluator import as_exclude, relevant_items, seen_items
from mmkd.experiments.writing import new_figure
from mmkd.files import write_text
from mmkd.serving import Recommender, load
from mmkd.training.run_folder import RunFolder

CUTOFF = 20
BIN_EDGES = (0, 1, 5, 10, 20, 50)  # train interactions: 0, 1-4, 5-9, ...
SHOWN = ("recall@20", "ndcg@20", "recall@50", "ndcg@50", "precision@20", "mrr@20")


class ReportError(ValueError):
    """Runs that cannot be compared; the message names the run and why."""


@dataclass(frozen=True)
class Measured:
    """One run, evaluated again from its served tables.

    Attributes:
        label: folder name. config: its settings. info: its `run.json`. lines: its `metrics.jsonl`.
        values: metric -> mean over users, with `coverage@20` and `novelty@20`.
        users, items: `(label, count, recall@20)` by the train degree of the user, of the relevant item.
    """

    label: str
    config: Config
    info: dict[str, Any]
    lines: list[dict[str, Any]]
    values: dict[str, float]
    users: list[tuple[str, int, float]]
    items: list[tuple[str, int, float]]


def bins(degree: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """The bin of every degree, and the bins' names."""
    upper = [*(edge - 1 for edge in BIN_EDGES[1:]), None]
    names = [f"{a}+" if b is None else f"{a}" if a == b else f"{a}-{b}" for a, b in zip(BIN_EDGES, upper, strict=True)]
    return np.digitize(degree, BIN_EDGES[1:]), names


def coverage(ranked: np.ndarray, num_items: int) -> float:
    """Share of the catalogue that stands in somebody's list; `ranked` holds ids `[n, k]`, -1 for none."""
    return np.unique(ranked[ranked >= 0]).size / num_items


def novelty(ranked: np.ndarray, popularity: np.ndarray, num_users: int) -> float:
    """Mean self-information of what is recommended, `-log2((d_i + 1) / (U + 1))`, in bits; `d_i` = train users of item i."""
    return float(-np.log2((popularity[ranked[ranked >= 0]] + 1) / (num_users + 1)).mean())


def _grouped(degree: np.ndarray, value: np.ndarray, weight: np.ndarray) -> list[tuple[str, int, float]]:
    """Weighted mean of `value` in every bin of `degree` that is not empty."""
    where, names = bins(degree)
    groups = []
    for index, name in enumerate(names):
        inside = where == index
        if weight[inside].sum() > 0:
            groups.append(
                (name, int(weight[inside].sum()), float((value[inside] * weight[inside]).sum() / weight[inside].sum()))
            )
    return groups


def measure(path: Path, part: str, data: str = "") -> Measured:
    """Evaluates a run's served tables on `part` of the data it was trained on.

    Raises:
        ReportError: no finished run, other data than it was trained on, or a run that serves no tables.
        RunLoadError, RunError, ConfigError: a damaged one.
    """
    folder = RunFolder(path)
    if not (path / "config.yaml").exists():
        raise ReportError(f"{path}: no config.yaml; it is no run folder")
    if not (path / "student.safetensors").exists():
        raise ReportError(f"{path}: no student.safetensors; the run is not finished, or its model has no embeddings")
    config = load_config(path / "config.yaml")
    dataset = load_configured(config.data, config.seed, data)
    expected, got = folder.info()["data"]["fingerprint"], dataset.fingerprint()
    if expected != got:
        raise ReportError(f"{path}: the data has changed since (fingerprint {expected[:12]}, now {got[:12]})")
    student = load(path)
    per_user = evaluate_per_user(student.user_emb, student.item_emb, dataset, part, (CUTOFF, 50))
    users, items, extra = _breakdown(student, dataset, part, per_user.values[f"recall@{CUTOFF}"], per_user.users)
    return Measured(path.name, config, folder.info(), folder.metrics(), per_user.mean() | extra, users, items)


def _breakdown(student: Recommender, dataset: Dataset, part: str, recall: np.ndarray, users: np.ndarray):
    relevant = relevant_items(dataset, part)[users]
    exclude = as_exclude(seen_items(dataset, part))
    import torch

    rows = torch.from_numpy(users)
    k = min(CUTOFF, dataset.num_items)
    ranked = ops.topk(student.user_emb, student.item_emb, k, users=rows, exclude=exclude)[1].numpy()
    popularity = np.bincount(dataset.train.indices, minlength=dataset.num_items)
    hits = ranked[metrics.hit_matrix(ranked, relevant)]
    wanted = np.bincount(relevant.indices, minlength=dataset.num_items)
    found = np.bincount(hits, minlength=dataset.num_items)
    by_user = _grouped(np.diff(dataset.train.indptr)[users], recall, np.ones(users.size))
    by_item = _grouped(popularity, found / np.maximum(wanted, 1), wanted.astype(float))
    extra = {
        f"coverage@{CUTOFF}": coverage(ranked, dataset.num_items),
        f"novelty@{CUTOFF}": novelty(ranked, popularity, dataset.num_users),
    }
    return by_user, by_item, extra


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """HTML table of cells that are markup already."""
    head = "".join(f"<th scope='col'>{escape(name)}</th>" for name in header)
    body = "".join(
        "<tr>" + f"<th scope='row'>{row[0]}</th>" + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _comparison(runs: Sequence[Measured]) -> str:
    columns = [c for c in (*SHOWN, f"coverage@{CUTOFF}", f"novelty@{CUTOFF}") if c in runs[0].values]
    best = {c: max(run.values[c] for run in runs) for c in columns}
    rows = []
    for run in runs:
        cells = [f"{run.values[c]:.4f}" for c in columns]
        cells = [f"<b>{t}</b>" if run.values[c] == best[c] else t for c, t in zip(columns, cells, strict=True)]
        rows.append([escape(run.label), escape(run.config.model), *cells])
    return _table(["run", "model", *columns], rows)


def _recorded(runs: Sequence[Measured]) -> str:
    """What every run wrote down about itself and its baselines when it ended."""
    rows = []
    for run in runs:
        for method, values in run.info.get("results", {}).items():
            shown = [f"{values[c]:.4f}" if c in values else "" for c in SHOWN[:4]]
            count = run.info.get("parameters", {}).get(method)
            seconds = run.info["seconds"].get(method, 0.0)
            rows.append(
                [
                    escape(run.label),
                    escape(method),
                    run.info["part"],
                    *shown,
                    f"{count:,}" if count else "",
                    f"{seconds:.1f}",
                ]
            )
    return _table(["run", "method", "part", *SHOWN[:4], "parameters", "seconds"], rows)


def _groups(runs: Sequence[Measured], which: str, unit: str) -> str:
    names = list(dict.fromkeys(name for run in runs for name, _, _ in getattr(run, which)))
    order = [name for name in bins(np.zeros(1))[1] if name in names]
    peak = max((value for run in runs for _, _, value in getattr(run, which)), default=0.0) or 1.0
    counts = {name: count for run in runs for name, count, _ in getattr(run, which)}
    rows = []
    for run in runs:
        values = {name: value for name, _, value in getattr(run, which)}
        cells = []
        for name in order:
            value = values.get(name)
            bar = (
                ""
                if value is None
                else f"<span class='bar' style='width:{60 * value / peak:.1f}px'></span> {value:.4f}"
            )
            cells.append(bar)
        rows.append([escape(run.label), *cells])
    return _table(["run", *(f"{name} ({counts[name]:,} {unit})" for name in order)], rows)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {
        k: v for name, sub in tree.items() for k, v in _flat(sub, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def differing(configs: Sequence[Config]) -> dict[str, list[Any]]:
    """Settings that are not the same in all runs: dotted path -> one value a run (None where it is absent)."""
    flat = [_flat(yaml.safe_load(config.to_yaml())) for config in configs]
    paths = list(dict.fromkeys(path for one in flat for path in one))
    values = {path: [one.get(path) for one in flat] for path in paths}
    return {path: seen for path, seen in values.items() if any(value != seen[0] for value in seen)}


def _settings(runs: Sequence[Measured]) -> str:
    changed = differing([run.config for run in runs])
    if not changed:
        return "<p>All settings are the same.</p>"
    rows = [[f"<code>{escape(path)}</code>", *(escape(str(v)) for v in values)] for path, values in changed.items()]
    return _table(["setting", *(run.label for run in runs)], rows)


def _curves(runs: Sequence[Measured]) -> str:
    """Validation metric and loss of every stage, as inline SVG."""
    figure, axes = new_figure(2, size=(5.4, 3.6))
    left, right = axes[0]
    for run in runs:
        key = f"val_{run.config.evaluation.metric}"
        for stage in dict.fromkeys(line["stage"] for line in run.lines):
            own = [line for line in run.lines if line["stage"] == stage]
            seen = [(line["epoch"], line[key]) for line in own if key in line]
            if seen:
                left.plot(*zip(*seen, strict=True), marker=".", label=f"{run.label}: {stage}")
            right.plot([line["epoch"] for line in own], [line["loss"] for line in own], label=f"{run.label}: {stage}")
    left.set(xlabel="epoch", ylabel="validation " + runs[0].config.evaluation.metric)
    right.set(xlabel="epoch", ylabel="loss", yscale="log")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    if left.lines:
        left.legend(frameon=False, fontsize=7)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue().split("\n", 3)[-1] if text.getvalue().startswith("<?xml") else text.getvalue()


STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem}.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.87rem}
th,td{padding:.3rem .7rem;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}
th:first-child,td:first-child{text-align:left}thead th{border-bottom:2px solid #888}tbody th{font-weight:400}
b{color:#0b5d1e}.bar{display:inline-block;height:.6rem;background:#4878a8}.note{color:#555}svg{max-width:100%;height:auto}
"""


def page(runs: Sequence[Measured], part: str) -> str:
    """The whole page as text; it loads nothing from anywhere."""
    names = {run.info["data"]["name"] for run in runs}
    where = "validation" if part == "val" else "test"
    sections = (
        (f"Served models, {where} part", _comparison(runs), "Best of each column in bold. Coverage: share of the catalogue "
         "recommended to somebody. Novelty: mean self-information of what is recommended, in bits."),
        ("Training curves", _curves(runs), ""),
        ("Recall@20 by the user's train interactions, cold to warm", _groups(runs, "users", "users"), ""),
        ("Recall@20 by the item's train interactions", _groups(runs, "items", "held-out pairs"),
         "Share of the held-out pairs of such items that were found."),
        ("Settings that differ", _settings(runs), ""),
        ("What each run wrote down when it ended", _recorded(runs), "The test part was read once, then."),
    )  # fmt: skip
    body = "".join(
        f"<h2>{escape(title)}</h2><div class='scroll'>{markup}</div><p class='note'>{escape(note)}</p>"
        for title, markup, note in sections
    )
    title = f"{', '.join(sorted(names))}: {len(runs)} run" + "s" * (len(runs) > 1)
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><h1>{escape(title)}</h1>{body}</body></html>\n"
    )


def write_report(paths: Sequence[Path], out: Path, part: str = "val", data: str = "") -> Path:
    """Measures the runs and writes the page.

    Raises:
        ReportError: a run that cannot be measured, or runs on different data.
    """
    runs = [measure(Path(path), part, data) for path in paths]
    prints = {run.info["data"]["fingerprint"] for run in runs}
    if len(prints) > 1:
        raise ReportError("the runs were trained on different data (their fingerprints differ); compare like with like")
    return write_text(out, page(runs, part))
