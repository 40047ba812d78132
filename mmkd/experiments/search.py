"""The same small search for every trained model, decided on validation; what it chose goes into all later tables."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from mmkd.experiments.cells import Study
from mmkd.experiments.writing import bars, markdown, write
from mmkd.files import write_json
from mmkd.models.baselines import TITLES, TRAINED

# 8 trials a model. On sparse data L2 is what decides (BPR-MF on tiktok: recall@20 .033 at 1e-3, .099 at 0.1), and LightGCN
# wants 1e-4 on citeulike-t.
GRID = {"lr": (1e-3, 3e-3), "l2": (1e-4, 1e-3, 1e-2, 1e-1)}
SECTION = {"lightgcn": "lightgcn", "mmkd": "teacher"} | {name: f"models.{name}" for name in TRAINED}


def trials(name: str, quick: bool = False) -> list[dict[str, Any]]:
    """The settings tried for a model, by dotted path."""
    section = SECTION[name]
    found = [
        {f"{section}.{key}": value for key, value in zip(GRID, values, strict=True)}
        for values in product(*GRID.values())
    ]
    return [found[0], found[-1]] if quick else found


def tune(study: Study) -> Path:
    """Tries the grid on one seed, with the test part taken away, and keeps the best of each model in `tuned.json`.

    Later cells of the same study start from what was chosen.
    """
    bare = Study(study.out / "search", study.config, seeds=1)
    bare.datasets[0] = replace(study.dataset(0), test=None)
    metric, tuned, records = study.config.evaluation.metric, {}, []
    for name in SECTION:
        scores = []
        for changes in trials(name, study.quick):
            cell = bare.cell({"model": name, **changes})
            scores.append((cell.results[TITLES[name]][metric], changes))
            short = {path.rsplit(".", 1)[-1]: value for path, value in changes.items()}
            records.append({"model": TITLES[name], **short, metric: scores[-1][0]})
        tuned[name] = max(scores, key=lambda pair: pair[0])[1]
    study.out.mkdir(parents=True, exist_ok=True)
    write_json(study.out / "tuned.json", tuned)
    best = {TITLES[n]: max(r[metric] for r in records if r["model"] == TITLES[n]) for n in SECTION}
    rows = [
        [r["model"], r["lr"], r["l2"], f"**{r[metric]:.4f}**" if r[metric] == best[r["model"]] else f"{r[metric]:.4f}"]
        for r in records
    ]
    body = f"{study.name}, validation {metric}, one seed, the test part not loaded.\n\n"
    body += markdown(["model", "lr", "l2", metric], rows)
    chart = bars(list(best), list(best.values()), [0.0] * len(best), f"validation {metric}")
    return write(study, "search", "Search: the same budget for every model", body, records, chart)
