"""`pytest bench/` runs every bench, prints one table and writes bench/results/latest.json."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import harness


@pytest.fixture(autouse=True, scope="session")
def _threads():
    torch.set_num_threads(min(2, torch.get_num_threads()))  # the targets are for two threads


@pytest.fixture
def compare(benchmark):
    """harness.compare, with ours also handed to pytest-benchmark so that its own statistics and JSON work."""

    def run(op, case, ours, rivals, **options):
        row = harness.compare(op, case, ours, rivals, **options)
        if not benchmark.extra_info:  # pytest-benchmark times one function a test: the first
            benchmark.extra_info.update(vars(row))
            benchmark.pedantic(ours, rounds=3, warmup_rounds=0)
        return row

    return run


def pytest_terminal_summary(terminalreporter):
    text = harness.table()
    if text:
        terminalreporter.section("mmkd bench (medians, interleaved)")
        terminalreporter.write_line(text)
        terminalreporter.write_line(f"written to {harness.save()}")
