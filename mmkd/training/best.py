"""The best weights so far, on disk: training looks at them once, at its end."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from mmkd.files import explained


class BestWeights:
    """A copy of some named tensors in a file without a name in `folder`, which goes with the process; messages call it `name`.

    A new copy is written before or behind the one there is and counts from the moment it is complete, so a full disk costs none.
    """

    def __init__(self, folder: Path, name: str = "best weights") -> None:
        self._folder, self._name = folder, name
        self._file = None
        self._index: list[tuple[str, torch.dtype, torch.Size, int]] = []  # name, dtype, shape, where in the file
        self._taken = range(0)  # bytes of the file

    def __bool__(self) -> bool:
        return bool(self._index)

    def keep(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copies `tensors`; those before are forgotten.

        Raises:
            WriteError: the disk is full or may not be written to; the copy before is still here.
        """
        named = [(name, t.detach()) for name, t in tensors]
        size = sum(t.nbytes for _, t in named)
        with explained(self._folder / self._name):
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115, closed with this object
            start = 0 if self._taken.start >= size else self._taken.stop  # where the copy before is not
            index, at = [], start
            for name, t in named:
                index.append((name, t.dtype, t.shape, at))
                at += self._write(t, at)
        self._index, self._taken = index, range(start, at)

    def tensors(self) -> dict[str, Tensor]:
        """The copy, on the CPU, in fresh memory; empty if there is none."""
        out = {}
        for name, dtype, shape, at in self._index:
            t = torch.empty(shape, dtype=dtype)
            if t.nbytes:
                self._file.seek(at)
                self._read(_bytes(t))
            out[name] = t
        return out

    def close(self) -> None:
        """Lets go of the copy and its file."""
        if self._file is not None:
            self._file.close()
        self._file, self._index, self._taken = None, [], range(0)

    def _write(self, t: Tensor, at: int) -> int:
        left = _bytes(t.cpu().contiguous())
        self._file.seek(at)
        while len(left):
            left = left[self._file.write(left) :]
        return t.nbytes

    def _read(self, into: memoryview) -> None:
        while len(into):
            count = self._file.readinto(into)
            if not count:
                raise OSError("the file with the best weights is shorter than it was written")
            into = into[count:]


def _bytes(t: Tensor) -> memoryview:
    return memoryview(t.reshape(-1).view(torch.uint8).numpy())
