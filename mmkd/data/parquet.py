"""How much a Parquet file asks for, found out before Arrow is let near it: Arrow makes room for whatever a page claims."""

from __future__ import annotations

import mmap
from pathlib import Path

from .errors import DataError
from .files import MOST_EXPANSION, SMALL, expect_kind

__all__ = ["check_parquet"]

_BINARY, _LISTS, _STRUCT = 8, (9, 10), 12  # types of Thrift's compact protocol
_VARINTS = (4, 5, 6)
_FIXED = {1: 0, 2: 0, 3: 1, 7: 8}  # bytes of a field; a boolean is in its own head


def check_parquet(path: Path) -> None:
    """Refuses a Parquet file whose footer or pages claim more than its size can honestly hold.

    Raises:
        DataError: no Parquet file, one cut short, or one that unpacks to 200 times its size or to far too many rows.
        ImportError: pyarrow is not installed.
    """
    expect_kind(path, "parquet")
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise ImportError(f"{path}: reading Parquet needs pyarrow; type: pip install 'mmkd[demo]'") from None
    size = path.stat().st_size
    try:
        metadata = pq.read_metadata(path)
        unpacked = _unpacked(path, metadata)
    except Exception as error:  # whatever Arrow says of a broken footer, or what is no page header
        raise DataError(f"{path}: cannot be read as Parquet ({type(error).__name__}: {error})") from error
    rows = max(10_000_000, 64 * size)
    if metadata.num_rows > rows:
        raise DataError(f"{path}: the footer claims {metadata.num_rows:,} rows; expected at most {rows:,} in this size")
    if unpacked > max(SMALL, MOST_EXPANSION * size):
        raise DataError(
            f"{path}: {size:,} bytes that claim to unpack to {unpacked:,}; expected at most {MOST_EXPANSION} times the "
            "size. If the columns are really that uniform, write them without compression"
        )


def _unpacked(path: Path, metadata) -> int:
    """Bytes that all pages of all columns claim to have when they are unpacked."""
    total = 0
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for group in range(metadata.num_row_groups):
            for column in range(metadata.num_columns):
                chunk = metadata.row_group(group).column(column)
                at = chunk.data_page_offset
                if chunk.has_dictionary_page and chunk.dictionary_page_offset:
                    at = min(at, chunk.dictionary_page_offset)
                end = at + chunk.total_compressed_size
                if not 0 <= at <= end <= len(data):
                    raise ValueError(f"column {column} is said to be at {at} to {end} of {len(data)} bytes")
                while at < end:
                    unpacked, packed, at = _page(data, at)
                    total, at = total + unpacked, at + packed
    return total


def _page(data: mmap.mmap, at: int) -> tuple[int, int, int]:
    """Of a page header: bytes unpacked, bytes packed, and where it ends."""
    sizes, field = {}, 0
    while (head := data[at]) != 0:
        at, field = _field(data, at, field)
        if field in (2, 3) and head & 15 in _VARINTS:
            sizes[field] = _zigzag(_varint(data, at)[0])
        at = _skip(data, at, head & 15)
    if min(sizes.get(2, -1), sizes.get(3, -1)) < 0:
        raise ValueError("a page header without sizes")
    return sizes[2], sizes[3], at + 1


def _field(data: mmap.mmap, at: int, before: int) -> tuple[int, int]:
    """Where a field's value starts, and its number."""
    step = data[at] >> 4
    if step:
        return at + 1, before + step
    number, at = _varint(data, at + 1)
    return at, _zigzag(number)


def _skip(data: mmap.mmap, at: int, kind: int) -> int:
    """Where a value ends."""
    if kind in _FIXED:
        return at + _FIXED[kind]
    if kind in _VARINTS:
        return _varint(data, at)[1]
    if kind == _BINARY:
        length, at = _varint(data, at)
        return at + length
    if kind in _LISTS:
        count, inner = data[at] >> 4, data[at] & 15
        at += 1
        if count == 15:
            count, at = _varint(data, at)
        for _ in range(count):
            at = at + 1 if inner in (1, 2) else _skip(data, at, inner)
            data[at - 1]  # within the file
        return at
    if kind == _STRUCT:
        field = 0
        while (head := data[at]) != 0:
            at, field = _field(data, at, field)
            at = _skip(data, at, head & 15)
        return at + 1
    raise ValueError(f"a page header with a field of type {kind}")


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise ValueError("a page header with a number of more than 64 bits")


def _zigzag(value: int) -> int:
    return (value >> 1) ^ -(value & 1)
