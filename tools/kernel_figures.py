"""Draws the figures of docs/kernels.md: who computes what. `python tools/kernel_figures.py` rewrites docs/kernels-*.svg.

Each figure is three grids of the same work, for the CPU, CUDA and Triton; a colour is one worker (a thread, a group of
lanes, a warp, a block, a program). Work is drawn, not time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#eeca3b", "#9d755d")
WIDTH, PITCH, CELL = 325, 17, 15


@dataclass(frozen=True)
class Panel:
    """One implementation: which worker has cell (row, column), and two lines of words."""

    title: str
    worker: Callable[[int, int], int]
    notes: tuple[str, str]


@dataclass(frozen=True)
class Figure:
    """`rows` x `columns` cells; `gaps`: columns before which a little room is left."""

    title: str
    caption: str
    rows: int
    columns: int
    panels: tuple[Panel, Panel, Panel]
    gaps: tuple[int, ...] = ()


FIGURES = {
    "bpr_kd": Figure(
        "bpr_kd: samples",
        "A row per sample: its user's, positive's and negative's embedding, each in quarters.",
        8, 12,
        (
            Panel("CPU (C++)", lambda r, c: r // 4, ("a thread takes a block of samples;", "in the loss a vector lane is a sample")),
            Panel("CUDA C++", lambda r, c: r, ("a group of lanes per sample, 16-byte loads;", "losses added lanes, warps, blocks in order")),
            Panel("Triton", lambda r, c: r // 2, ("a program per BLOCK_B samples;", "torch adds the losses")),
        ),
        gaps=(4, 8),
    ),
    "list_kd": Figure(
        "list_kd, list_scores: candidates",
        "A row per sample, a cell per candidate (K = 11); the first is the observed item.",
        8, 11,
        (
            Panel("CPU (C++)", lambda r, c: r // 4, ("a thread takes a block of samples;", "in the soft-max a vector lane is a sample")),
            Panel("CUDA C++", lambda r, c: r, ("a warp per sample; its groups of lanes score", "candidates, logits stay in shared memory")),
            Panel("Triton", lambda r, c: r, ("a program per sample: a [K, d] tile;", "logits stay in registers up to K = 64")),
        ),
        gaps=(1,),
    ),
    "emb_kd": Figure(
        "emb_kd: rows of student and teachers",
        "A row per node: the student's embedding, then that of two modalities' heads, each in quarters.",
        8, 12,
        (
            Panel("CPU (C++)", lambda r, c: r // 4, ("a thread takes a run of rows,", "all modalities in one pass")),
            Panel("CUDA C++", lambda r, c: r, ("a group of lanes per row,", "modality after modality")),
            Panel("Triton", lambda r, c: r // 4, ("a program per BLOCK_N rows;", "the student's tile stays in registers")),
        ),
        gaps=(4, 8),
    ),
    "topk": Figure(
        "topk: scores that are never stored",
        "A row per user, a column per block of items.",
        8, 12,
        (
            Panel("CPU (C++)", lambda r, c: r // 4, ("a thread takes users; register tiles of", "scores meet each user's k-th best")),
            Panel("CUDA C++", lambda r, c: r // 4 * 3 + c // 4, ("a block takes 64 users and a range of items;", "the ranges' lists of k are merged")),
            Panel("Triton", lambda r, c: (r // 2 * 6 + c // 2) % 8, ("a program per tile writes the best of each", "group of 32; the k best groups again")),
        ),
    ),
}  # fmt: skip


def svg(figure: Figure) -> str:
    """The figure as SVG text."""
    foot = 96 + figure.rows * PITCH
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 980 {foot + 78}" font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="20" y="26" font-size="16" font-weight="bold">{figure.title}</text>',
        f'<text x="20" y="46" fill="#555">{figure.caption} A colour is one worker.</text>',
    ]
    for i, panel in enumerate(figure.panels):
        left = 20 + i * WIDTH
        out.append(f'<text x="{left}" y="82" font-weight="bold">{panel.title}</text>')
        for r in range(figure.rows):
            for c in range(figure.columns):
                x = left + c * PITCH + 6 * sum(c >= gap for gap in figure.gaps)
                fill = COLOURS[panel.worker(r, c) % len(COLOURS)]
                out.append(f'<rect x="{x}" y="{96 + r * PITCH}" width="{CELL}" height="{CELL}" rx="2" fill="{fill}"/>')
        out += [f'<text x="{left}" y="{foot + 20 + 18 * n}" fill="#333">{t}</text>' for n, t in enumerate(panel.notes)]
    out.append(f'<text x="20" y="{foot + 66}" fill="#555">Work is drawn, not time.</text>')
    return "\n".join([*out, "</svg>", ""])


def main() -> None:
    """Writes every figure."""
    for name, figure in FIGURES.items():
        path = DOCS / f"kernels-{name}.svg"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(svg(figure))
        os.replace(temporary, path)
        print(f"written: {path}")


if __name__ == "__main__":
    main()
