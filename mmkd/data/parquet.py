"""How much a Parquet file asks for, found out before Arrow is let near it: Arrow makes room for whatever a page claims.

Footer and page headers are structs in Thrift's compact protocol; pyarrow shows no page headers, and shows columns only with
a check that ends the process where it fails.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

from .errors import DataError
from .files import MOST_EXPANSION, SMALL, expect_kind

__all__ = ["check_parquet"]

_VARINTS, _BINARY, _LISTS, _STRUCT = (4, 5, 6), 8, (9, 10), 12  # types of the protocol
_FIXED = {1: 0, 2: 0, 3: 1, 7: 8}  # bytes of a field; a boolean is in its own head
# numbers of the fields, from parquet.thrift
_NUM_ROWS, _ROW_GROUPS = 3, 4  # of FileMetaData
_COLUMNS = 1  # of RowGroup
_META_DATA = 3  # of ColumnChunk
_COMPRESSED_SIZE, _DATA_PAGE, _DICTIONARY_PAGE = 7, 9, 11  # of ColumnMetaData
_UNPACKED, _PACKED = 2, 3  # of PageHeader


def check_parquet(path: Path) -> None:
    """Refuses a Parquet file whose footer or pages claim more than its size can honestly hold.

    Raises:
        DataError: no Parquet file, one cut short, or one that unpacks to 200 times its size or to far too many rows.
        ImportError: pyarrow is not installed.
    """
    expect_kind(path, "parquet")
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise ImportError(f"{path}: reading Parquet needs pyarrow; type: pip install 'mmkd[demo]'") from None
    size = path.stat().st_size
    try:
        rows, unpacked = _claims(path)
    except Exception as error:  # whatever is no footer or no page header
        raise DataError(
            f"{path}: cannot be read as Parquet ({type(error).__name__}: {error}); is the file cut short?"
        ) from error
    most = max(10_000_000, 64 * size)
    if rows > most:
        raise DataError(f"{path}: the footer claims {rows:,} rows; expected at most {most:,} in this size")
    if unpacked > max(SMALL, MOST_EXPANSION * size):
        raise DataError(
            f"{path}: {size:,} bytes that claim to unpack to {unpacked:,}; expected at most {MOST_EXPANSION} times the "
            "size. If the columns are really that uniform, write them without compression"
        )


def _claims(path: Path) -> tuple[int, int]:
    """Rows by the footer, and the bytes that all pages of all columns claim to have when they are unpacked."""
    total = 0
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        length = int.from_bytes(data[-8:-4], "little")
        if data[-4:] != b"PAR1" or length > len(data) - 12:
            raise ValueError("no footer at the end")
        footer, _ = _struct(data, len(data) - 8 - length)
        for group in footer.get(_ROW_GROUPS, []):
            for column in group[_COLUMNS]:
                total += _unpacked(data, column[_META_DATA])
    return int(footer[_NUM_ROWS]), total


def _unpacked(data: mmap.mmap, chunk: dict[int, Any]) -> int:
    """The same of one column chunk."""
    at = min(chunk[_DATA_PAGE], chunk.get(_DICTIONARY_PAGE) or chunk[_DATA_PAGE])
    end, total = at + chunk[_COMPRESSED_SIZE], 0
    if not 0 <= at <= end <= len(data):
        raise ValueError(f"a column is said to be at {at} to {end} of {len(data)} bytes")
    while at < end:
        header, at = _struct(data, at)
        if min(header[_UNPACKED], header[_PACKED]) < 0:
            raise ValueError("a page of negative size")
        total, at = total + header[_UNPACKED], at + header[_PACKED]
    return total


def _struct(data: mmap.mmap, at: int) -> tuple[dict[int, Any], int]:
    """A struct by field number, and where it ends: numbers, structs and lists of structs; the rest is None."""
    fields: dict[int, Any] = {}
    number = 0
    while (head := data[at]) != 0:
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            number, at = _number(data, at)
        fields[number], at = _value(data, at, head & 15)
    return fields, at + 1


def _value(data: mmap.mmap, at: int, kind: int) -> tuple[Any, int]:
    if kind in _FIXED:
        return None, at + _FIXED[kind]
    if kind in _VARINTS:
        return _number(data, at)
    if kind == _BINARY:
        length, at = _varint(data, at)
        return None, at + length
    if kind in _LISTS:
        return _list(data, at)
    if kind == _STRUCT:
        return _struct(data, at)
    raise ValueError(f"a field of type {kind}")


def _list(data: mmap.mmap, at: int) -> tuple[list | None, int]:
    count, inner = data[at] >> 4, data[at] & 15
    at += 1
    if count == 15:
        count, at = _varint(data, at)
    if inner in (1, 2, 3):  # a byte each
        return None, at + count
    values = []
    for _ in range(count):
        value, at = _value(data, at, inner)
        if inner == _STRUCT:
            values.append(value)
        if at > len(data):
            raise ValueError("a list that goes on after the end")
    return values, at


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise ValueError("a number of more than 64 bits")


def _number(data: mmap.mmap, at: int) -> tuple[int, int]:
    """A signed number: 0, -1, 1, -2, ... are stored as 0, 1, 2, 3, ..."""
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at
