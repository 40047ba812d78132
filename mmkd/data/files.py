"""What a file really is, told from its first bytes, so that nothing is opened as what it is not."""

from __future__ import annotations

import io
import math
import reprlib
import zipfile
from pathlib import Path

import numpy as np

from .errors import DataError

__all__ = ["MOST_EXPANSION", "SMALL", "expect_kind", "open_npy", "open_npz", "refuse_pickle", "sniff"]

_MAGIC = (
    (b"\x93NUMPY", "npy"),
    (b"PK\x03\x04", "zip"),
    (b"PK\x05\x06", "zip"),
    (b"PAR1", "parquet"),
    (b"\x1f\x8b", "gzip"),
    (b"\x89HDF", "hdf5"),
)
SMALL = 64 << 20  # bytes that are unpacked without asking how much they were packed
MOST_EXPANSION = 200  # deflate reaches 1,000 on constant arrays; a matrix with its indices stays below 20
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
    except Exception:  # broken in one of zipfile's many ways: whoever opens it says how
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
        # mapped even where a copy is wanted: a header that declares more than there is gets no memory
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # whatever numpy says of a broken header
        if "Object arrays" in str(error) or "Python objects" in str(error):
            raise DataError(
                f"{path}: an array of Python objects, which is a pickle inside; mmkd never unpickles. "
                "Expected a numeric (or fixed-width string) array: save it again with array.astype('float32')"
            ) from None
        raise DataError(f"{path}: cannot be read as a .npy array ({_said(error)}); is the file cut short?") from error
    _check_type(path, array)
    return array if mmap else np.array(array)


def open_npz(path: Path) -> dict[str, np.ndarray]:
    """Read every array of an ``.npz``, never unpickling, and never more than the file can honestly hold.

    Raises:
        DataError: not a zip archive, broken, an object array inside, or one that unpacks to 200 times its size.
    """
    expect_kind(path, "zip")
    try:
        with zipfile.ZipFile(path) as archive:
            _check_expansion(path, archive)
            return {info.filename.removesuffix(".npy"): _member(path, archive, info) for info in archive.infolist()}
    except DataError:
        raise
    except Exception as error:  # whatever zipfile and numpy say of a broken archive
        raise DataError(f"{path}: cannot be read as .npz ({_said(error)}); is the file cut short?") from error


def _check_expansion(path: Path, archive: zipfile.ZipFile) -> None:
    size, members = path.stat().st_size, archive.infolist()
    unpacked = sum(info.file_size for info in members)
    if unpacked > max(SMALL, MOST_EXPANSION * size) or sum(info.compress_size for info in members) > size:
        raise DataError(
            f"{path}: {size:,} bytes that claim to unpack to {unpacked:,}; expected at most {MOST_EXPANSION} times the "
            "size. If the arrays are really that uniform, save them uncompressed (numpy.savez)"
        )


def _member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """One array; its header must declare exactly the bytes that follow it."""
    raw = np.empty(info.file_size, np.uint8)
    filled = 0
    with archive.open(info) as file:
        while chunk := file.read(1 << 20):
            raw[filled : filled + len(chunk)] = np.frombuffer(chunk, np.uint8)
            filled += len(chunk)
    head = io.BytesIO(raw[: min(filled, 1 << 16)].tobytes())
    version = np.lib.format.read_magic(head)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"member {info.filename!r} has .npy version {version}; expected 1.0 or 2.0")
    shape, fortran, dtype = readers[version](head)
    if dtype.hasobject:
        raise DataError(
            f"{path}: member {info.filename!r} is an array of Python objects, which is a pickle inside; "
            "mmkd never unpickles. Expected numeric arrays, as scipy.sparse.save_npz writes them"
        )
    declared = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or not dtype.itemsize or head.tell() + declared != filled or filled != info.file_size:
        raise ValueError(f"member {info.filename!r} declares {shape} of {dtype} and holds {filled - head.tell()} bytes")
    array = raw[head.tell() :].view(dtype).reshape(shape, order="F" if fortran else "C")
    _check_type(path, array)
    return array


def _check_type(path: Path, array: np.ndarray) -> None:
    """Refuse arrays of records, and text of which an entry is none: NumPy itself does not look, and fails later."""
    if array.dtype.kind == "V":
        raise DataError(f"{path}: expected numbers or text, found records of {reprlib.repr(str(array.dtype))}")
    if array.dtype.kind == "U" and array.size:
        flat = np.ascontiguousarray(array).reshape(-1)
        codes = flat.view(np.dtype(np.uint32).newbyteorder(array.dtype.byteorder)).reshape(len(flat), -1)
        bad = (codes > 0x10FFFF) | ((codes >= 0xD800) & (codes < 0xE000))
        if bad.any():
            raise DataError(f"{path}: entry {int(bad.any(1).argmax())} is not valid Unicode text; is the file damaged?")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {reprlib.repr(str(error))}" if str(error) else type(error).__name__
