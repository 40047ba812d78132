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


def differentiable_loss(ns: str, name: str, places: tuple[int, ...]) -> None:
    """Registers the gradient of an op that makes it on the way forward.

    The op returns a scalar loss, something for the user that has no gradient, and the gradients of the inputs at `places`;
    its last inputs say which of those are needed, in their order.
    """

    def setup(ctx, inputs, output) -> None:
        grads = output[2:]
        ctx.traced = any(type(t) is not torch.Tensor for t in grads)
        ctx.needed, ctx.count = inputs[-len(places) :], len(inputs)
        ctx.set_materialize_grads(False)
        if ctx.traced:
            ctx.save_for_backward(*grads)
            return
        ctx.grads = [t.detach() for t in grads]  # outside of the graph: nobody else holds them
        ctx.arguments = [None if isinstance(a, torch.Tensor) else a for a in inputs]
        ctx.places = [i for i, a in enumerate(inputs) if isinstance(a, torch.Tensor)]
        ctx.save_for_backward(*(inputs[i] for i in ctx.places))

    def made(ctx, ops, grad: torch.Tensor) -> list[torch.Tensor]:
        """The gradients times the incoming one, nobody else's."""
        if ctx.traced:
            return [g * grad for g in ctx.saved_tensors]
        grads, ctx.grads = ctx.grads, None
        if grads is None:  # a second pass through a kept graph
            arguments = list(ctx.arguments)
            for place, t in zip(ctx.places, ctx.saved_tensors, strict=True):
                arguments[place] = t
            grads = getattr(ops, name)(*arguments)[2:]
        if grad.device.type == "cpu" and grad.item() == 1:
            return list(grads)
        if scaled := [g for g in grads if g.numel()]:
            torch._foreach_mul_(scaled, grad)  # on a GPU nothing waits for what `grad` is
        return list(grads)

    def make_backward(ops) -> Callable:
        def backward(ctx, grad, *_others):
            if torch.is_grad_enabled():
                raise RuntimeError(f"mmkd::{name}: second derivatives are not supported; use impl='reference' for them")
            out: list[torch.Tensor | None] = [None] * ctx.count
            if grad is not None:
                for place, g, need in zip(places, made(ctx, ops, grad), ctx.needed, strict=True):
                    out[place] = g if need else None
            return tuple(out)

        return backward

    differentiable(ns, name, make_backward, setup, losses=1)


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
    if ops is not torch.ops.mmkd or name not in _eager or torch.compiler.is_compiling():
        return getattr(ops, name)(*args)
    if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
        return _eager[name].apply(*args)
    with torch._C._AutoDispatchBelowAutograd():  # torch.library's own way there takes some 30 us
        return getattr(ops, name).default(*args)
