"""Loads the executor's library as `torch.ops.mmkd_simt`: the CUDA entries and kernels, run on CPU tensors."""

from __future__ import annotations

import os
from contextlib import contextmanager

import torch

from mmkd import backends
from mmkd.ops import _registry

_library = torch.library.Library("mmkd_simt", "DEF")
for schema in torch._C._jit_get_all_schemas():
    if schema.name.startswith("mmkd::") and "cpu_isa" not in schema.name:
        _library.define(str(schema).removeprefix("mmkd::"))
torch.ops.load_library(os.environ["MMKD_SIMT_LIBRARY"])
ops = torch.ops.mmkd_simt


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
