"""Checkpoints: one safetensors file with the tensors, and the counters as JSON in its header. Nothing is ever pickled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mmkd.files import write_tensors


class CheckpointError(ValueError):
    """A checkpoint that is damaged or belongs to another run; the message names the file and what is wrong."""


def save_checkpoint(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Writes tensors and JSON state as one file, atomically: a crash leaves the previous checkpoint whole.

    Raises:
        WriteError: the disk is full or may not be written to; the previous checkpoint is kept.
    """
    write_tensors(path, tensors, {"state": json.dumps(state, allow_nan=False)})


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and state of :func:`save_checkpoint`.

    Raises:
        CheckpointError: the file is missing, truncated, no safetensors file, or carries no state.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            state = json.loads((file.metadata() or {})["state"])
            if not isinstance(state, dict):
                raise ValueError(f"expected a mapping as its state, got {type(state).__name__}")
            return {name: file.get_tensor(name) for name in file.keys()}, state  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} does not exist") from None
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"checkpoint {path} is damaged or not one of mmkd's: {error}; remove it to start over"
        ) from error


def training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, best: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything a run needs to go on bit for bit: weights, optimizer moments and step, and the best weights so far."""
    tensors = {f"model.{name}": p for name, p in model.named_parameters()}
    tensors |= {f"best.{name}": t for name, t in best.items()}
    names = {p: name for name, p in model.named_parameters()}
    for parameter, slots in optimizer.state.items():
        tensors |= {f"optimizer.{names[parameter]}.{slot}": torch.as_tensor(t) for slot, t in slots.items()}
    return tensors


def restore_training(
    tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer, path: Path
) -> dict[str, Tensor]:
    """Puts :func:`training_tensors` back in place; returns the best weights so far, empty where there were none yet.

    Raises:
        CheckpointError: names, shapes or dtypes differ from the model's; the model is then as it was.
    """
    parameters = dict(model.named_parameters())
    best = {key.removeprefix("best."): t for key, t in tensors.items() if key.startswith("best.")}
    saved = {name: _fitting(tensors, f"model.{name}", p, path) for name, p in parameters.items()}
    if best:
        best = {name: _fitting(tensors, f"best.{name}", p, path).to(p.device) for name, p in parameters.items()}
    slots = {name: _slots(tensors, name, p, path) for name, p in parameters.items()}
    for name, parameter in parameters.items():
        with torch.no_grad():
            parameter.copy_(saved[name])
        if slots[name]:
            optimizer.state[parameter] = slots[name]
    return best


def _fitting(tensors: dict[str, Tensor], key: str, like: Tensor, path: Path) -> Tensor:
    saved = tensors.get(key)
    if saved is None or saved.shape != like.shape or saved.dtype != like.dtype:
        got = "nothing" if saved is None else f"{saved.dtype} {tuple(saved.shape)}"
        raise CheckpointError(
            f"checkpoint {path}: expected {key} of {like.dtype} {tuple(like.shape)}, got {got}; it is of another run: "
            "remove it to start this stage over"
        )
    return saved


def _slots(tensors: dict[str, Tensor], name: str, parameter: Tensor, path: Path) -> dict[str, Tensor]:
    """One parameter's optimizer state: `step`, a float scalar, and moments shaped like the parameter; all on its device, as
    torch's fused AdamW has them."""
    prefix = f"optimizer.{name}."
    keys = [key for key in tensors if key.startswith(prefix)]
    scalar = torch.empty(())
    return {
        key.removeprefix(prefix): _fitting(tensors, key, scalar if key == prefix + "step" else parameter, path)
        .to(parameter.device)
        .clone()
        for key in keys
    }
