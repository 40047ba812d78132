"""Checkpoints: one safetensors file with the tensors, and the counters as JSON in its header. Nothing is ever pickled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmkd.files import write_atomic


class CheckpointError(ValueError):
    """A checkpoint that is damaged or belongs to another run; the message names the file and what is wrong."""


def save_checkpoint(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Writes tensors and JSON state as one file, atomically: a crash leaves the previous checkpoint whole."""
    ready = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    header = {"state": json.dumps(state, allow_nan=False)}
    write_atomic(path, lambda temporary: save_file(ready, temporary, metadata=header))


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and state of :func:`save_checkpoint`.

    Raises:
        CheckpointError: the file is missing, truncated, no safetensors file, or carries no state.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            state = json.loads((file.metadata() or {})["state"])
            return {name: file.get_tensor(name) for name in file.keys()}, state  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} does not exist") from None
    except (SafetensorError, OSError, KeyError, ValueError) as error:
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
    """Puts :func:`training_tensors` back in place; returns the best weights so far.

    Raises:
        CheckpointError: names or shapes differ from the model's.
    """
    for name, parameter in model.named_parameters():
        saved = tensors.get(f"model.{name}")
        if saved is None or saved.shape != parameter.shape:
            got = "nothing" if saved is None else f"shape {tuple(saved.shape)}"
            raise CheckpointError(f"checkpoint {path}: expected {name} of shape {tuple(parameter.shape)}, got {got}")
        with torch.no_grad():
            parameter.copy_(saved)
        prefix = f"optimizer.{name}."
        slots = {key[len(prefix) :]: t for key, t in tensors.items() if key.startswith(prefix)}
        if slots:
            optimizer.state[parameter] = {
                slot: t.clone() if slot == "step" else t.to(parameter.device).clone() for slot, t in slots.items()
            }
    return {key.removeprefix("best."): t for key, t in tensors.items() if key.startswith("best.")}
