"""memory.release: freed memory goes back, and nothing that is in use with it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from mmkd import memory

SCRIPT = """
import torch
from mmkd import memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

import os
torch.set_num_threads(2)
a, b = torch.randn(4096, 2048), torch.randn(2048, 64)
memory.release()
before = resident()
product = a @ b
held = resident() - before
memory.release()
print(held, resident() - before, torch.equal(a @ b, product))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="Linux only")
def test_the_work_space_of_products_goes_back():
    if "mkl_serv_free_buffers" not in [call.__name__ for call, _ in memory._others()]:
        pytest.skip("this torch has no MKL")
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    held, left, same = done.stdout.split()
    assert same == "True"
    if float(held) < 3:  # MB
        pytest.skip("products need next to no work space here")
    assert float(left) < float(held) - 2, done.stdout


def test_it_may_be_called_at_any_time():
    x = torch.randn(64, 64)
    product = x @ x
    for collect in (True, False):
        memory.release(collect)
        assert torch.equal(x @ x, product)
