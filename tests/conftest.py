"""Shared fixtures."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# The same examples in every run, so that a red test is red again; HYPOTHESIS_PROFILE=explore draws new ones.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
settings.register_profile("explore", max_examples=1000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


@pytest.fixture(autouse=True)
def _same_draws():
    """And the same random tensors, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the development data sets (tiktok, citeulike-t), which are not this repository's to ship."""
    for folder in (os.environ.get("MMKD_DATA"), Path(__file__).parents[1] / ".." / "shared" / "data"):
        if folder and Path(folder).is_dir():
            return Path(folder).resolve()
    pytest.skip("development data not at hand: set MMKD_DATA or put it at ../shared/data")


@pytest.fixture
def poison_empty():
    """Fresh `torch.empty` memory holds NaN (or the largest integer), so that a kernel that forgets to write is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.fixture(params=["generic", ""], ids=["generic", "best"])
def cpu_isa(request):
    """Runs the test with the portable kernels and with the best this processor has."""
    torch.ops.mmkd.set_cpu_isa(request.param)
    yield request.param
    torch.ops.mmkd.set_cpu_isa("")


@pytest.fixture
def one_thread():
    """One thread; the number before is restored. Torch computes what is left over at the end of a thread's share of a table
    one element at a time, and rounds there otherwise."""
    with _threads(1):
        yield


@pytest.fixture
def two_threads():
    """Two threads, whatever the machine; the number before is restored."""
    with _threads(2):
        yield


@contextlib.contextmanager
def _threads(number: int):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
