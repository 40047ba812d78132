"""Damaged and hostile files: a clear error or a sound result; no crash, no code run, memory and time bounded.

A few hundred inputs here; `make fuzz` sets MMKD_FUZZ to the number of inputs in all.
"""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mmkd
from mmkd.config import Config, ConfigError, load_config
from mmkd.data import DataError, convert, encode, load, synthetic
from mmkd.data.joining import join
from mmkd.data.parquet import check_parquet
from mmkd.data.table import read_interactions
from mmkd.graph import BipartiteGraph
from mmkd.models.lightgcn import LightGCN, initial_table
from mmkd.serving import (
    ExportError,
    Recommender,
    RunLoadError,
    export,
    load_explainer,
    load_export,
    read_item_list,
    recommend_file,
)
from mmkd.serving.batch import _batches
from mmkd.training import CheckpointError, RunError
from mmkd.training.checkpoint import save_checkpoint, training_tensors
from mmkd.training.run_folder import RunFolder
from mmkd.training.stage import _START, Stage
from mmkd.training.tasks import LightGCNTask
from tests.faults.damage import Payload, changes, damage, damage_inside, tokens

INPUTS = int(os.environ.get("MMKD_FUZZ", "600"))
MEMORY = 1 << 30  # bytes of address space a small damaged file may ask for
SECONDS = 20  # of processor time


@dataclass(frozen=True)
class Target:
    """Something that reads files, and the errors it may raise at damaged ones."""

    make: Callable[[Path], None]
    read: Callable[[Path], object]
    errors: tuple[type[Exception], ...]


def _pairs() -> list[tuple[str, str]]:
    train = synthetic(30, 20, 300, seed=1).train.tocoo()
    return [(f"u{u}", f"i{i}") for u, i in zip(train.row, train.col, strict=True)]


def _make_npz(folder: Path) -> None:
    d = synthetic(30, 20, 300, seed=1)
    for part in ("train", "val"):
        sp.save_npz(folder / f"{part}.npz", getattr(d, part))
    sp.save_npz(folder / "test.npz", d.test.tocoo(), compressed=False)
    np.save(folder / "image_feat.npy", d.features["image"])
    (folder / "item_ids.txt").write_text("\n".join(f"item é {i}" for i in range(20)))
    np.save(folder / "user_ids.npy", np.asarray([f"u{i}" for i in range(30)]))


def _make_json(folder: Path) -> None:
    import json

    d = synthetic(30, 20, 300, seed=1)
    for part in ("train", "val"):
        matrix = getattr(d, part)
        lists = {
            str(u): matrix.indices[a:b].tolist()
            for u, (a, b) in enumerate(zip(matrix.indptr, matrix.indptr[1:], strict=False))
        }
        (folder / f"{part}.json").write_text(json.dumps(lists))
    np.save(folder / "text_feat.npy", d.features["text"])


def _make_table(folder: Path) -> None:
    lines = [f"{user},{item},{1_600_000_000 + n}" for n, (user, item) in enumerate(_pairs())]
    (folder / "interactions.csv").write_text("user,item,timestamp\n" + "\n".join(lines))
    features = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    rows = [f"i{n}\t" + "\t".join(map(str, row)) for n, row in enumerate(features.tolist())]
    (folder / "image_feat.tsv").write_text("item\ta\tb\tc\n" + "\n".join(rows))
    np.savez_compressed(folder / "text_feat.npz", ids=np.asarray([f"i{n}" for n in range(20)]), features=features)


