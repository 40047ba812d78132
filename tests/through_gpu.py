"""Ops that take CPU tensors to a GPU, run the kernels there and bring the results back.

The cases written for the executor (tests/cuda/cases) and the interpreter (tests/triton/cases) run on a GPU through these,
as they are: `test_on_gpu.py` starts them.
"""

from __future__ import annotations

import os

import torch
from torch.utils._pytree import tree_map_only

# "cpu" only shows that the plumbing works
DEVICE = os.environ.get("MMKD_THROUGH_DEVICE", "cuda")
_libraries = []


def define(namespace: str, kernels) -> object:
    """`torch.ops.<namespace>` with the schemas of `mmkd::`, every op run by `kernels` (`torch.ops.mmkd` or
    `torch.ops.mmkd_triton`) on `DEVICE`. Fakes and gradients are for the caller to register."""
    library = torch.library.Library(namespace, "DEF")
    _libraries.append(library)
    for schema in torch._C._jit_get_all_schemas():
        name = schema.name.removeprefix("mmkd::")
        if name == schema.name or "cpu_isa" in name or not hasattr(kernels, name):
            continue
        library.define(str(schema).removeprefix("mmkd::"))
        library.impl(name, _through(getattr(kernels, name)), "CPU")
    return getattr(torch.ops, namespace)


def _through(op):
    def run(*args, **kwargs):
        there, options = tree_map_only(torch.Tensor, lambda t: t.to(DEVICE), (args, kwargs))
        return tree_map_only(torch.Tensor, lambda t: t.cpu(), op(*there, **options))

    return run
