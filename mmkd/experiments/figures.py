"""Figures 3 to 5 of the paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from mmkd.experiments.cells import Cell, Study
from mmkd.experiments.tables import MMKD
from mmkd.experiments.writing import markdown, new_figure, setting, write
from mmkd.models.baselines import TITLES
from mmkd.models.features import FeatureTable
from mmkd.models.prompt import principal_components
from mmkd.training.run_folder import RunFolder

SHOWN = 500  # items a modality in the t-SNE
NEIGHBOURS = 10

SWEEPS: dict[str, list[Any]] = {
    "dim": [16, 32, 64, 128],
    "layers": [1, 2, 3, 4],
    "teacher.dropout": [0.0, 0.1, 0.2, 0.4, 0.6, 0.8],
    "prompt.strength": [0.0, 0.01, 0.1, 1.0, 10.0],
    "distill.pair": [0.0, 0.01, 0.1, 1.0, 10.0, 100.0],
    "distill.list": [0.0, 0.01, 0.1, 1.0, 10.0, 100.0],
    "distill.emb": [0.0, 0.001, 0.01, 0.1, 1.0],
}


def _changes(path: str, value: Any) -> dict[str, Any]:
    """`layers` stands for the depth of teacher and student together."""
    return {"teacher.layers": value, "student.layers": value} if path == "layers" else {path: value}


def figure4(study: Study) -> Path:
    """One setting moved at a time: d, L, dropout of the teacher, lambda_1 to lambda_4."""
    narrowest = min([x.shape[1] for x in study.dataset(0).features.values()])
    points = []
    for path, values in SWEEPS.items():
        usable = [v for v in values if path != "dim" or v <= narrowest]  # the prompt needs d <= d_m
        points += [(path, value) for value in (usable[:: max(1, len(usable) - 1)] if study.quick else usable)]
    records = []
    for (path, value), cell in zip(points, study.cells([(_changes(*point), 0) for point in points]), strict=True):
        for label in (TITLES["teacher"], MMKD):
            got = {m: cell.results[label][m] for m in ("recall@20", "ndcg@20")}
            records.append({"setting": path, "value": value, "model": label, **got})
    figure, axes = new_figure(4, 2, size=(3.6, 2.8))
    reached = [r["recall@20"] for r in records]
    margin = 0.05 * (max(reached) - min(reached)) or 0.01
    limits = min(reached) - margin, max(reached) + margin  # of all: what moves nothing looks flat
    for axis, path in zip(axes.flat, SWEEPS, strict=False):
        for label in (TITLES["teacher"], MMKD):
            line = [r for r in records if r["setting"] == path and r["model"] == label]
            axis.plot(range(len(line)), [r["recall@20"] for r in line], marker=".", label=label)
        axis.set_xticks(range(len(line)), [f"{r['value']:g}" for r in line])
        axis.set(title=path, ylabel="recall@20", ylim=limits)
        axis.grid(alpha=0.3)
    axes.flat[0].legend(frameon=False)
    axes.flat[-1].axis("off")
    rows = [[r["setting"], r["value"], r["model"], f"{r['recall@20']:.4f}", f"{r['ndcg@20']:.4f}"] for r in records]
    kept = ", ".join(f"{p}={setting(study.config, p)}" for p in SWEEPS if p != "layers")
    body = f"{study.name}, one seed; the other settings stay at {kept}.\n\n"
    body += markdown(["setting", "value", "model", "recall@20", "ndcg@20"], rows)
    return write(study, "figure4", "Figure 4: hyper-parameters", body, records, figure)


def figure5(study: Study) -> Path:
    """Training curves of teacher and student: validation recall@20, ndcg@20 and the loss."""
    lines = [line for line in RunFolder(study.cell().path).metrics() if line["stage"] in ("teacher", "student")]
    shown = ("val_recall@20", "val_ndcg@20", "loss")
    figure, axes = new_figure(3)
    for axis, key in zip(axes[0], shown, strict=True):
        for stage in ("teacher", "student"):
            points = [(line["epoch"], line[key]) for line in lines if line["stage"] == stage and key in line]
            if points:
                axis.plot(*zip(*points, strict=True), marker="." if key != "loss" else "", label=stage)
        axis.set(xlabel="epoch", ylabel=key.replace("_", " "), yscale="log" if key == "loss" else "linear")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    records = [{"stage": x["stage"], "epoch": x["epoch"], **{k: x.get(k, "") for k in shown}} for x in lines]
    last = [x for x in records if x["val_recall@20"] != ""]
    rows = [
        [r["stage"], r["epoch"], f"{r['val_recall@20']:.4f}", f"{r['val_ndcg@20']:.4f}", f"{r['loss']:.4f}"]
        for r in last
    ]
    body = markdown(["stage", "epoch", "val recall@20", "val ndcg@20", "loss"], rows)
    return write(study, "figure5", "Figure 5: training curves", body, records, figure)


def encoded(study: Study, cell: Cell, changes: dict[str, Any]) -> list[np.ndarray]:
    """`f^m`, `[I, d]` a modality, of the cell's trained teacher (Eq. 4, without dropout)."""
    from mmkd.models.prompt import Prompt, prompt_basis
    from mmkd.models.teacher import Teacher

    config, data = study.settings(changes, 0), study.dataset(0)
    tables = [FeatureTable(name, x, config.teacher.features) for name, x in data.features.items()]
    prompt = Prompt(prompt_basis(tables, config.dim, config.seed))
    teacher = Teacher(data.graph(), tables, prompt, strength=config.prompt.strength, norm=config.prompt.norm)
    teacher.load_state_dict(load_file(cell.path / "teacher.safetensors"))
    with torch.no_grad():
        return [x.numpy() for x in teacher.project().chunk(len(tables), dim=1)]


