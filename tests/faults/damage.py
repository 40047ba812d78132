"""Ways to damage a file: cut, flipped, spliced, and lies in headers that keep their checksums right."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import struct
import zipfile

from hypothesis import strategies as st

INTEGERS = [
    0,
    1,
    2,
    7,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
]
NUMBERS = [
    b"-1",
    b"0",
    b"1",
    b"4294967296",
    b"9223372036854775807",
    b"99999999999999999999",
    b"1e999",
    b"NaN",
    b"9" * 5000,
    b"1.5",
]


class Payload:
    """Unpickled, it makes a folder; the tests look whether it is there."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def tokens(mark: str) -> list[bytes]:
    """Pieces that a parser may stumble over, and code that must not run."""
    return [
        b"", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"\r", b",", b"\t", b'"', b"'", b"[" * 100_000, b'{"a":' * 20_000,
        b"(" * 3000, b'"\\ud800"', b"null", b"true", b"x" * 200_000, b"{}", b"[]", b"- " * 3000, b"&a [*a, *a]", b"\\",
        b"'descr': '|O', ", b"'descr': '|V0', ", b"'descr': '<U536870911', ", b"'shape': (99999999999,), ", b"'shape': (-1,), ",
        b"'fortran_order': 7, ", b"PK\x03\x04", b"PK\x01\x02", b"PAR1", b"\x93NUMPY\x01\x00", b"\x93NUMPY\x03\x00\xff\xff\xff\xff",
        pickle.dumps(Payload(mark)), b"!!python/object/apply:os.mkdir ['" + mark.encode() + b"']",
        b"__import__('os').mkdir('" + mark.encode() + b"')",
    ]  # fmt: skip


STEPS = ["cut", "flip", "byte", "insert", "delete", "repeat", "int32", "int64", "number", "token", "swap"]
changes = st.lists(
    st.tuples(st.sampled_from(STEPS), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)), min_size=1, max_size=5
)


def damage(data: bytes, steps: list[tuple[str, int, int]], pieces: list[bytes]) -> bytes:
    """`data` after some steps; each is (what, where, with what)."""
    for what, where, choice in steps:
        size = len(data)
        at = where % (size + 1)
        end = at + 1 + choice % 64
        if what == "cut":
            data = data[:at]
        elif what == "flip" and at < size:
            data = data[:at] + bytes([data[at] ^ (1 << choice % 8)]) + data[at + 1 :]
        elif what == "byte" and at < size:
            data = data[:at] + bytes([choice % 256]) + data[at + 1 :]
        elif what == "insert":
            data = data[:at] + bytes([choice % 256] * (1 + choice % 9)) + data[at:]
        elif what == "delete":
            data = data[:at] + data[end:]
        elif what == "repeat":
            data = data[:end] + data[at:end] * (1 + choice % 300) + data[end:]
        elif what in ("int32", "int64"):
            width = 4 if what == "int32" else 8
            value = (INTEGERS[choice % len(INTEGERS)] % 2 ** (8 * width)).to_bytes(width, "little")
            data = data[:at] + value + data[at + width :]
        elif what == "number":
            found = list(re.finditer(rb"-?\d+", data[:20_000]))
            if found:
                match = found[where % len(found)]
                data = data[: match.start()] + NUMBERS[choice % len(NUMBERS)] + data[match.end() :]
        elif what == "token":
            data = data[:at] + pieces[choice % len(pieces)] + data[at:]
        elif what == "swap":
            data = data[end:] + data[at:end] + data[:at]
    return data


def damage_inside(name: str, data: bytes, steps: list[tuple[str, int, int]], pieces: list[bytes]) -> bytes:
    """Damages what a container holds, and closes it again so that lengths and checksums are right."""
    if name.endswith(".npz"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {info.filename: archive.read(info) for info in archive.infolist()}
        chosen = sorted(members)[steps[0][1] % len(members)]
        members[chosen] = _damage_npy(members[chosen], steps, pieces)
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if steps[0][2] % 2 else zipfile.ZIP_STORED) as archive:
            for member, content in members.items():
                archive.writestr(member, content)
        return out.getvalue()
    if name.endswith(".npy"):
        return _damage_npy(data, steps, pieces)
    if name.endswith(".safetensors"):
        size = struct.unpack("<Q", data[:8])[0]
        head = damage(data[8 : 8 + size], steps, pieces)
        return struct.pack("<Q", len(head)) + head + data[8 + size :]
    if name.endswith(".json") and not name.startswith(("run", "export")):
        tree = json.loads(data)
        tree[f"user{steps[0][2]}"] = [steps[0][1], str(steps[0][2]), steps[0][1] - 2**31]
        return damage(json.dumps(tree).encode(), steps[1:], pieces)
    return damage(data, steps, pieces)


def _damage_npy(data: bytes, steps: list[tuple[str, int, int]], pieces: list[bytes]) -> bytes:
    """Half of the times only the header's text, with its length put right."""
    if steps[0][1] % 2 or data[6:7] != b"\x01":
        return damage(data, steps, pieces)
    size = struct.unpack("<H", data[8:10])[0]
    head = damage(data[10 : 10 + size], steps, pieces)[:65_000]
    return data[:8] + struct.pack("<H", len(head)) + head + data[10 + size :]
