"""Bench results as a markdown table: `python bench/report.py bench/results/NAME.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def markdown(path: Path) -> str:
    """One line per row: ours, each rival's time and ratio, and the target where there is one."""
    content = json.loads(path.read_text())
    m = content["machine"]
    if m["gpu"]:
        return _on_gpu(m, content["rows"])
    where = f"{m['cpu']}, {m['threads']} threads, {m['isa']}"
    lines = [
        f"{where}; torch {m['torch']}; copy {m['copy_gbps']} GB/s, GEMM {m['gemm_gflops']} GFLOP/s; commit {m['commit']}, {m['date']}.",
        "",
        "| op | case | ours, ms | rival | rival, ms | ratio | first call | target |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in content["rows"]:
        for name, ms in row["rivals"].items():
            goal = f"{row['target'][name]:g}x" if name in row["target"] else ""
            time, ratio = ("absent", "") if ms is None else (f"{ms:.2f}", f"{row['ratios'][name]:.1f}x")
            first = row.get("first") or {}
            cold = f"{first[name] / first['ours']:.1f}x" if name in first else ""
            lines.append(
                f"| {row['op']} | {row['case']} | {row['ours_ms']:.2f} | {name} | {time} | {ratio} | {cold} | {goal} |"
            )
    return "\n".join(lines)


def _on_gpu(m: dict, rows: list[dict]) -> str:
    """The same for a GPU: a call from Python, and its kernels alone (as a CUDA graph) where they could be captured."""
    lines = [
        f"{m['gpu']}; torch {m['torch']}; copy {m['gpu_copy_gbps']:.0f} GB/s; commit {m['commit']}, {m['date']}.",
        "",
        "| op | case | ours: called, ms | captured, us | rival | called, ms (ratio) | captured, us (ratio) |",
        "| --- | --- | ---: | ---: | --- | ---: | ---: |",
    ]
    for row in rows:
        alone = row.get("captured") or {}
        ours = f"{1e3 * alone['ours']:.0f}" if "ours" in alone else ""
        for name, ms in row["rivals"].items():
            called = "absent" if ms is None else f"{ms:.2f} ({row['ratios'][name]:.1f}x)"
            kernels = f"{1e3 * alone[name]:.0f}" if name in alone else ""
            if kernels and ours:
                kernels += f" ({alone[name] / alone['ours']:.1f}x)"
            lines.append(
                f"| {row['op']} | {row['case']} | {row['ours_ms']:.2f} | {ours} | {name} | {called} | {kernels} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(Path(sys.argv[1])))
