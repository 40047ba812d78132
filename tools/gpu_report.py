"""Writes docs/gpu.md: what can be known of the GPU kernels without a GPU (`make gpu-report`).

Facts of the machine code (registers, memory, width of loads) for every kernel and architecture, and predicted times
from the bytes an op has to move. A prediction is not a measurement, and every page says so.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import gpu_report_cuda

OUT = Path(__file__).parents[1] / "docs" / "gpu.md"


@dataclass(frozen=True)
class Arch:
    """Limits of one multiprocessor (CUDA programming guide, table of compute capabilities)."""

    threads: int
    blocks: int
    shared_bytes: int
    registers: int = 65536


ARCHS = {
    "sm_80": Arch(2048, 32, 164 * 1024),
    "sm_86": Arch(1536, 16, 100 * 1024),
    "sm_89": Arch(1536, 24, 100 * 1024),
    "sm_90": Arch(2048, 32, 228 * 1024),
}


@dataclass(frozen=True)
class Card:
    """Data-sheet numbers, but for the L2 bandwidth, which no data sheet gives: an assumption on the low side."""

    name: str
    arch: str
    gbps: float
    l2_mb: float
    l2_gbps: float
    tflops: float


CARDS = (
    Card("RTX 3090", "sm_86", 936, 6, 1800, 35.6),
    Card("RTX 4090", "sm_89", 1008, 72, 4000, 82.6),
    Card("H100 SXM", "sm_90", 3350, 50, 5500, 66.9),
)
LAUNCH_US = 2.5  # what one more kernel costs in a stream that is kept busy; an assumption
# users, items, interactions (paper, Table 3)
SIZES = {
    "tiktok": (14_343, 8_690, 276_637),
    "netflix": (43_739, 17_239, 609_341),
    "electronics": (41_691, 21_479, 359_165),
}
DIM, BATCH, LIST, MODALITIES, BYTES = 64, 1024, 11, 2, 4


@dataclass
class Work:
    """What one call has to do: bytes that must cross DRAM once, bytes gathered again and again from a table of
    `table` bytes, multiply-adds counted as two flops, and kernels launched."""

    op: str
    stream: float
    gather: float = 0
    table: float = 0
    flops: float = 0
    launches: int = 1


def works(users: int, items: int, edges: int) -> list[Work]:
    """The ops of a training step and of an evaluation at one size, float32."""
    row, nodes, nnz = DIM * BYTES, users + items, 2 * edges
    tables = nodes * row
    layer = Work("spmm (one layer)", 2 * tables + nnz * 4 + nodes * 12, nnz * (row + 4), tables, 2 * nnz * DIM, 3)
    both = [
        Work("propagate L=2 " + way, 2 * (layer.stream + tables), 2 * layer.gather, tables, 2 * layer.flops, 4)
        for way in ("forward", "backward")
    ]
    pair, lists = 3 * BATCH * row, (LIST + 1) * BATCH * row
    logits = (MODALITIES + 1) * BATCH * LIST * BYTES
    zeroed = tables  # the gradients' tables are written whole
    return [
        layer,
        *both,
        Work("bpr_kd forward", pair, launches=2),
        Work("bpr_kd backward", pair + zeroed, 2 * pair, tables, launches=3),
        Work("list_kd forward", lists + logits, launches=2),
        Work("list_kd backward", lists + logits + zeroed, 2 * lists, tables, launches=3),
        Work("emb_kd forward", items * row * (1 + MODALITIES), launches=2),
        Work("emb_kd backward", items * row * 2 * (1 + MODALITIES), launches=1),
        Work("topk k=20, all users", tables + users * 20 * 12, flops=2.0 * users * items * DIM, launches=2),
    ]


def predicted_us(work: Work, card: Card) -> float:
    """Roofline: the slowest of DRAM, L2 and arithmetic, plus the launches. A gather that misses L2 goes to DRAM."""
    hit = min(1.0, 0.8 * card.l2_mb * 1e6 / work.table) if work.table else 1.0
    dram = (work.stream + (1 - hit) * work.gather) / card.gbps
    cache = (work.stream + work.gather) / card.l2_gbps
    # Half the peak: what a tiled product without tensor cores usually reaches.
    arithmetic = work.flops / (0.5 * card.tflops * 1e3)
    return max(dram, cache, arithmetic) / 1e3 + work.launches * LAUNCH_US


def occupancy(registers: int, shared_bytes: int, block: int, arch: Arch) -> float:
    """Share of a multiprocessor's threads that can be resident (registers come 256 to a warp, shared memory 128 B)."""
    warps = block // 32
    per_warp = -(-max(1, registers) * 32 // 256) * 256
    shared = -(-(shared_bytes + 1024) // 128) * 128  # 1 KB is the system's
    blocks = min(arch.blocks, arch.threads // block, arch.registers // (per_warp * warps), arch.shared_bytes // shared)
    return blocks * block / arch.threads


def _table(header: list[str], body: list[list[str]]) -> list[str]:
    return [" | ".join(["", *line, ""]).strip() for line in [header, ["---"] * len(header), *body]]


def predictions() -> list[str]:
    """The predicted microseconds, one table per card."""
    lines = []
    for card in CARDS:
        lines += [
            f"### {card.name} ({card.gbps:g} GB/s, {card.l2_mb:g} MB of L2, assumed {card.l2_gbps:g} GB/s from it)",
            "",
        ]
        by_size = {name: works(*size) for name, size in SIZES.items()}
        body = [
            [by_size["tiktok"][i].op]
            + [
                f"{(w[i].stream + w[i].gather) / 1e6:.1f} MB: {predicted_us(w[i], card):.0f} us"
                for w in by_size.values()
            ]
            for i in range(len(by_size["tiktok"]))
        ]
        lines += [*_table(["op", *by_size], body), ""]
    return lines


def _lines(rows: list[dict]) -> list[list[dict]]:
    """Rows of one kernel and configuration side by side, one per architecture. A second row for an architecture is the
    same kernel with fewer inputs: it begins a line of its own."""
    lines: dict[tuple, list[dict]] = {}
    for r in rows:
        turn, key = 0, (r["op"], r["kernel"], r["impl"], r["config"])
        while any(r["arch"] == other["arch"] for other in lines.get((*key, turn), ())):
            turn += 1
        lines.setdefault((*key, turn), []).append(r)
    return [lines[key] for key in sorted(lines, key=lambda key: (key[0], key[2], key[1], key[3], key[4]))]


def _share(row: dict) -> str:
    if row["arch"] not in ARCHS:
        return "-"
    return f"{100 * occupancy(row['registers'], row['shared_bytes'], row['block'], ARCHS[row['arch']]):.0f}%"


def kernel_table(rows: list[dict]) -> list[str]:
    """One line per kernel and configuration of either implementation; architectures side by side where they differ."""

    def each(line: list[dict], value) -> str:
        seen = [str(value(r)) for r in line]
        return seen[0] if len(set(seen)) == 1 else " / ".join(seen)

    body = []
    for line in _lines(rows):
        first = line[0]
        numbers = ("registers", "shared_bytes", "spill_bytes", "stack_bytes", "global_load_width")
        body.append(
            [
                first["op"], first["impl"], first["kernel"] + (" *" if first.get("fast") else ""), first["config"] or "-",
                _names([r["arch"] for r in line]), *(each(line, lambda r, n=n: r[n]) for n in numbers), each(line, _share),
            ]
        )  # fmt: skip
    header = [
        "op",
        "in",
        "kernel",
        "variant",
        "for",
        "registers",
        "shared B",
        "spill B",
        "stack B",
        "load bits",
        "occupancy",
    ]
    return [*_table(header, body), ""]


def _names(archs: list[str]) -> str:
    """`80-90` for all four NVIDIA architectures."""
    others = [a for a in archs if a not in ARCHS]
    own = "80-90" if set(ARCHS) <= set(archs) else ", ".join(a.removeprefix("sm_") for a in archs if a in ARCHS)
    return ", ".join([own] * bool(own) + others)


def with_blocks(rows: list[dict]) -> list[dict]:
    """Triton's rows with what the table needs besides: `impl`, and the threads of a block."""
    warps = [int(r["config"].rpartition("warps=")[2] or 4) for r in rows]
    return [{**r, "impl": "Triton", "block": 32 * w} for r, w in zip(rows, warps, strict=True)]


def spilling(rows: list[dict]) -> list[str]:
    """The Triton variants that spill, in a sentence. Without a stack nothing went to memory: scalar registers of gfx942
    in lanes of a vector register."""
    names = [
        f"{r['kernel']} ({r['config']}, {r['arch']}, {r['spill_bytes']} B{'' if r['stack_bytes'] else ' of scalar registers in vector registers'})"
        for r in rows
        if r["spill_bytes"] or r["stack_bytes"]
    ]
    return [f"Triton variants that spill, of {len(rows)}: {'; '.join(names) or 'none'}."]


def page(cuda: list[dict] | None, triton: list[dict] | None) -> str:
    """The page's text."""
    lines = [
        "# The GPU kernels: machine code and predictions",
        "",
        "Written by `make gpu-report` (tools/gpu_report.py). **No number on this page was measured on a GPU.** What an H100",
        "measured is in [performance](performance.md#on-a-gpu); on an RTX 3090 and all others the kernels are not yet timed.",
        "What stands behind them:",
        "",
        "- The CUDA kernels' own source runs on the CPU in the tests (`csrc/simt`): one fiber per thread, several seeded orders,",
        "  shared memory that starts as NaN, divergent barriers and shuffles reported, all under AddressSanitizer and",
        "  UndefinedBehaviorSanitizer, against the float64 reference. `tests/cuda/test_planted_bugs.py` plants bugs and sees each",
        "  one caught. Not covered by that: memory that becomes visible late, the compiler's code, speed.",
        "- The same cases run on a GPU where there is one (`pytest -m gpu`): all did on an H100.",
        "- Facts of the machine code, below. A fast path is one whose rows are moved 16 bytes at a time; the tests hold it to 0",
        "  bytes of stack and to 128-bit loads on every architecture.",
        "- Predictions from the bytes an op has to move. They are predictions.",
        "",
        "## Machine code",
        "",
        f"Architectures: {', '.join(ARCHS)}, for CUDA C++ with PTX of the last, and gfx942 (AMD MI300) for Triton. Numbers that differ",
        "between them stand in this order. `*`: a fast path. `load bits`: the widest load from global memory. Occupancy is",
        "theoretical: what registers, threads and shared memory allow (K = 11 candidates, k = 20). Triton: d = 64, K = 11, all four",
        "table types with every configuration, and with the fixed configuration: optional inputs left out (lines that look like",
        "another), and the sizes before a colon. `d=65` stands for all odd sizes and more than 2^31 entries: its loads are narrow.",
        "`flat`: spmm over all rows in order, else over some or in another order. `few`: topk of at most 128, else of more.",
        "The tests compile all of Triton's lines again in every run and hold them to no spill and no stack.",
        *spilling(triton or []),
        "",
        *kernel_table([dict(r, impl="CUDA") for r in cuda or ()] + with_blocks(triton or [])),
    ]
    lines += [
        "## Predicted times",
        "",
        f"float32, d = {DIM}, B = {BATCH}, K = {LIST}, {MODALITIES} modalities, the paper's three sizes. The roofline: the slowest",
        "of DRAM, L2 and arithmetic (half the data-sheet peak without tensor cores), plus "
        f"{LAUNCH_US} us for every kernel",
        "launched. A gather from a table that does not fit in 80% of L2 goes to DRAM for the part that does not fit. The MB",
        "are bytes moved, gathered rows counted every time (docs/kernels.md has the formulas).",
        "",
        *predictions(),
    ]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Collects the rows and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--library", type=Path, default=gpu_report_cuda.LIBRARY)
    parser.add_argument(
        "--triton", type=Path, help="rows as JSON instead of compiling the Triton kernels (several minutes)"
    )
    parser.add_argument("--no-triton", action="store_true")
    options = parser.parse_args()
    cuda = None
    if options.library.exists():
        cuda = gpu_report_cuda.rows(options.library)
    else:
        print(f"gpu-report: {options.library} is not built (nvcc needed); its table is left out", file=sys.stderr)
    triton = None
    if options.triton:
        triton = json.loads(options.triton.read_text())
    elif not options.no_triton:
        import gpu_report_triton

        triton = gpu_report_triton.rows()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = options.out.with_suffix(".tmp")
    temporary.write_text(page(cuda, triton))
    os.replace(temporary, options.out)
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
