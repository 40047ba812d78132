"""`mmkd update` against training again, on the demo's real purchases: the last tenth of the time joins a run on the rest.

`python bench/bench_update.py FOLDER [EPOCHS]` trains the early run into FOLDER (kept, so that a second call only measures;
EPOCHS bounds every stage), then times the update and both ways to train again on the joined data, and writes
FOLDER/update.json and a markdown table. All are evaluated on the same held-out pairs, the latest ones.
`pytest bench/bench_update.py` does the same with short training.
"""

from __future__ import annotations

import csv
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from harness import machine

import mmkd
from mmkd.data import Dataset, load_demo
from mmkd.evaluation import evaluate
from mmkd.files import write_json
from mmkd.training.run_folder import RunFolder

METRICS = ("recall@20", "ndcg@20")
# the late pairs carry 0, 1, 2 for before 98 %, before 99 % and after it: the cuts of the update fall on these moments
UPDATE = ["update.val_fraction=0.1", "update.test_fraction=0.05", "progress=false"]


def early_and_late(folder: Path) -> tuple[Dataset, Dataset, Path]:
    """The demo's first nine tenths as a data set, all of it with its features, and the last tenth as a file."""
    demo, finer = load_demo(val_fraction=0.1, test_fraction=0.1), load_demo(val_fraction=0.01, test_fraction=0.01)
    known = (demo.train + demo.val).tocsr()
    users, items = np.flatnonzero(np.diff(known.indptr)), np.flatnonzero(np.bincount(known.indices))
    early = Dataset(
        "demo, early", demo.train[users][:, items], demo.val[users][:, items], None,
        {name: x[items] for name, x in demo.features.items()}, demo.user_ids[users], demo.item_ids[items],
    )  # fmt: skip
    late = demo.test.tocoo()
    moment = sum(
        k * (np.asarray(part[late.row, late.col]).ravel() > 0) for k, part in ((1, finer.val), (2, finer.test))
    )
    path = folder / "late.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["user", "item", "timestamp"])
        rows.writerows(zip(demo.user_ids[late.row], demo.item_ids[late.col], moment, strict=True))
    return early, demo, path


def joined(run: Path, demo: Dataset) -> Dataset:
    """The data of an updated run with the demo's features again, in its order of items."""
    data = RunFolder(run).dataset()
    where = {item: row for row, item in enumerate(demo.item_ids.tolist())}
    rows = np.array([where[item] for item in data.item_ids.tolist()])
    return replace(data, features={name: x[rows] for name, x in demo.features.items()})


def measure(folder: Path, settings: dict) -> dict:
    """Seconds and accuracy of each way to take in the late pairs."""
    early, demo, late = early_and_late(folder)
    base = folder / "early"
    if not (base / "student.safetensors").exists():
        mmkd.train(settings, out=base, dataset=early, resume=base.exists())
    work = Path(tempfile.mkdtemp(dir=folder))
    start = time.perf_counter()
    update = mmkd.update(base, late, out=work / "update", overrides=UPDATE)
    rows = {name: {"seconds": 0.0, **values} for name, values in update.rows.items()}
    rows["fine-tuned"]["seconds"] = time.perf_counter() - start
    info = RunFolder(work / "update").info()["seconds"]
    rows["new rows, not fine-tuned"]["seconds"] = info["joining"]
    data = joined(work / "update", demo)
    start = time.perf_counter()
    again = mmkd.train({**settings, "baselines": ["lightgcn"]}, out=work / "again", dataset=data)
    total = time.perf_counter() - start
    lightgcn = RunFolder(again.path).info()["seconds"]["LightGCN"]
    rows["trained again, LightGCN alone"] = {"seconds": lightgcn, **again.rows["LightGCN"]}
    rows["trained again, teacher and student"] = {"seconds": total - lightgcn, **again.rows["MMKD student"]}
    saved = mmkd.load(work / "update")
    assert evaluate(saved.user_emb, saved.item_emb, data, "test", (20,))["recall@20"] == rows["fine-tuned"]["recall@20"]
    return {"machine": machine(), "parts": {p: int(getattr(data, p).nnz) for p in ("train", "val", "test")}, "rows": rows,
            "update_seconds": info}  # fmt: skip


def markdown(result: dict) -> str:
    """The rows with their time against the update's."""
    m, mine = result["machine"], result["rows"]["fine-tuned"]["seconds"]
    lines = [
        f"{m['cpu']}, {m['threads']} threads; torch {m['torch']}; commit {m['commit']}, {m['date']}; pairs {result['parts']}.",
        "",
    ]
    lines += ["| | " + " | ".join(METRICS) + " | seconds | times the update |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, row in result["rows"].items():
        values = " | ".join(f"{row[metric]:.4f}" for metric in METRICS)
        lines.append(f"| {name} | {values} | {row['seconds']:.1f} | {row['seconds'] / mine:.1f}x |")
    return "\n".join(lines)


def bench_update(tmp_path):
    short = {"epochs": 3, "eval_every": 3}
    settings = {"progress": False, "baselines": [], "teacher": short, "student": short, "lightgcn": short}
    result = measure(tmp_path, settings)
    print("\n" + markdown(result))
    rows = result["rows"]
    assert rows["fine-tuned"]["recall@20"] > rows["old student as it was"]["recall@20"]
    assert rows["fine-tuned"]["seconds"] < rows["trained again, teacher and student"]["seconds"]


if __name__ == "__main__":
    torch.set_num_threads(min(2, torch.get_num_threads()))
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    bound = {"epochs": int(sys.argv[2])} if len(sys.argv) > 2 else {}
    found = measure(target, {"progress": False, "baselines": [], "teacher": bound, "student": bound, "lightgcn": bound})
    write_json(target / "update.json", found)
    print(markdown(found))
