"""Files and folders that are either whole or not there: written under a temporary name beside the place, flushed to the
disk, then renamed. What a killed process leaves behind is a hidden temporary that nothing ever reads."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

_TEMPORARY = re.compile(
    r"\.[^/]*\.[0-9a-f]{8}\.part(\.[^./]+)?|\.tmp[A-Za-z0-9]{6}"
)  # ours, and those safetensors makes beside its file
_EXCHANGE = 2  # RENAME_EXCHANGE of linux/fs.h


class WriteError(OSError):
    """A file cannot be written (disk full, read-only, no permission); the message names it, the reason and the fix."""

    def __str__(self) -> str:
        return str(self.strerror)


def write_atomic(path: Path, write: Callable[[Path], object]) -> Path:
    """Calls `write(temporary)` and renames the result to `path`; on any error the temporary file is removed.

    The temporary name keeps the suffix, because some writers add their own when it is missing. File and folder are
    synced, so that after a power cut `path` is the old file or the new one.

    Raises:
        WriteError: the system refused; what was at `path` before is untouched.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        with explained(path):
            write(temporary)
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def write_folder(path: Path, write: Callable[[Path], object]) -> Path:
    """Calls `write(temporary folder)` and puts the folder at `path`, in one step even where there was one before.

    Raises:
        WriteError: the system refused; what was at `path` before is untouched.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        with explained(path):
            temporary.mkdir()
            write(temporary)
            for inside in [*temporary.rglob("*"), temporary]:
                sync(inside)
            _put(temporary, path)
            sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # after an exchange: the old folder
    return path


def write_text(path: Path, text: str) -> Path:
    """`text` as UTF-8, atomically."""
    return write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> Path:
    """`value` as indented JSON, atomically."""
    return write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None) -> Path:
    """Tensors (on any device) as one safetensors file, atomically."""
    from safetensors.torch import save_file

    ready = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    return write_atomic(path, lambda temporary: save_file(ready, temporary, metadata=metadata))


def make_folder(path: Path) -> Path:
    """`path` and its parents as folders.

    Raises:
        WriteError: it cannot be made, or nothing can be written in it.
    """
    path = Path(path)
    with explained(path):
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    return path


def append_line(path: Path, line: str) -> None:
    """Appends one line to a text file. A last line that a crash cut short is closed first, so it cannot swallow this one.

    Raises:
        WriteError: the system refused.
    """
    with explained(path), open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write(line.encode() + b"\n")


def sync(path: Path) -> None:
    """Waits until a file, or a folder's entries, are on the disk. File systems that cannot sync folders are let be."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


def sweep(folder: Path) -> list[Path]:
    """Removes the temporaries that killed processes left in a folder, and returns them. Nobody else may be writing there."""
    left = [path for path in folder.glob(".*") if _TEMPORARY.fullmatch(path.name)]
    for path in left:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    return left


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns what the system says into a WriteError with path, reason and fix; other errors pass."""
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        number = _errno(error)
        if number is None:
            raise
        raise WriteError(number, _advice(path, number)) from error


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.part{path.suffix}")


def _put(temporary: Path, path: Path) -> None:
    """Renames a folder to `path`; where one is there, the two change places in one system call if the kernel can."""
    if not path.exists():
        os.replace(temporary, path)
        return
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here = ctypes.c_int(-100)  # AT_FDCWD
    if renameat2 is not None and not renameat2(here, os.fsencode(temporary), here, os.fsencode(path), _EXCHANGE):
        return
    old = _temporary(path)  # no such call here: for a moment there is no folder at `path`
    os.replace(path, old)
    try:
        os.replace(temporary, path)
    except OSError:
        os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _errno(error: Exception) -> int | None:
    """The system's error number behind an exception, also of writers that only put it into their text."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


def _advice(path: Path, number: int) -> str:
    reason = os.strerror(number)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{path} cannot be written: {reason}; what was there before is untouched. Free space, then go on with --resume"
    return f"{path} cannot be written: {reason}; name a place that this user may write to (--out)"
