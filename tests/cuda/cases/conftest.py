"""Runs under the sanitizers, started by tests/cuda/test_kernels.py."""

from __future__ import annotations

import pytest
import simt
import torch

SCHEDULES = (1, 2, 3)


@pytest.fixture(autouse=True)
def _doors():
    with simt.doors():
        yield


@pytest.fixture(params=[False, True], ids=["atomic", "deterministic"])
def deterministic(request):
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def schedules():
    """Calls a function under several schedules of the threads and returns the results. `launches=False`: an empty
    result, for which no kernel may be launched."""

    def run(fn, seeds=SCHEDULES, launches=True):
        results = []
        before = simt.ops.launches()
        for seed in seeds:
            simt.ops.set_schedule(seed)
            results.append(fn())
        assert (simt.ops.launches() > before) == launches, f"kernels ran on the executor: expected {launches}"
        return results

    return run
