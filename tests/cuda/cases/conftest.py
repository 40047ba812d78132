"""Runs under the sanitizers, started by tests/cuda/test_kernels.py."""

from __future__ import annotations

import pytest
import simt
import torch

SCHEDULES = (1, 2, 3)


# a GPU counts no launches, has no op for the flag, and a check that fails there ends the process
ONLY_EXECUTOR = {
    "case_a_graph_is_planned_once",
    "case_out_of_range_stops_the_kernel",
    "case_out_of_range_stops_distill",
    "case_out_of_range_stops_frozen_teacher",
    "case_the_flag_of_torch_is_read",
}


@pytest.fixture(autouse=True)
def _same_draws():
    """The cases are processes of their own, which the tests' seed does not reach. (One draw in a hundred makes a positive-kind
    loss that cancels to nearly 0, of which its error is more than the budget allows.)"""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _doors(request):
    if simt.ON_GPU and request.node.originalname in ONLY_EXECUTOR:
        pytest.skip("only the executor shows this")
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
        if simt.ON_GPU:  # which has schedules of its own
            return [fn() for _ in seeds]
        results = []
        before = simt.ops.launches()
        for seed in seeds:
            simt.ops.set_schedule(seed)
            results.append(fn())
        assert (simt.ops.launches() > before) == launches, f"kernels ran on the executor: expected {launches}"
        return results

    return run
