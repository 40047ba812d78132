"""What a file really is, told from its first bytes, so that nothing is opened as what it is not."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from .errors import DataError

__all__ = ["expect_kind", "open_npy", "open_npz", "refuse_pickle", "sniff"]

_MAGIC = (
    (b"\x93NUMPY", "npy"),
    (b"PK\x03\x04", "zip"),
    (b"PK\x05\x06", "zip"),
    (b"PAR1", "parquet"),
    (b"\x1f\x8b", "gzip"),
    (b"\x89HDF", "hdf5"),
)
_PICKLE_SUFFIXES = {".pkl", ".pickle", ".pt", ".pth", ".p"}
_NAMES = {
    "npy": "a NumPy .npy array",
    "zip": "a zip archive (.npz)",
    "parquet": "a Parquet file",
    "gzip": "gzip-compressed data",
    "hdf5": "an HDF5 file",
    "pickle": "a Python pickle",
    "text": "text",
    "binary": "binary data of unknown kind",
    "empty": "an empty file",
}


def sniff(path: Path) -> str:
    """Kind of a file by content: npy, zip, parquet, gzip, hdf5, pickle, text, binary or empty."""
    with open(path, "rb") as file:
        head = file.read(4096)
    if not head:
        return "empty"
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return "pickle" if kind == "zip" and _holds_pickle(path) else kind
    if head[0] == 0x80 and len(head) > 1 and head[1] <= 5:
        return "pickle"
    if b"\x00" in head:
        return "binary"
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        # a multi-byte character may be cut at the end of what was read
        return "text" if len(head) == 4096 and error.start > 4092 else "binary"
    return "text"


def _holds_pickle(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def refuse_pickle(path: Path) -> None:
    """Raise if the file is, or is named like, a pickle. It is never opened as one.

    Raises:
        DataError: names the file and how to convert it.
    """
    if path.suffix.lower() in _PICKLE_SUFFIXES or sniff(path) == "pickle":
        raise DataError(
            f"{path}: this is a pickle, which can run any code when it is read, so mmkd never unpickles; "
            "expected "
            ".npz, .npy, .json, .csv or .parquet. Convert it where you trust it: "
            "scipy.sparse.save_npz('train.npz', "
            "matrix) or numpy.save('image_feat.npy', array)"
        )


def expect_kind(path: Path, kind: str) -> None:
    """Raise unless the file exists and its content is of `kind` (see `sniff`).

    Raises:
        DataError: missing, empty, a pickle, or not what its name says.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    refuse_pickle(path)
    found = sniff(path)
    if found != kind:
        raise DataError(
            f"{path}: not what its name says: expected {_NAMES[kind]} from the ending {path.suffix!r}, "
            f"found {_NAMES[found]}"
        )


def open_npy(path: Path, *, mmap: bool = True) -> np.ndarray:
    """Open a ``.npy`` array, memory-mapped by default, never unpickling.

    Raises:
        DataError: not an npy file, cut short, or an object array (which is a pickle).
    """
    expect_kind(path, "npy")
    try:
        array = np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        if "Object arrays" in str(error) or "Python objects" in str(error):
            raise DataError(
                f"{path}: an array of Python objects, which is a pickle inside; mmkd never unpickles. "
                "Expected a numeric (or fixed-width string) array: save it again with array.astype('float32')"
            ) from None
        raise DataError(f"{path}: cannot be read as a .npy array ({error}); is the file cut short?") from None
    return array


def open_npz(path: Path) -> dict[str, np.ndarray]:
    """Read every array of an ``.npz``, never unpickling.

    Raises:
        DataError: not a zip archive, broken, or an object array inside.
    """
    expect_kind(path, "zip")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {}
            for key in archive.files:
                arrays[key] = archive[key]
                if not isinstance(arrays[key], np.ndarray):
                    raise DataError(f"{path}: member {key!r} is not an array")
            return arrays
    except DataError:
        raise
    except ValueError as error:
        if "Object arrays" in str(error):
            raise DataError(
                f"{path}: member {key!r} is an array of Python objects, which is a pickle inside; "
                "mmkd never unpickles. Expected numeric arrays, as scipy.sparse.save_npz writes them"
            ) from None
        raise DataError(f"{path}: cannot be read as .npz ({error})") from None
    except (zipfile.BadZipFile, OSError, EOFError, KeyError) as error:
        raise DataError(f"{path}: cannot be read as .npz ({error}); is the file cut short?") from None
