"""How a student's epoch grows with the data: the Netflix size of the paper's Table 3 times 1, 4 and 16, same degree law.

    python bench/growth.py prepare FOLDER            writes the three data sets (no timing)
    python bench/growth.py measure FOLDER FACTOR     times STEPS steps; keep the machine idle
    python bench/growth.py plot FOLDER docs/growth   writes docs/growth.svg and prints the table

An epoch's time is the median step's times the number of steps. Each factor is measured twice: with the batch of the paper's
size, and with a batch that grows with the data, so that an epoch keeps its number of steps.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from harness import machine
from scipy import sparse

from mmkd.config import load_config
from mmkd.data.npz import write_npz
from mmkd.data.synthesis import PAPER_SIZES, of_size
from mmkd.files import write_atomic, write_json
from mmkd.training.compactness import compactness

FACTORS, STEPS, BATCH, DIM = (1, 4, 16), 5, 1024, 64
WIDTHS = (DIM, DIM)  # what the student's stage costs does not depend on the features' widths


def prepare(folder: Path) -> None:
    users, items, pairs, _ = PAPER_SIZES["netflix"]
    for factor in FACTORS:
        data = of_size(users * factor, items * factor, pairs * factor, WIDTHS)
        write_npz(replace(data, val=_some_users(data.val)), folder / f"netflix-x{factor}")


def _some_users(val: sparse.csr_matrix) -> sparse.csr_matrix:
    """Validation of 5,000 users: ranking all items for all users grows with the square, and is no part of what is timed."""
    kept = sparse.diags((np.arange(val.shape[0]) < 5000).astype(val.dtype)) @ val
    kept.eliminate_zeros()
    return kept.tocsr()


def measure(folder: Path, factor: int) -> None:
    found = {}
    for name, batch in (("fixed", BATCH), ("growing", BATCH * factor)):
        if name == "growing" and factor == 1:
            found[name] = found["fixed"]
            continue
        student = {"batch_size": batch, "layers": 2}
        data = {"path": str(folder / f"netflix-x{factor}"), "format": "npz"}
        # neighbour graphs take I^2 products once and are gone when the student begins
        teacher = {"layers": 2, "neighbors": 0}
        settings = load_config({"dim": DIM, "data": data, "student": student, "teacher": teacher, "threads": 2})
        found[name] = compactness(settings, STEPS, ("student",))
    write_json(folder / f"growth-{factor}.json", {"machine": machine(), "factor": factor, **found})


def slope(x: list[float], y: list[float]) -> float:
    """Exponent of the power law through the points, by least squares of the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def plot(folder: Path, target: Path) -> None:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    runs = [json.loads(path.read_text()) for k in FACTORS if (path := folder / f"growth-{k}.json").exists()]
    edges = [run["fixed"]["data"]["interactions"] for run in runs]
    series = {
        f"step, batch {BATCH:,}, s": [run["fixed"]["student"]["step_seconds"] for run in runs],
        f"epoch, batch {BATCH:,}, s": [run["fixed"]["student"]["epoch_seconds"] for run in runs],
        "epoch, batch grows with the data, s": [run["growing"]["student"]["epoch_seconds"] for run in runs],
        f"peak memory of the run, batch {BATCH:,}, MB": [
            run["fixed"]["student"]["memory"]["run"] / 1e6 for run in runs
        ],
    }
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    FigureCanvasSVG(figure)
    left, right = figure.subplots(1, 2)
    m = runs[0]["machine"]
    print(f"{m['cpu']}, {m['threads']} threads, {m['isa']}; torch {m['torch']}; commit {m['commit']}, {m['date']}.\n")
    print(
        "| | " + " | ".join(f"{e:,} interactions" for e in edges) + " | slope |\n| --- |" + " ---: |" * (len(edges) + 1)
    )
    for name, values in series.items():
        axis, exponent = right if "memory" in name else left, slope(edges, values)
        axis.plot(edges, values, marker="o", label=f"{name.rsplit(',', 1)[0]} (slope {exponent:.2f})")
        print(
            f"| {name} | "
            + " | ".join(f"{v:,.3g}" if v < 100 else f"{v:,.0f}" for v in values)
            + f" | {exponent:.2f} |"
        )
    for axis, label in ((left, "seconds"), (right, "MB")):
        axis.set(xscale="log", yscale="log", xlabel="train interactions", ylabel=label)
        axis.grid(alpha=0.3, which="both")
        axis.legend(frameon=False, fontsize=7)
    write_atomic(target.with_suffix(".svg"), lambda temporary: figure.savefig(temporary, metadata={"Date": None}))


if __name__ == "__main__":
    what, where = sys.argv[1], Path(sys.argv[2])
    if what == "prepare":
        prepare(where)
    elif what == "measure":
        measure(where, int(sys.argv[3]))
    else:
        plot(where, Path(sys.argv[3]))
