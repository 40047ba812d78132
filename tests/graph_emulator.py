"""What a CUDA graph does, on a CPU: ops are recorded with their tensors and done again over the same memory, without Python.

Recording has no effect. Graphs share memory, so what one has made is worthless once another is played back: `spoil` makes it so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class _Tape(TorchDispatchMode):
    def __init__(self, strict: bool) -> None:
        super().__init__()
        self.strict = strict
        self.calls: list[tuple] = []
        self.made: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            if self.strict:
                raise RuntimeError("operation not permitted when stream is capturing")
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        given = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        self.made += [t.detach() for t in _tensors(out) if t.untyped_storage().data_ptr() not in given]
        self.calls.append((func, args, kwargs, out))
        return out


class Recorder:
    """Stands in for :func:`mmkd.training.recorded.cuda_graph`.

    Args:
        kept: gives the tensors that live outside of graphs: weights, and what the optimizer has made so far.
        strict: reading a number breaks the recording off, as it does on a GPU; some ops of a CPU read one.
    """

    def __init__(self, kept: Callable[[], Iterable[Tensor]], strict: bool = False) -> None:
        self.kept, self.strict, self.tapes = kept, strict, []

    def __call__(self, run: Callable[[], Any]) -> Callable[[], Any]:
        before = [(t.detach(), t.detach().clone()) for t in self.kept()]
        with _Tape(self.strict) as tape:
            result = run()
        for t, value in before:
            t.copy_(value)
        self.tapes.append(tape)
        _spoil(tape)

        def replay() -> Any:
            with torch.no_grad():
                for func, args, kwargs, out in tape.calls:
                    for old, new in zip(_tensors(out), _tensors(func(*args, **kwargs)), strict=True):
                        if old.numel() and old.data_ptr() != new.data_ptr():
                            old.detach().copy_(new.view(old.shape))
            return result

        return replay

    def spoil(self) -> None:
        """Overwrites what graphs have made."""
        for tape in self.tapes:
            _spoil(tape)


def _spoil(tape: _Tape) -> None:
    for t in tape.made:
        if t.numel():
            t.fill_(float("nan") if t.is_floating_point() else 1)
