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


class _Kernels:
    """The ops of `mmkd::` for backward passes: straight to the kernels, unless the pass is itself to be differentiated."""

    def __init__(self, ns: str) -> None:
        self._ops = getattr(torch.ops, ns)

    def __getattr__(self, name: str) -> Callable:
        packet = getattr(self._ops, name)
        op = packet.default

        def call(*args):
            if torch.is_grad_enabled():
                return packet(*args)
            with torch._C._AutoDispatchBelowAutograd():
                return op(*args)

        setattr(self, name, call)
        return call


_eager: dict[str, type[torch.autograd.Function]] = {}


def differentiable(ns: str, name: str, make_backward: Callable, setup: Callable, losses: int | None = None) -> None:
    """Registers the gradient of `ns::name`: `make_backward(ops)` gives `backward(ctx, *grads)`, `setup(ctx, inputs, output)`
    saves what it needs. If only the first `losses` outputs, scalars, are for the user, eager calls make no gradient of
    zeros for the others.

    torch.compile goes through torch.library. Eager calls of the compiled library go through an autograd.Function of the
    same two functions: torch.library's own costs about 60 us a step more on small batches.
    """
    torch.library.register_autograd(f"{ns}::{name}", make_backward(getattr(torch.ops, ns)), setup_context=setup)
    if ns == "mmkd":
        _eager[name] = _function(ns, name, make_backward, setup, losses)


def _function(
    ns: str, name: str, make_backward: Callable, setup: Callable, losses: int | None
) -> type[torch.autograd.Function]:
    op, eager_backward = getattr(getattr(torch.ops, ns), name).default, make_backward(_Kernels(ns))

    def forward(ctx, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            output = op(*inputs)
        setup(ctx, inputs, output)
        if losses is not None:
            ctx.set_materialize_grads(False)
            ctx.loss_like = output[0].dtype, output[0].device
        return output

    def backward(ctx, *grads):
        if losses is not None and any(g is None for g in grads[:losses]):
            dtype, device = ctx.loss_like
            given = (torch.zeros((), dtype=dtype, device=device) if g is None else g for g in grads[:losses])
            grads = (*given, *grads[losses:])
        return eager_backward(ctx, *grads)

    body = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"mmkd_{name}", (torch.autograd.Function,), body)


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


def call(which: str, name: str, *args):
    """Runs schema op `name` of the implementation `which`, differentiably."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(f"{name}: transforms of torch.func are not supported; use impl='reference' for them")
    ops = namespace(which)
    eager = ops is torch.ops.mmkd and name in _eager and not torch.compiler.is_compiling() and torch.is_grad_enabled()
    if eager and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
        return _eager[name].apply(*args)
    return getattr(ops, name)(*args)