def mixing(groups: list[np.ndarray]) -> float:
    """Share of the ten nearest neighbours (cosine) that belong to another modality; 0 = apart, 1 - 1/M = fully mixed."""
    from sklearn.neighbors import NearestNeighbors

    rows = np.concatenate(groups)
    owner = np.repeat(np.arange(len(groups)), [len(g) for g in groups])
    found = (
        NearestNeighbors(n_neighbors=NEIGHBOURS + 1, metric="cosine").fit(rows).kneighbors(rows, return_distance=False)
    )
    return float((owner[found[:, 1:]] != owner[:, None]).mean())


def figure3(study: Study) -> Path:
    """t-SNE (PCA start) of raw features, and of `f^m` with and without the prompt; how far the modalities mix, as a number."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise ValueError("figure3 needs scikit-learn: pip install mmkd[demo]") from None
    data, without = study.dataset(0), {"prompt.strength": 0.0}
    chosen = np.random.Generator(np.random.Philox(0)).permutation(data.num_items)[:SHOWN]
    tables = [FeatureTable(name, x) for name, x in data.features.items()]
    width = min(study.config.dim, *(t.width for t in tables))
    cells = study.cells([({}, 0), (without, 0)])
    panels = {
        "raw features (PCA)": [principal_components(t, width).numpy() for t in tables],
        "f^m with prompt": encoded(study, cells[0], {}),
        "f^m without prompt": encoded(study, cells[1], without),
    }
    figure, axes = new_figure(3)
    records, rows = [], []
    for axis, (title, groups) in zip(axes[0], panels.items(), strict=True):
        groups = [g[chosen] / np.maximum(np.linalg.norm(g[chosen], axis=1, keepdims=True), 1e-12) for g in groups]
        flat = np.concatenate(groups).astype(np.float64)
        points = TSNE(init="pca", random_state=0, perplexity=min(30.0, len(flat) / 4)).fit_transform(flat)
        for name, part in zip(data.features, np.split(points, len(groups)), strict=True):
            axis.scatter(part[:, 0], part[:, 1], s=4, label=name)
            records += [{"panel": title, "modality": name, "x": float(x), "y": float(y)} for x, y in part]
        axis.set(title=title, xticks=[], yticks=[])
        rows.append([title, f"{mixing(groups):.3f}"])
    axes[0, 0].legend(frameon=False)
    body = (
        f"{study.name}, {len(chosen)} items, rows at unit length. Share of the {NEIGHBOURS} nearest neighbours that belong to "
        f"another modality (1 - 1/M = {1 - 1 / len(tables):.2f} when they are fully mixed). The raw row compares every modality in "
        "principal axes of its own, so only the other two can be compared with each other.\n\n"
        + markdown(["panel", "mixing"], rows)
    )
    return write(study, "figure3", "Figure 3: features with and without prompt", body, records, figure)
