"""Fake kernels and autograd are written once per op and registered for every namespace that implements the schema.

`mmkd::` holds the C++ and CUDA kernels (dispatched by device), `mmkd_triton::` the Triton ones.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

_registrations: list[Callable] = []


def on_register(register: Callable) -> Callable:
    """Decorator: `register(ns, ops)` is called now for the compiled library and once more when Triton is loaded."""
    register("mmkd", torch.ops.mmkd)
    _registrations.append(register)
    return register


def refuse_second_derivative(qualname: str) -> None:
    """Makes differentiating a backward op an error; left alone, torch would silently cut the graph there."""

    def refuse(ctx, *grads):
        raise RuntimeError(f"{qualname}: second derivatives are not supported; use impl='reference' for them")

    torch.library.register_autograd(qualname, refuse, setup_context=lambda ctx, inputs, output: None)


_triton_loaded = False


@torch.compiler.assume_constant_result
def _load_triton() -> bool:
    """Imports the Triton ops once; torch.compile does it while tracing instead of tracing the import."""
    global _triton_loaded
    if not _triton_loaded:
        importlib.import_module("mmkd.kernels.register")
        for register in _registrations:
            register("mmkd_triton", torch.ops.mmkd_triton)
        _triton_loaded = True
    return True


def namespace(which: str):
    """`torch.ops` namespace that implements `which`: "cpp", "cuda" or "triton"."""
    if which != "triton":
        return torch.ops.mmkd
    _load_triton()
    return torch.ops.mmkd_triton
