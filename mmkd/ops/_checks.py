"""Argument checks of the doors: each error names the argument, what was expected and what came."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _name(dtypes: tuple) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)


def check_index(t: Tensor, name: str, dtypes: tuple = (torch.int64,), rank: int = 1) -> None:
    """An index tensor of one of `dtypes` with `rank` dimensions."""
    if not isinstance(t, Tensor) or t.dtype not in dtypes:
        got = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{name}: expected a tensor of {_name(dtypes)}, got {got}")
    check_rank(t, name, rank)


def check_floating(t: Tensor, name: str, dtype: torch.dtype | None = None) -> None:
    """A floating-point tensor, of `dtype` if given."""
    wanted = FLOATS if dtype is None else (dtype,)
    if not isinstance(t, Tensor) or t.dtype not in wanted:
        got = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{name}: expected a tensor of {_name(wanted)}, got {got}")


def check_rank(t: Tensor, name: str, rank: int) -> None:
    """`rank` dimensions."""
    if t.dim() != rank:
        raise ValueError(f"{name}: expected {rank} dimension(s), got shape {tuple(t.shape)}")


def check_shape(t: Tensor, name: str, shape: tuple) -> None:
    """Exactly `shape`."""
    if tuple(t.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(t.shape)}")


def check_same_device(first: tuple[str, Tensor], *others: tuple[str, Tensor | None]) -> None:
    """All tensors on the device of the first."""
    name, t = first
    for other, o in others:
        if o is not None and o.device != t.device:
            raise ValueError(f"{other}: expected on {t.device} like {name}, got {o.device}")


def check_no_grad(t: Tensor | None, name: str) -> None:
    """A constant: no gradient is defined for it."""
    if t is not None and t.requires_grad:
        raise ValueError(f"{name}: is a constant and gets no gradient; pass {name}.detach()")


def check_tables(user_emb: Tensor, item_emb: Tensor) -> None:
    """Two embedding tables `[U, d]`, `[I, d]` of one dtype and device."""
    check_floating(user_emb, "user_emb")
    check_rank(user_emb, "user_emb", 2)
    check_floating(item_emb, "item_emb", user_emb.dtype)
    check_rank(item_emb, "item_emb", 2)
    if item_emb.shape[1] != user_emb.shape[1]:
        raise ValueError(
            f"item_emb: expected {user_emb.shape[1]} columns like user_emb, got shape {tuple(item_emb.shape)}"
        )


def accumulate_type(dtype: torch.dtype) -> torch.dtype:
    """The type sums are kept in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dense(t: Tensor) -> Tensor:
    """The tensor itself if contiguous, else a contiguous copy (kernels take rows one after the other)."""
    return t.contiguous()


def loss_weights(weights, count: str, of: tuple[str, ...]) -> tuple[float, ...]:
    """The weights of the losses `of`, finite and >= 0; `count`: how many they are, as a word."""
    try:
        given = tuple(float(w) for w in weights)
    except (TypeError, ValueError):
        given = ()
    if len(given) != len(of) or not all(0 <= w < float("inf") for w in given):
        named = f"{', '.join(of[:-1])} and {of[-1]}"
        raise ValueError(f"weights: expected {count} numbers >= 0, of {named}, got {weights!r}")
    return given


def vector(t: Tensor | None, name: str, size: int, dtype: torch.dtype) -> Tensor | None:
    """An optional `[size]` vector, converted to `dtype`."""
    if t is None:
        return None
    check_floating(t, name)
    check_shape(t, name, (size,))
    return t.to(dtype).contiguous()
