"""What the examples share: a random graph, and two ways of doing one thing timed in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from mmkd import BipartiteGraph
from mmkd.data import synthetic

NETFLIX = (43_739, 17_239, 609_341)  # users, items, interactions


def random_graph(users: int, items: int, interactions: int) -> BipartiteGraph:
    """Log-normal user degrees, Zipf-like item popularity, fixed seed."""
    made = synthetic(users, items, interactions, modalities={}, val_fraction=0, test_fraction=0)
    return BipartiteGraph.from_scipy(made.train)


def edge_index(graph: BipartiteGraph) -> torch.Tensor:
    """Both directions of every interaction, int64 `[2, 2 * num_edges]`, users first, then items."""
    users = torch.repeat_interleave(torch.arange(graph.num_users), graph.user_rowptr.diff())
    items = graph.user_col.long() + graph.num_users
    return torch.stack([torch.cat([users, items]), torch.cat([items, users])])


def in_turn(theirs: Callable[[], object], ours: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Median seconds of each, run alternately so that a busy machine hits both; each is run once before."""
    seconds: dict[Callable, list[float]] = {theirs: [], ours: []}
    theirs(), ours()
    for _ in range(rounds):
        for run in (theirs, ours):
            start = time.perf_counter()
            run()
            seconds[run].append(time.perf_counter() - start)
    return statistics.median(seconds[theirs]), statistics.median(seconds[ours])


def report(what: str, unit: str, theirs: float, ours: float, difference: float, label: str = "with mmkd") -> None:
    """One line: both times, their ratio, and how far the results differ."""
    print(
        f"{what}: {unit} {theirs * 1e3:.1f} ms, {label} {ours * 1e3:.1f} ms ({theirs / ours:.1f}x), "
        f"largest difference {difference:.1e} ({torch.get_num_threads()} threads)"
    )
