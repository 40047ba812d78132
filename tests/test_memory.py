"""memory.release: freed memory goes back, and nothing that is in use with it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from mmkd import memory

SCRIPT = """
import ctypes
from pathlib import Path

import torch
from mmkd import memory

# bytes of work space by MKL's own count: how much of it a product takes differs from processor to processor
count = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).mkl_serv_mem_stat
count.restype = ctypes.c_int64
torch.set_num_threads(2)
a, b = torch.randn(4096, 2048), torch.randn(2048, 64)
product = a @ b
held = count(ctypes.byref(ctypes.c_int()))
memory.release()
print(held, count(ctypes.byref(ctypes.c_int())), torch.equal(a @ b, product))
"""


def test_the_work_space_of_products_goes_back():
    if "mkl_serv_free_buffers" not in [call.__name__ for call, _ in memory._others()]:
        pytest.skip("this torch has no MKL")
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    held, left, same = done.stdout.split()
    assert same == "True"
    if held == "0":
        pytest.skip("products need no work space here")
    assert left == "0", done.stdout


def test_it_may_be_called_at_any_time():
    x = torch.randn(64, 64)
    product = x @ x
    for collect in (True, False):
        memory.release(collect)
        assert torch.equal(x @ x, product)
