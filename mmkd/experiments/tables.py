"""Tables 4 to 8 of the paper."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file
from scipy import stats

from mmkd import ops
from mmkd.evaluation.evaluator import as_exclude, seen_items
from mmkd.experiments.cells import Cell, Study
from mmkd.experiments.writing import bars, markdown, write
from mmkd.models.baselines import NAMES, TITLES
from mmkd.training.compactness import STAGES, compactness
from mmkd.training.summary import COLUMNS

MMKD = TITLES["mmkd"]
ABLATION: dict[str, dict[str, Any]] = {
    "w/o Prompt": {"prompt.strength": 0.0},
    "w/o PairKD": {"distill.pair": 0.0},
    "w/o ListKD": {"distill.list": 0.0},
    "w/o disentangle": {"distill.list_alpha": 1.0, "distill.list_beta": 1.0, "distill.list_weight": "coupled"},
    "w/o EmbKD": {"distill.emb": 0.0},
    "w/o any distillation": {"distill.pair": 0.0, "distill.list": 0.0, "distill.emb": 0.0},
    "random start": {"student.init": "xavier"},  # and LightGCN's settings: see `ablation`
    "w/o neighbour graphs": {"teacher.neighbors": 0},
    "with shared negatives": {"teacher.shared_negatives": 256, "teacher.l2": 3e-2},
    "uniform modalities": {"distill.modality_weights": "uniform"},
    "GCN student": {"student.encoder": "gcn"},
    "MLP student": {"student.encoder": "mlp"},
}


def _over_seeds(study: Study, changes: dict[str, Any], method: str) -> tuple[dict[str, np.ndarray], list[Cell]]:
    """Metric -> values by seed, and the cells."""
    cells = study.cells([(changes, seed) for seed in study.seeds])
    return {c: np.array([cell.results[method][c] for cell in cells]) for c in COLUMNS}, cells


def _row(label: str, values: dict[str, np.ndarray], best: dict[str, float]) -> list[str]:
    cells = []
    for column in COLUMNS:
        mean, many = values[column].mean(), len(values[column]) > 1
        text = f"{mean:.4f}" + (f" ± {values[column].std(ddof=1):.4f}" if many else "")
        cells.append(f"**{text}**" if mean == best[column] else text)
    return [label, *cells]


def _table(rows: dict[str, dict[str, np.ndarray]]) -> str:
    best = {c: max(values[c].mean() for values in rows.values()) for c in COLUMNS}
    return markdown(["method", *COLUMNS], [_row(label, values, best) for label, values in rows.items()])


def _records(rows: dict[str, dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    return [
        {"method": label, "seed": seed, **{c: float(values[c][seed]) for c in COLUMNS}}
        for label, values in rows.items()
        for seed in range(len(values[COLUMNS[0]]))
    ]


def _chart(rows: dict[str, dict[str, np.ndarray]]):
    means = [float(v["recall@20"].mean()) for v in rows.values()]
    return bars(list(rows), means, [float(v["recall@20"].std()) for v in rows.values()], "recall@20")


def significance(ours: np.ndarray, theirs: np.ndarray) -> str:
    """Gain of the mean in percent and the two-sided p of a paired t-test over seeds."""
    gain = f"{100 * (ours.mean() / theirs.mean() - 1):+.2f} %" if theirs.mean() else "n/a"
    if len(ours) < 2:
        return f"{gain} (one seed: no test)"
    difference = ours - theirs
    if np.allclose(difference, difference[0]):
        return f"{gain} (the same difference in every seed: no test)"
    return f"{gain} (p = {stats.ttest_rel(ours, theirs).pvalue:.2g})"


def table4(study: Study) -> Path:
    """Comparison with every baseline; mean and deviation over seeds, paired t-test against the best of them."""
    rows, part = {}, "test"
    changes = {name: {"model": "mmkd" if name == "teacher" else name} for name in NAMES}
    study.cells([(change, seed) for change in changes.values() for seed in study.seeds])
    for name in NAMES:
        rows[TITLES[name]], cells = _over_seeds(study, changes[name], TITLES[name])
        part = cells[0].part
    rivals = {label: values for label, values in rows.items() if label not in (MMKD, TITLES["teacher"])}
    lines = []
    for column in COLUMNS:
        best = max(rivals, key=lambda label: rivals[label][column].mean())
        against = [(best, rivals[best]), (TITLES["lightgcn"], rivals[TITLES["lightgcn"]])]
        gains = [f"{label} {significance(rows[MMKD][column], values[column])}" for label, values in against]
        lines.append(f"- {column}: MMKD against the best baseline, {gains[0]}; against {gains[1]}")
    body = f"{study.name}, {part} part, {len(study.seeds)} seeds.\n\n{_table(rows)}\n\n" + "\n".join(lines)
    return write(study, "table4", "Table 4: comparison", body, _records(rows), _chart(rows))


def ablation(study: Study) -> dict[str, dict[str, Any]]:
    """`ABLATION` for this study. A student that starts at random is trained as the undistilled LightGCN is, rate, batch
    and patience: the defaults of the stage are those of one that is nearly there."""
    own = study.settings({"model": "lightgcn"}, 0).lightgcn.model_dump(exclude={"init"})
    return ABLATION | {"random start": ABLATION["random start"] | {f"student.{key}": own[key] for key in own}}


def table5(study: Study) -> Path:
    """Ablation: what each part adds."""
    rows, part, parts = {}, "test", ablation(study)
    study.cells([(c, seed) for c in ({}, {"model": "lightgcn"}, *parts.values()) for seed in study.seeds])
    for label, changes in parts.items():
        rows[label], cells = _over_seeds(study, changes, MMKD)
        part = cells[0].part
    rows["LightGCN (no teacher)"], _ = _over_seeds(study, {"model": "lightgcn"}, TITLES["lightgcn"])
    rows["MMKD"], _ = _over_seeds(study, {}, MMKD)
    rows["teacher"], _ = _over_seeds(study, {}, TITLES["teacher"])
    lines = [
        f"- {label}: MMKD is {significance(rows['MMKD']['recall@20'], rows[label]['recall@20'])} in recall@20"
        for label in (*ABLATION, "LightGCN (no teacher)")
    ]
    d = study.config.distill
    if (d.list_alpha, d.list_beta, d.list_weight) == (1.0, 1.0, "coupled"):
        lines.append(
            "- with alpha = beta = 1, coupled, ListKD is the plain KL (Eq. 16), so w/o disentangle is MMKD itself"
        )
    body = f"{study.name}, {part} part, {len(study.seeds)} seeds.\n\n{_table(rows)}\n\n" + "\n".join(lines)
    return write(study, "table5", "Table 5: ablation", body, _records(rows), _chart(rows))


def _epoch_seconds(cell: Cell, stage: str) -> float:
    from mmkd.training.run_folder import RunFolder

    lines = [line for line in RunFolder(cell.path).metrics() if line["stage"] == stage]
    return lines[-1]["seconds"] / len(lines) if lines else 0.0


def _recommend_seconds(study: Study, cell: Cell) -> float:
    """Top 20 of every user from the served tables, seen items left out; the best of three."""
    tables = load_file(cell.path / "student.safetensors")
    exclude = as_exclude(seen_items(study.dataset(0), "val"))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        ops.topk(tables["user_emb"], tables["item_emb"], min(20, study.dataset(0).num_items), exclude=exclude)
        times.append(time.perf_counter() - start)
    return min(times)


def _peak_memory(study: Study) -> dict[str, float]:
    """Peak MB of teacher and student above interpreter and libraries, each in a process of its own; empty off Linux."""
    measured = compactness(study.settings({}, 0), steps=4)
    return {stage: measured[stage]["memory"]["run"] / 1e6 for stage in STAGES if measured[stage]["memory"]}


def _measured(value: float, form: str) -> str:
    return "-" if np.isnan(value) else format(value, form)


def table6(study: Study) -> Path:
    """Compactness and time: parameters with and without the frozen features a model has to carry, and peak memory."""
    data = study.dataset(0)
    frozen = sum(int(np.prod(x.shape)) for x in data.features.values())
    full, *rivals = study.cells([({}, 0), ({"model": "lattice"}, 0), ({"model": "bm3"}, 0)])
    plan = [("teacher", full, "teacher", True)]
    plan += [(TITLES[n], cell, n, True) for n, cell in zip(("lattice", "bm3"), rivals, strict=True)]
    plan += [(MMKD, full, "student", False)]
    most = full.parameters["teacher"] + frozen
    memory, records = _peak_memory(study), []
    for label, cell, stage, carries in plan:
        carried = cell.parameters[label] + (frozen if carries else 0)
        records.append({
            "model": label, "parameters": cell.parameters[label], "with features": carried, "ratio": carried / most,
            "seconds per epoch": _epoch_seconds(cell, stage), "peak memory, MB": memory.get(stage, float("nan")),
            "recommend all users, s": float("nan") if label == "teacher" else _recommend_seconds(study, cell),
        })  # fmt: skip
    cells = [
        [r["model"], f"{r['parameters']:,}", f"{r['with features']:,}", f"{100 * r['ratio']:.2f} %",
         f"{r['seconds per epoch']:.2f}", _measured(r["peak memory, MB"], ",.0f"),
         _measured(r["recommend all users, s"], ".3f")] for r in records
    ]  # fmt: skip
    body = (
        f"{study.name}: {data.num_users:,} users, {data.num_items:,} items, {frozen:,} frozen feature numbers. "
        "Seconds are wall clock on this machine, with whatever else ran on it; `mmkd bench` measures in isolation. Memory is the stage's peak above interpreter and libraries; it is taken of teacher and student alone, and only what is served recommends (-: not taken).\n\n"
        + markdown(
            [
                "model",
                "parameters",
                "with features",
                "ratio",
                "seconds per epoch",
                "peak memory, MB",
                "recommend all users, s",
            ],
            cells,
        )
    )
    chart = bars([r["model"] for r in records], [r["with features"] for r in records], [0.0] * 4, "numbers carried")
    return write(study, "table6", "Table 6: compactness and time", body, records, chart)


def table7(study: Study) -> Path:
    """Incremental learning: the last tenth of every user's train items arrives later."""
    from mmkd.experiments.incremental import adapt

    records = adapt(study)
    cells = [
        [r["model"], f"{r['before']:.4f}", f"{r['recall@20']:.4f}", f"{r['ndcg@20']:.4f}", f"{1000 * r['seconds']:.0f}"]
        for r in records
    ]
    body = (
        f"{study.name}: trained without a tenth of the train interactions, then one epoch with them. MMKD's row is `mmkd update`, whose epoch is over the new pairs; the others' is over all of them. Before: on the old graph.\n\n"
        + markdown(["model", "recall@20 before", "recall@20", "ndcg@20", "ms"], cells)
    )
    chart = bars([r["model"] for r in records], [r["recall@20"] for r in records], [0.0] * len(records), "recall@20")
    return write(study, "table7", "Table 7: adapting to new interactions", body, records, chart)


def table8(study: Study) -> Path:
    """Every weight of teacher and student with its shape."""
    cell = study.cell()
    groups = {
        "teacher": load_file(cell.path / "teacher.safetensors"),
        "student": {k: v for k, v in load_file(cell.path / "student.safetensors").items() if k.endswith("emb0")},
    }
    records = [
        {"model": model, "weight": name, "shape": str(list(t.shape)), "numbers": t.numel()}
        for model, tensors in groups.items()
        for name, t in tensors.items()
    ]
    records += [
        {"model": "teacher", "weight": f"{name} features (frozen)", "shape": str(list(x.shape)), "numbers": x.size}
        for name, x in study.dataset(0).features.items()
    ]
    totals = {m: sum(r["numbers"] for r in records if r["model"] == m) for m in groups}
    rows = [[r["model"], r["weight"], r["shape"], f"{r['numbers']:,}"] for r in records]
    body = markdown(["model", "weight", "shape", "numbers"], rows)
    body += f"\n\nTeacher {totals['teacher']:,}, student {totals['student']:,}: {totals['student'] / totals['teacher']:.2%}."
    chart = bars(list(totals), list(totals.values()), [0.0, 0.0], "numbers")
    return write(study, "table8", "Table 8: parameters", body, records, chart)
