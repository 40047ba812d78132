"""A student's tables with their ids, in the formats other systems read; written whole or not at all."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors.numpy import load_file, save_file

from mmkd.data.files import open_npy, open_npz
from mmkd.data.ids import text_array
from mmkd.data.parquet import check_parquet
from mmkd.files import make_folder, write_atomic, write_folder, write_json
from mmkd.serving.recommend import Recommender, load

FORMATS = ("safetensors", "parquet", "faiss", "onnx")
MARK = "export.json"  # in every exported folder: what it is


class ExportError(ValueError):
    """An export that cannot be written or read; the message names the path and what to do."""


@dataclass(frozen=True, eq=False)
class Tables:
    """What an export holds: row r of a table belongs to entry r of its ids; the score is the inner product.

    Attributes:
        user_emb, item_emb: float32 `[U, d]`, `[I, d]`.
        user_ids, item_ids: original ids, integers or text.
        item_names: display text by position, or None.
    """

    user_emb: np.ndarray
    item_emb: np.ndarray
    user_ids: np.ndarray
    item_ids: np.ndarray
    item_names: np.ndarray | None = None

    def __post_init__(self) -> None:
        for table, ids in ((self.user_emb, self.user_ids), (self.item_emb, self.item_ids)):
            if table.ndim != 2 or table.shape[1] != self.user_emb.shape[1] or ids.shape != (len(table),):
                raise ExportError(f"tables: {table.shape} and ids: {ids.shape} do not go together")


def export(
    run_dir: str | Path | Recommender, to: Literal["safetensors", "parquet", "faiss", "onnx"], path: str | Path
) -> Path:
    """Writes the student of a run, ids included, and returns where.

    - `safetensors`: one file with `user_emb`, `item_emb` (float32) and `user_ids`, `item_ids`, `item_names`: int64, or for
      text `NAME.utf8` (uint8, all texts one after the other) and `NAME.offsets` (int64 `[n + 1]`).
    - `parquet`: a folder with `users.parquet` and `items.parquet`; columns `id`, `embedding` (fixed-size list of float32),
      items also `name` where there are names.
    - `faiss`: a folder with `items.faiss` (exact inner-product index; position r is `item_ids[r]`), `users.npy` (the
      queries) and `ids.npz`.
    - `onnx`: a folder with `model.onnx`, the ranking itself, ids inside. Inputs `users` (int64 `[n]`, positions in
      `user_ids`), `exclude` (int64 `[n, m]`, positions of items to leave out, -1 for none) and `k` (int64 `[1]`); outputs
      `scores` (float32 `[n, k]`, -inf where nothing is left), `items` (int64 `[n, k]` or text: original ids), `user`
      (their ids) and, where items have them, `names`. The tables and ids are its initializers. Equal scores come by
      position.

    A file or an earlier export at `path` is replaced.

    Raises:
        ExportError: an unknown format, or a folder at `path` that no export made. RunLoadError: the run cannot be read.
        ImportError: the library of the format is missing; the message says what to install.
    """
    if to not in FORMATS:
        raise ExportError(f"to: expected one of {', '.join(FORMATS)}, got {to!r}")
    path = Path(path)
    _check_target(path, folder=to != "safetensors")
    writer = {"parquet": _write_parquet, "faiss": _write_faiss, "onnx": _write_onnx}.get(to)
    if writer is not None:
        _library(to)
    tables = _tables(run_dir if isinstance(run_dir, Recommender) else load(run_dir))
    make_folder(path.parent)
    if writer is None:
        return write_atomic(path, lambda temporary: _write_safetensors(tables, temporary))
    about = {"mmkd_export": 1, "to": to, "users": len(tables.user_ids), "items": len(tables.item_ids)}

    def write(folder: Path) -> None:
        writer(tables, folder)
        write_json(folder / MARK, about)

    return write_folder(path, write)


def load_export(path: str | Path) -> Tables:
    """Reads back what :func:`export` wrote, whichever format.

    Raises:
        ExportError: no export, or a damaged one. ImportError: the library of the format is missing.
    """
    path = Path(path)
    try:
        if path.is_file():
            return _read_safetensors(path)
        to = json.loads((path / MARK).read_text(encoding="utf-8"))["to"]
        return {"parquet": _read_parquet, "faiss": _read_faiss, "onnx": _read_onnx}[to](path)
    except ImportError:
        raise
    except Exception as error:  # whatever the libraries of the formats say of a broken file
        raise ExportError(f"{path}: not a whole export of mmkd: {type(error).__name__}: {error}") from error


def _tables(student: Recommender) -> Tables:
    return Tables(
        student.user_emb.float().cpu().contiguous().numpy(),
        student.item_emb.float().cpu().contiguous().numpy(),
        student.user_ids,
        student.item_ids,
        student.item_names,
    )


def _library(to: str):
    try:
        if to == "faiss":
            import faiss

            return faiss
        if to == "onnx":
            import onnx

            return onnx
        import pyarrow.parquet

        return pyarrow
    except ImportError as error:
        package = {"faiss": "faiss-cpu", "parquet": "pyarrow", "onnx": "onnx"}[to]
        raise ImportError(f"export to {to} needs {package}: pip install {package} (or mmkd[serve])") from error


def _check_target(path: Path, folder: bool) -> None:
    if folder and path.is_file():
        raise ExportError(f"path: {path} is a file, and this format is a folder; name another place")
    if not folder and path.is_dir():
        raise ExportError(f"path: {path} is a folder, and this format is one file; name a file in it")
    if folder and path.is_dir() and any(path.iterdir()) and not (path / MARK).exists():
        raise ExportError(f"path: {path} holds other files, which an export would replace; name another folder")


def _write_safetensors(tables: Tables, path: Path) -> None:
    tensors = {"user_emb": tables.user_emb, "item_emb": tables.item_emb}
    for name in ("user_ids", "item_ids", "item_names"):
        ids = getattr(tables, name)
        if ids is not None:
            tensors |= _text(name, ids) if ids.dtype.kind == "U" else {name: ids.astype(np.int64)}
    save_file(tensors, path, metadata={"format": "mmkd_export", "version": "1", "score": "inner product"})


def _text(name: str, values: np.ndarray) -> dict[str, np.ndarray]:
    raw = [value.encode() for value in values.tolist()]
    offsets = np.concatenate([[0], np.cumsum([len(value) for value in raw], dtype=np.int64)]).astype(np.int64)
    return {f"{name}.utf8": np.frombuffer(b"".join(raw), dtype=np.uint8), f"{name}.offsets": offsets}


def _read_safetensors(path: Path) -> Tables:
    tensors = load_file(path)

    def ids(name: str) -> np.ndarray:
        if name in tensors:
            return tensors[name]
        raw, offsets = tensors[f"{name}.utf8"].tobytes(), tensors[f"{name}.offsets"].tolist()
        return text_array([raw[a:b].decode() for a, b in pairwise(offsets)], name)

    names = ids("item_names") if "item_names.offsets" in tensors else None
    return Tables(tensors["user_emb"], tensors["item_emb"], ids("user_ids"), ids("item_ids"), names)


def _write_parquet(tables: Tables, folder: Path) -> None:
    arrow = _library("parquet")
    for kind, ids, table, names in (
        ("users", tables.user_ids, tables.user_emb, None),
        ("items", tables.item_ids, tables.item_emb, tables.item_names),
    ):
        columns = {"id": arrow.array(ids.tolist() if ids.dtype.kind == "U" else ids)}
        columns["embedding"] = arrow.FixedSizeListArray.from_arrays(arrow.array(table.reshape(-1)), table.shape[1])
        if names is not None:
            columns["name"] = arrow.array(names.tolist(), type=arrow.string())
        arrow.parquet.write_table(arrow.table(columns), folder / f"{kind}.parquet")


def _read_parquet(folder: Path) -> Tables:
    arrow = _library("parquet")
    for kind in ("users", "items"):
        check_parquet(folder / f"{kind}.parquet")
    users, items = (arrow.parquet.read_table(folder / f"{kind}.parquet") for kind in ("users", "items"))

    def values(table, column: str) -> np.ndarray:
        array = table[column].combine_chunks()
        return np.asarray(array.to_pylist(), dtype=str) if arrow.types.is_string(array.type) else array.to_numpy()

    def matrix(table) -> np.ndarray:
        flat = table["embedding"].combine_chunks().flatten().to_numpy()
        return flat.reshape(table.num_rows, table.schema.field("embedding").type.list_size)

    names = values(items, "name") if "name" in items.column_names else None
    return Tables(matrix(users), matrix(items), values(users, "id"), values(items, "id"), names)


def _write_faiss(tables: Tables, folder: Path) -> None:
    faiss = _library("faiss")
    index = faiss.IndexFlatIP(tables.item_emb.shape[1])
    index.add(tables.item_emb)
    faiss.write_index(index, str(folder / "items.faiss"))
    np.save(folder / "users.npy", tables.user_emb)
    names = {} if tables.item_names is None else {"item_names": tables.item_names}
    np.savez(folder / "ids.npz", user_ids=tables.user_ids, item_ids=tables.item_ids, **names)


def _read_faiss(folder: Path) -> Tables:
    faiss = _library("faiss")
    _check_flat_index(folder / "items.faiss")
    index = faiss.read_index(str(folder / "items.faiss"))
    users, ids = open_npy(folder / "users.npy"), open_npz(folder / "ids.npz")
    items = index.reconstruct_n(0, index.ntotal)
    return Tables(users, items, ids["user_ids"], ids["item_ids"], ids.get("item_names"))


def _check_flat_index(path: Path) -> None:
    """faiss trusts what it reads; this makes sure that the file is a flat inner-product index of just its size."""
    head = struct.Struct("<4siqqqBiQ")  # kind, width, rows, 2 unused, trained, metric, floats
    with open(path, "rb") as file:
        kind, width, rows, _, _, _, metric, floats = head.unpack(file.read(head.size))
    if kind != b"IxFI" or metric != 0 or width < 1 or rows < 0 or floats != width * rows:
        raise ValueError("items.faiss is no flat inner-product index")
    if path.stat().st_size != head.size + 4 * floats:
        raise ValueError(f"items.faiss declares {rows} x {width} floats and has {path.stat().st_size} bytes")


_OPSET = 17
_ONNX_BYTES = 2**31 - 2**27  # the limit of protobuf, with room for the ids


def _write_onnx(tables: Tables, folder: Path) -> None:
    onnx = _library("onnx")
    size = tables.user_emb.nbytes + tables.item_emb.nbytes
    if size > _ONNX_BYTES:
        raise ExportError(
            f"to: onnx holds at most 2 GiB in one file, and these tables have {size / 2**30:.1f} GiB; export to faiss or parquet"
        )
    helper, types = onnx.helper, onnx.TensorProto
    ids = {"user_ids": tables.user_ids, "item_ids": tables.item_ids, "item_names": tables.item_names}
    constants = [
        onnx.numpy_helper.from_array(tables.user_emb, "user_emb"),
        onnx.numpy_helper.from_array(tables.item_emb, "item_emb"),
        *(_onnx_ids(name, values) for name, values in ids.items() if values is not None),
        helper.make_tensor("none", types.INT64, [1], [len(tables.item_ids)]),
        helper.make_tensor("zero", types.INT64, [1], [0]),
        helper.make_tensor("one", types.INT64, [1], [1]),
        helper.make_tensor("minus_inf", types.FLOAT, [1], [float("-inf")]),
    ]
    node = helper.make_node
    nodes = [
        node("Gather", ["user_emb", "users"], ["query"]),
        node("Transpose", ["item_emb"], ["item_t"], perm=[1, 0]),
        node("MatMul", ["query", "item_t"], ["all"]),
        # one column more, where the -1 of `exclude` can point without hurting an item
        node("Slice", ["all", "zero", "one", "one"], ["column"]),
        node("Concat", ["all", "column"], ["padded"], axis=1),
        node("Less", ["exclude", "zero"], ["empty"]),
        node("Where", ["empty", "none", "exclude"], ["target"]),
        node("Shape", ["target"], ["target_shape"]),
        node("Expand", ["minus_inf", "target_shape"], ["updates"]),
        node("ScatterElements", ["padded", "target", "updates"], ["masked_padded"], axis=1),
        node("Slice", ["masked_padded", "zero", "none", "one"], ["masked"]),
        node("TopK", ["masked", "k"], ["scores", "rows"], axis=1),
        node("Gather", ["item_ids", "rows"], ["items"]),
    ]
    value = helper.make_tensor_value_info
    inputs = [
        value("users", types.INT64, ["n"]),
        value("exclude", types.INT64, ["n", "m"]),
        value("k", types.INT64, [1]),
    ]
    item_type = types.STRING if tables.item_ids.dtype.kind == "U" else types.INT64
    outputs = [value("scores", types.FLOAT, ["n", None]), value("items", item_type, ["n", None])]
    if tables.item_names is not None:
        nodes.append(node("Gather", ["item_names", "rows"], ["names"]))
        outputs.append(value("names", types.STRING, ["n", None]))
    nodes.append(node("Gather", ["user_ids", "users"], ["user"]))
    outputs.append(value("user", types.STRING if tables.user_ids.dtype.kind == "U" else types.INT64, ["n"]))
    graph = helper.make_graph(nodes, "mmkd_student", inputs, outputs, constants)
    model = helper.make_model(
        graph, producer_name="mmkd", opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=8
    )
    onnx.checker.check_model(model)
    onnx.save_model(model, str(folder / "model.onnx"))


def _onnx_ids(name: str, values: np.ndarray):
    onnx = _library("onnx")
    if values.dtype.kind == "U":
        texts = [value.encode() for value in values.tolist()]
        return onnx.helper.make_tensor(name, onnx.TensorProto.STRING, [len(texts)], texts)
    return onnx.numpy_helper.from_array(values.astype(np.int64), name)


def _read_onnx(folder: Path) -> Tables:
    onnx = _library("onnx")
    model = onnx.load_model(str(folder / "model.onnx"))
    constants = {constant.name: constant for constant in model.graph.initializer}

    def read(name: str) -> np.ndarray:
        if constants[name].data_type == onnx.TensorProto.STRING:
            return np.asarray([text.decode() for text in constants[name].string_data], dtype=str)
        return onnx.numpy_helper.to_array(constants[name])

    names = read("item_names") if "item_names" in constants else None
    return Tables(read("user_emb"), read("item_emb"), read("user_ids"), read("item_ids"), names)
