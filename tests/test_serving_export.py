"""Exports read back equal, are whole or absent, and answer as the run does."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from mmkd.serving import FORMATS, ExportError, RunLoadError, export, load, load_export
from mmkd.serving import export as export_function
from tests.test_serving import IDS, ITEMS, USERS, WIDTH, write_run


@pytest.fixture(params=FORMATS)
def to(request) -> str:
    pytest.importorskip({"parquet": "pyarrow", "faiss": "faiss", "onnx": "onnx"}.get(request.param, "safetensors"))
    return request.param


@pytest.mark.parametrize("kind", ["text", "int"])
@pytest.mark.parametrize("names", [True, False])
def test_read_back_equal(tmp_path, to, kind, names):
    user_emb, item_emb, _ = write_run(tmp_path / "run", kind, names)
    target = tmp_path / "deep" / "out"
    assert export(tmp_path / "run", to, target) == target
    got = load_export(target)
    for array, wanted in ((got.user_emb, user_emb), (got.item_emb, item_emb)):
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, wanted)
    for array, wanted in zip((got.user_ids, got.item_ids), IDS[kind], strict=True):
        assert array.dtype.kind == wanted.dtype.kind
        np.testing.assert_array_equal(array, wanted)
    assert (got.item_names is not None) == names
    if names:
        assert got.item_names.tolist() == [f"Item {i}" for i in range(ITEMS)]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]


def test_replaces_an_earlier_export_from_a_loaded_run(tmp_path, to):
    write_run(tmp_path / "run", "text")
    export(tmp_path / "run", to, tmp_path / "out")
    write_run(tmp_path / "run", "int")
    export(load(tmp_path / "run"), to, tmp_path / "out")
    np.testing.assert_array_equal(load_export(tmp_path / "out").user_ids, IDS["int"][0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


def test_an_interrupted_export_leaves_the_one_before(tmp_path, to, monkeypatch):
    write_run(tmp_path / "run", "text")
    export(tmp_path / "run", to, tmp_path / "out")
    write_run(tmp_path / "run", "int")
    module = sys.modules["mmkd.serving.export"]

    def fails(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file" if to == "safetensors" else "write_json", fails)
    with pytest.raises(OSError, match="No space left"):
        export(tmp_path / "run", to, tmp_path / "out")
    np.testing.assert_array_equal(load_export(tmp_path / "out").user_ids, IDS["text"][0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


def test_a_faiss_index_finds_what_the_run_recommends(tmp_path):
    faiss = pytest.importorskip("faiss")
    write_run(tmp_path / "run", "int")
    export(tmp_path / "run", "faiss", tmp_path / "out")
    index = faiss.read_index(str(tmp_path / "out" / "items.faiss"))
    scores, _ = index.search(np.load(tmp_path / "out" / "users.npy"), 5)
    recommended = load(tmp_path / "run").recommend(IDS["int"][0], 5, exclude_seen=False)
    np.testing.assert_array_equal(scores, [[r.score for r in row] for row in recommended])


@pytest.mark.parametrize("kind", ["text", "int"])
def test_an_onnx_runtime_ranks_as_the_run_does(tmp_path, kind):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    _, _, seen = write_run(tmp_path / "run", kind)
    export(tmp_path / "run", "onnx", tmp_path / "out")
    session = runtime.InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    rows = np.array([3, 0, 29, 3])
    exclude = np.full((4, ITEMS), -1)
    for at, row in enumerate(rows):
        exclude[at, : seen[row].sum()] = np.flatnonzero(seen[row])
    for wanted, skip in ((True, exclude), (False, np.empty((4, 0), np.int64))):
        scores, items, names, users = session.run(None, {"users": rows, "exclude": skip, "k": np.array([7])})
        assert users.tolist() == IDS[kind][0][rows].tolist()
        recommended = load(tmp_path / "run").recommend(IDS[kind][0][rows], 7, exclude_seen=wanted)
        for at, row in enumerate(recommended):
            there = np.isfinite(scores[at])
            assert [(r.item, r.score, r.name) for r in row] == list(
                zip(items[at][there].tolist(), scores[at][there].tolist(), names[at][there].tolist(), strict=True)
            )


def test_parquet_reads_with_pandas(tmp_path):
    pytest.importorskip("pyarrow")
    pandas = pytest.importorskip("pandas")
    write_run(tmp_path / "run", "text")
    export(tmp_path / "run", "parquet", tmp_path / "out")
    items = pandas.read_parquet(tmp_path / "out" / "items.parquet")
    assert list(items.columns) == ["id", "embedding", "name"]
    assert np.stack(items["embedding"]).shape == (ITEMS, WIDTH)
    assert len(pandas.read_parquet(tmp_path / "out" / "users.parquet")) == USERS


def test_refusals(tmp_path, to):
    write_run(tmp_path / "run")
    with pytest.raises(ExportError, match="to: expected one of safetensors, parquet, faiss, onnx, got 'csv'"):
        export(tmp_path / "run", "csv", tmp_path / "out")
    with pytest.raises(RunLoadError, match=r"no student\.safetensors"):
        export(tmp_path / "nothing", to, tmp_path / "out")
    own = tmp_path / "own"
    own.mkdir()
    (own / "thesis.txt").write_text("mine")
    with pytest.raises(ExportError, match=f"path: {own}"):
        export(tmp_path / "run", to, own)
    if to != "safetensors":
        with pytest.raises(ExportError, match="is a file, and this format is a folder"):
            export(tmp_path / "run", to, own / "thesis.txt")
    assert (own / "thesis.txt").read_text() == "mine"
    assert not (tmp_path / "out").exists()
    with pytest.raises(ExportError, match="not a whole export"):
        load_export(own)


def test_damaged_exports_are_refused(tmp_path, to):
    write_run(tmp_path / "run")
    target = export_function(tmp_path / "run", to, tmp_path / "out")
    for file in [target] if target.is_file() else sorted(target.iterdir()):
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ExportError, match="not a whole export"):
            load_export(target)
        file.write_bytes(whole)
    load_export(target)


@pytest.mark.parametrize(
    ("to", "module", "fix"),
    [("faiss", "faiss", "faiss-cpu"), ("parquet", "pyarrow", "pyarrow"), ("onnx", "onnx", "onnx")],
)
def test_a_missing_library_says_what_to_install(tmp_path, monkeypatch, to, module, fix):
    write_run(tmp_path / "run")
    for name in [n for n in sys.modules if n.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"pip install {fix}"):
        export(tmp_path / "run", to, tmp_path / "out")
    assert not (tmp_path / "out").exists()