def _make_converted(to: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        convert(synthetic(30, 20, 300, seed=1), folder / "out", to)
        for path in (folder / "out").iterdir():
            path.rename(folder / path.name)
        (folder / "out").rmdir()

    return make


def _make_parquet(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    users, items = zip(*_pairs(), strict=True)
    times = np.arange(len(users)).astype("datetime64[s]")
    table = pa.table({"user": list(users), "item": list(items), "timestamp": times})
    pq.write_table(table, folder / "interactions.parquet", compression="snappy")
    columns = {"item": [f"i{n}" for n in range(20)], "a": np.arange(20.0), "b": np.arange(20, dtype=np.int32)}
    pq.write_table(pa.table(columns), folder / "image_feat.parquet", compression="none", use_dictionary=False)


def _stage(folder: Path) -> Stage:
    d = synthetic(8, 8, 30, seed=1)
    model = LightGCN(
        BipartiteGraph.from_scipy(d.train), initial_table(16, 4, "normal", torch.Generator().manual_seed(0)), 1
    )
    config = Config.model_validate({"evaluation": {"select": "last"}})
    task = LightGCNTask(model, config.lightgcn, d, model.graph, 0)
    return Stage(task, config.lightgcn, config, d, RunFolder(folder), 3)


def _make_typed(folder: Path) -> None:
    """RecBole files as they come: one `.inter` to be split by time, an `.item` with every type of field."""
    lines = [f"{user}\t{item}\t{n % 5}\t{1_600_000_000 + n}" for n, (user, item) in enumerate(_pairs())]
    (folder / "shop.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + "\n".join(lines)
    )
    rows = [f"i{n}\tItem é {n}\t{1990 + n}\t{n} {n / 7}" for n in range(20)]
    (folder / "shop.item").write_text("item_id:token\ttitle:token_seq\tyear:token\tvec:float_seq\n" + "\n".join(rows))


def _write_column(folder: Path, name: str, column: str, values: list) -> None:
    """The same column as CSV, TSV and Parquet, after another one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for ending, delimiter in (("csv", ","), ("tsv", "\t")):
        lines = [f"{n}{delimiter}{value}" for n, value in enumerate(values)]
        (folder / f"{name}.{ending}").write_text("\n".join([f"other{delimiter}{column}", *lines]))
    table = pa.table({"other": np.arange(len(values)), column: [str(value) for value in values]})
    pq.write_table(table, folder / f"{name}.parquet", row_group_size=50)


def _student() -> Recommender:
    generator = torch.Generator().manual_seed(0)
    tables = (torch.randn(n, 3, generator=generator) for n in (30, 20))
    seen = synthetic(30, 20, 300, seed=1).train
    names = (np.asarray([f"{mark}{n}" for n in range(count)]) for mark, count in (("u", 30), ("i", 20)))
    return Recommender(*tables, *names, seen)


def _make_users(folder: Path) -> None:
    _write_column(folder, "users", "user", [f"u{n % 30}" for n in range(100)])
    _write_column(folder, "deny", "item_id", [f"i{n}" for n in range(0, 20, 2)])
    (folder / "deny.txt").write_text("\n".join(f"i{n}" for n in range(0, 20, 2)))


def _read_users(folder: Path) -> None:
    student = _student()
    for path in sorted(folder.glob("deny.*")):
        student.restricted(deny=read_item_list(path))
    for path in sorted(folder.glob("users.*")):
        recommend_file(student, path, folder / f"out{path.suffix}", k=2)
        (folder / f"out{path.suffix}").unlink()


def _make_new(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [(f"u{n % 40}", f"i{n % 29}", 1_600_000_000 + n) for n in range(150)]
    (folder / "new.csv").write_text("user,item,timestamp\n" + "\n".join(",".join(map(str, row)) for row in rows))
    (folder / "new.tsv").write_text("user_id\titem_id\n" + "\n".join(f"{user}\t{item}" for user, item, _ in rows))
    users, items, times = zip(*rows, strict=True)
    pq.write_table(pa.table({"user": users, "item": items, "time": times}), folder / "new.parquet")


def _read_new(folder: Path) -> None:
    """What `mmkd update` reads of new interactions."""
    student = _student()
    for path in sorted(folder.glob("new.*")):
        joined = join("shop", student.seen, student.user_ids, student.item_ids, read_interactions(path), path)
        assert joined.pairs


def _make_items(folder: Path) -> None:
    from PIL import Image

    _write_column(folder, "items", "item", [f"i{n}" for n in range(20)])
    pixels = np.random.default_rng(0).integers(0, 255, (9, 11, 3), np.uint8)
    for name in ("a.png", "b.jpg", "c.gif", "d.webp", "e.bmp"):
        Image.fromarray(pixels).save(folder / name)

    def stop(done: int, _: int) -> None:
        if done == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _encode(folder, stop)


def _encode(folder: Path, progress: Callable[[int, int], None] | None = None) -> np.ndarray:
    ids = np.asarray([f"i{n}" for n in range(20)])
    path = encode.text_features(
        ids, ids.tolist(), folder, model="m", block=4, progress=progress,
        encoder=lambda texts: np.asarray([[float(text[1:]), 1.0] for text in texts]),
    )  # fmt: skip
    return np.load(path)


def _read_items(folder: Path) -> None:
    """What `mmkd features` reads: texts, images, and the blocks a stopped run left."""
    for path in sorted(folder.glob("items.*")):
        encode.read_texts(path, "other")
    for path in sorted(path for path in folder.iterdir() if path.suffix in encode.IMAGES):
        assert encode.read_image(path).mode == "RGB"
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        shutil.copytree(folder / ".text_feat.partial", Path(place) / ".text_feat.partial")
        assert _encode(Path(place)).shape == (20, 2)


def _make_checkpoint(folder: Path) -> None:
    (folder / "checkpoints").mkdir()
    stage = _stage(folder)
    optimizer = stage.task.optimizer()
    stage.task.step(0, 0)
    optimizer.step()
    tensors = training_tensors(
        stage.task.model, optimizer, {n: p.detach().clone() for n, p in stage.task.model.named_parameters()}
    ) | {"sums.bpr": torch.ones(())}
    save_checkpoint(stage.path, tensors, {**_START, "epoch": 2, "step": 1, "best_metric": 0.5})


def _read_checkpoint(folder: Path) -> None:
    stage = _stage(folder)
    stage._restore(stage.task.optimizer())


def _make_run(folder: Path) -> None:
    from tests.faults import jobs

    mmkd.train({**jobs.SETTINGS, "baselines": [], "teacher": {"epochs": 1}, "student": {"epochs": 1}}, out=folder / "r")
    for path in [p for p in (folder / "r").iterdir() if p.suffix != ".png" and p.is_file()]:
        path.rename(folder / path.name)
    shutil.rmtree(folder / "r")
    for name in ("teacher.safetensors", "summary.md"):
        (folder / name).unlink()


def _read_run(folder: Path) -> None:
    student = mmkd.load(folder)
    assert len(student.recommend(student.user_ids[:2].tolist(), 3)) == 2
    assert len(load_explainer(folder).reasons(0, np.arange(3))) == 3
    RunFolder(folder).metrics()
    assert RunFolder(folder).info()["data"]["name"]
    load_config(folder / "config.yaml")


def _make_export(to: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        ids = np.asarray([f"p{n}" for n in range(5)])
        student = Recommender(torch.randn(4, 3), torch.randn(5, 3), np.arange(4), ids, sp.csr_matrix((4, 5)), ids)
        export(student, to, folder / "export")

    return make


def _read_export(folder: Path) -> None:
    tables = load_export(folder / "export")
    assert len(tables.item_ids) == len(tables.item_emb)


def _read_data(folder: Path) -> None:
    d = load(folder)
    assert d.train.nnz and len(d.fingerprint()) == 64


TARGETS = {
    "npz": Target(_make_npz, _read_data, (DataError,)),
    "json": Target(_make_json, _read_data, (DataError,)),
    "table": Target(_make_table, _read_data, (DataError,)),
    "parquet": Target(_make_parquet, _read_data, (DataError,)),
    "mmrec": Target(_make_converted("mmrec"), _read_data, (DataError,)),
    "recbole": Target(_make_converted("recbole"), _read_data, (DataError,)),
    "recbole, typed": Target(_make_typed, _read_data, (DataError,)),
    "users": Target(_make_users, _read_users, (DataError,)),
    "new": Target(_make_new, _read_new, (DataError,)),
    "items": Target(_make_items, _read_items, (DataError,)),
    "checkpoint": Target(_make_checkpoint, _read_checkpoint, (CheckpointError,)),
    "run": Target(_make_run, _read_run, (RunLoadError, RunError, ConfigError)),
    **{
        f"export-{to}": Target(_make_export(to), _read_export, (ExportError,))
        for to in ("safetensors", "parquet", "faiss", "onnx")
    },
}


@pytest.fixture
def folder():
    """A folder in memory where the system has one: a disk would take most of the time."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as path:
        yield Path(path)


@pytest.fixture
def bounded_memory():
    """Less than MEMORY more than now can be had: a header that asks for more fails here and not on a user's machine."""
    import pyarrow

    pyarrow.set_cpu_count(1)
    pyarrow.set_io_thread_count(1)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def _asked_for_too_much(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError) or "bad_alloc" in str(error):
            return "stack" not in str(error)  # Python's own parser calls deep nesting a MemoryError
        error = error.__cause__ or error.__context__
    return False


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files(name, folder, bounded_memory):
    target, mark = TARGETS[name], folder / "mark"
    sound = folder / "sound"
    sound.mkdir()
    target.make(sound)
    target.read(sound)
    work = folder / "work"
    shutil.copytree(sound, work)
    files = {path.relative_to(sound): path.read_bytes() for path in sorted(sound.rglob("*")) if path.is_file()}
    pieces = [*tokens(str(mark)), *files.values()]
    seen: Counter[str] = Counter()

    @settings(
        max_examples=max(20, INPUTS // len(TARGETS)), deadline=None, database=None, derandomize="MMKD_FUZZ" not in os.environ,
        suppress_health_check=list(HealthCheck), print_blob=True,
    )  # fmt: skip
    @given(st.sampled_from(sorted(files)), st.booleans(), changes)
    def check(file, inside, steps):
        data = files[file]
        changed = damage_inside(file.name, data, steps, pieces) if inside else damage(data, steps, pieces)
        (work / file).write_bytes(changed)
        start = time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                target.read(work)
            seen["taken"] += 1
        except target.errors as error:
            assert not _asked_for_too_much(error), error
            assert str(error)
            seen["refused"] += 1
        finally:
            (work / file).write_bytes(data)
        assert time.process_time() - start < SECONDS
        assert not mark.exists(), "code in a file was run"

    check()
    print(f"\n{name}: {sum(seen.values())} inputs, {seen['refused']} refused, {seen['taken']} taken")
    assert seen["refused"] > seen["taken"] / 10


HOSTILE = {
    "npz that unpacks to 1,000 times its size": lambda folder: _bomb(folder / "train.npz", 1 << 28),
    "npz with overlapping members": lambda folder: _overlap(folder / "train.npz"),
    "npy of 10^12 rows": lambda folder: _npy(folder / "image_feat.npy", "(1000000000000, 8)"),
    "csr with 10^12 columns": lambda folder: _csr(folder / "train.npz", (30, 10**12)),
    "csr of no rows and 10^12 users": lambda folder: _csr(folder / "train.npz", (10**12, 20)),
    "pickle in train.npz": lambda folder: np.savez(folder / "train.npz", format=np.array([Payload(str(folder / "mark"))], object)),
    "pickle as features": lambda folder: np.save(folder / "image_feat.npy", np.array([Payload(str(folder / "mark"))], object)),
    "an id of a megabyte": lambda folder: (folder / "item_ids.txt").write_text("\n".join(["x" * 2**23, *map(str, range(19))])),
}  # fmt: skip


def _bomb(path: Path, size: int) -> None:
    import zipfile

    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("data.npy", "w", force_zip64=True) as file,
    ):
        for _ in range(size >> 26):
            file.write(bytes(1 << 26))


def _overlap(path: Path) -> None:
    import io
    import zipfile

    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("data.npy", bytes(1 << 20))
        for number in range(2000):  # the same bytes again under another name
            info = zipfile.ZipInfo(f"m{number}.npy")
            info.file_size = info.compress_size = 1 << 20
            info.CRC = archive.filelist[0].CRC
            info.header_offset = 0
            archive.filelist.append(info)
        archive._didModify = True
    path.write_bytes(out.getvalue())


def _npy(path: Path, shape: str) -> None:
    head = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head.encode() + bytes(64))


def _csr(path: Path, shape: tuple[int, int]) -> None:
    rowptr = np.zeros(31, np.int64)
    rowptr[1:] = 1
    parts = {"indices": np.zeros(1, np.int64), "indptr": rowptr, "data": np.ones(1), "shape": np.asarray(shape)}
    np.savez(path, format=np.array(b"csr"), **parts)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_data(name, tmp_path, bounded_memory):
    _make_npz(tmp_path)
    HOSTILE[name](tmp_path)
    with pytest.raises(DataError, match=r"train\.npz|image_feat\.npy|item_ids\.txt") as caught:
        load(tmp_path)
    assert not _asked_for_too_much(caught.value) and not (tmp_path / "mark").exists()


def test_parquet_that_repeats_one_text_a_million_times_is_read_without_a_copy_each(tmp_path, bounded_memory):
    import pyarrow as pa
    import pyarrow.parquet as pq

    long = pa.DictionaryArray.from_arrays(pa.array(np.zeros(1_000_000, np.int32)), pa.array(["x" * 100_000]))
    pq.write_table(pa.table({"user": long, "item": pa.array(np.arange(1_000_000))}), tmp_path / "interactions.parquet")
    assert (tmp_path / "interactions.parquet").stat().st_size < 10_000_000
    with pytest.raises(DataError, match="characters"):
        load(tmp_path)


@pytest.mark.parametrize("lie", ["a page of 2 GB in its header", "pages of 160 MB that are all spaces"])
def test_parquet_pages_are_refused_before_room_is_made_for_them(lie, tmp_path, bounded_memory):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, users = tmp_path / "interactions.parquet", [f"u{n}" for n in range(5000)]
    table = pa.table({"user": users, "item": users})
    if lie.endswith("header"):
        pq.write_table(table, path, compression="snappy", use_dictionary=False)
        data, at = path.read_bytes(), pq.read_metadata(path).row_group(0).column(1).data_page_offset
        assert data[at : at + 3] == b"\x15\x00\x15"  # type: data page; then the unpacked size, here a number of 3 bytes
        path.write_bytes(data[: at + 3] + b"\xfe\xff\xff\xff\x0f" + data[at + 6 :])
    else:
        blank = pa.array([" " * 1_000_000] * 80)
        pq.write_table(pa.table({"user": blank, "item": blank}), path, compression="zstd", use_dictionary=False)
    for read in (load, lambda _: list(_batches(path, None)), lambda _: read_item_list(path)):
        with pytest.raises(DataError, match="claim to unpack to") as caught:
            read(tmp_path)
        assert not _asked_for_too_much(caught.value)


def test_every_bit_of_a_parquet_footer_may_be_wrong(tmp_path):
    """pyarrow's own view of the columns ends the process at ten of these."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, users = tmp_path / "interactions.parquet", [f"u{n % 7}" for n in range(60)]
    pq.write_table(pa.table({"user": users, "item": users}), path)
    data, refused = path.read_bytes(), 0
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    for at in range(8 * start, 8 * len(data)):
        changed = bytearray(data)
        changed[at // 8] ^= 1 << at % 8
        path.write_bytes(changed)
        try:
            check_parquet(path)
        except DataError as error:
            assert "interactions.parquet" in str(error)
            refused += 1
    assert 8 * (len(data) - start) > refused > 500


def test_json_ids_of_more_than_4300_digits(tmp_path):
    """Python's int() refuses them; ids of digits are still ordered by their value."""
    long = "9" * 5000
    (tmp_path / "train.json").write_text(f'{{"{long}": [0, 1], "10": [1], "9": [0], "010": [1], "{long[1:]}0": [1]}}')
    assert load(tmp_path).user_ids.tolist() == ["9", "010", "10", long[1:] + "0", long]
    (tmp_path / "train.json").write_text(f'{{"1": [0, {long}]}}')
    with pytest.raises(DataError, match=r"train\.json.*4300 digits"):
        load(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["a: " + "[" * 5000, "x: !!python/object/apply:os.mkdir [{mark}]", "a: &a [1]\nb: *a", "a: 2020-99-99", "\x00"],
)
def test_hostile_settings(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text.replace("{mark}", str(tmp_path / "mark")))
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        load_config(tmp_path / "config.yaml")
    assert not (tmp_path / "mark").exists()


def test_nested_aliases_take_no_time(tmp_path):
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
    (tmp_path / "c.yaml").write_text(bomb)
    assert len(yaml.safe_load(bomb)) == 60  # harmless until something walks it
    with pytest.raises(ConfigError, match="aliases"):
        load_config(tmp_path / "c.yaml")
