"""Loads the executor's library as `torch.ops.mmkd_simt`: the CUDA entries and kernels, run on CPU tensors.

MMKD_SIMT_LIBRARY=gpu: the real library instead, the tensors taken to a GPU and back.
"""

from __future__ import annotations

import os
from contextlib import contextmanager

import torch

from mmkd import backends
from mmkd.ops import _registry
from tests import through_gpu

ON_GPU = os.environ["MMKD_SIMT_LIBRARY"] == "gpu"


def _executor():
    global _library
    _library = torch.library.Library("mmkd_simt", "DEF")
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("mmkd::") and "cpu_isa" not in schema.name:
            _library.define(str(schema).removeprefix("mmkd::"))
    torch.ops.load_library(os.environ["MMKD_SIMT_LIBRARY"])
    return torch.ops.mmkd_simt


ops = through_gpu.define("mmkd_simt", torch.ops.mmkd) if ON_GPU else _executor()


@contextmanager
def doors():
    """The doors of `mmkd.ops` take CPU tensors to the CUDA entries."""
    before, namespace = backends.resolve, _registry.namespace
    _registry.namespace = lambda which: ops
    backends.resolve = lambda op, x, impl="auto": before(op, x, impl) if impl in ("reference", "cpp") else "cuda"
    try:
        yield
    finally:
        backends.resolve = before
        _registry.namespace = namespace


for register in _registry._registrations:
    register("mmkd_simt", ops)
