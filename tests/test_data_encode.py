"""Features from text and images: the built-in text vectors, stopping and going on, and the two model libraries."""

from __future__ import annotations

import importlib
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from mmkd.cli import app
from mmkd.data import DataError, encode, load

TEXTS = ["red apple fruit", "green apple fruit", "steel hammer tool", "wooden hammer tool", "red pear fruit", ""]
IDS = np.array([f"i{n}" for n in range(len(TEXTS))])


def hashed(texts) -> np.ndarray:
    return np.asarray([[len(text), sum(map(ord, text)) % 97] for text in texts], np.float32)


def test_tfidf_from_the_command_line_feeds_a_data_set(tmp_path):
    pytest.importorskip("sklearn")
    rows = "\n".join(f"{one},{text}" for one, text in zip(IDS, TEXTS, strict=True))
    (tmp_path / "items.csv").write_text(f"item_id,title\n{rows}\n")
    (tmp_path / "shop").mkdir()
    pairs = "\n".join(f"u{n % 3},{one}" for n, one in enumerate(IDS[::-1]))
    (tmp_path / "shop" / "interactions.csv").write_text(f"user,item\n{pairs}\n")
    arguments = [
        "features",
        str(tmp_path / "items.csv"),
        "--text",
        "title",
        "--dim",
        "3",
        "--out",
        str(tmp_path / "shop"),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    vectors = load(tmp_path / "shop", split="random").features["text"]
    assert vectors.shape == (6, 3) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1, 1, 1, 1, 1, 0], atol=1e-6)
    near = vectors @ vectors.T
    assert near[0, 1] > near[0, 2] and near[2, 3] > near[2, 0] and near[0, 4] > near[0, 3]
    first = (tmp_path / "shop" / "text_feat.npy").read_bytes()
    CliRunner().invoke(app, arguments)
    assert (tmp_path / "shop" / "text_feat.npy").read_bytes() == first


KILLED = """
import os, sys
import numpy as np
from mmkd.data import encode
from tests.test_data_encode import IDS, TEXTS, hashed
calls = 0
def dies(texts):
    global calls
    calls += 1
    if calls == 3:
        os._exit(9)
    return hashed(texts)
encode.text_features(IDS, TEXTS, sys.argv[1], model="m", block=2, encoder=dies)
"""


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "out")], cwd=str(encode.__file__).split("/mmkd/")[0]
    )
    assert done.returncode == 9 and not (tmp_path / "out" / "text_feat.npy").exists()
    seen, reports = [], []

    def watched(texts):
        seen.extend(texts)
        return hashed(texts)

    path = encode.text_features(
        IDS, TEXTS, tmp_path / "out", model="m", block=2, encoder=watched, progress=lambda *now: reports.append(now)
    )
    assert seen == TEXTS[4:] and reports == [(2, 6), (4, 6), (6, 6)]
    np.testing.assert_array_equal(np.load(path), hashed(TEXTS))
    assert np.load(tmp_path / "out" / "text_ids.npy").tolist() == IDS.tolist()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["text_feat.npy", "text_ids.npy"]


def test_blocks_of_other_texts_or_another_model_are_not_used(tmp_path):
    def stops(texts):
        if TEXTS[4] in texts:
            raise KeyboardInterrupt
        return hashed(texts)

    for change in ({"texts": [*TEXTS[:1], "new", *TEXTS[2:]]}, {"model": "other"}):
        with pytest.raises(KeyboardInterrupt):
            encode.text_features(IDS, TEXTS, tmp_path, model="m", block=2, encoder=stops)
        seen: list[str] = []
        texts = change.get("texts", TEXTS)
        encode.text_features(
            IDS,
            texts,
            tmp_path,
            model=change.get("model", "m"),
            block=2,
            encoder=lambda t, s=seen: s.extend(t) or hashed(t),
        )
        assert seen == texts


def test_refusals_name_item_and_file(tmp_path):
    (tmp_path / "items.csv").write_text("item,title\na,x\na,y\n")
    with pytest.raises(DataError, match=r"items\.csv: item 'a' is there twice, in rows 1 and 2"):
        encode.read_texts(tmp_path / "items.csv", "title")
    (tmp_path / "items.csv").write_text("item,title\na,x\nb,y\n")
    with pytest.raises(DataError, match=r"items\.csv: no column 'name': found item, title"):
        encode.read_texts(tmp_path / "items.csv", "name")
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"item 'b' has no image \(1 of 2 have none\); expected b\.jpg"):
        encode.image_files(tmp_path, np.array(["a", "b"]))
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"item 'a' has two images, a\.jpg and a\.png"):
        encode.image_files(tmp_path, np.array(["a"]))
    with pytest.raises(DataError, match=r"row 1 \(item 'i3'\), column 0 is nan"):
        encode.text_features(
            IDS, TEXTS, tmp_path, model="m", block=2,
            encoder=lambda t: hashed(t) * (np.nan if TEXTS[3] in t else 1) if TEXTS[3] not in t else np.array([[1, 1], [np.nan, 1]]),
        )  # fmt: skip
    with pytest.raises(DataError, match="dim: expected below"):
        encode.text_features(IDS, TEXTS, tmp_path, dim=6)
    result = CliRunner().invoke(app, ["features", str(tmp_path / "items.csv"), "--out", str(tmp_path)])
    assert result.exit_code == 1 and "name a text column with --text" in " ".join(result.output.split())


@pytest.mark.parametrize(("make", "fix"), [(encode.text_encoder, "text"), (encode.image_encoder, "image")])
def test_a_missing_library_says_what_to_install(monkeypatch, make, fix):
    for name in ("sentence_transformers", "open_clip"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"pip install 'mmkd\[{fix}\]'"):
        make("x/y")


def _or_skip(module: str, extra: str):
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # also one that is there and does not go with this torch
        pytest.skip(f"{module} cannot be imported ({error}): pip install 'mmkd[{extra}]'")


def test_sentence_transformers_with_a_model_made_here(tmp_path):
    _or_skip("sentence_transformers", "text")
    transformers = _or_skip("transformers", "text")
    import torch

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({word for text in TEXTS for word in text.split()})]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path / "model")
    transformers.BertTokenizer(str(tmp_path / "model" / "vocab.txt")).save_pretrained(tmp_path / "model")
    path = encode.text_features(IDS, TEXTS, tmp_path / "out", model=str(tmp_path / "model"), block=4)
    vectors = np.load(path)
    assert vectors.shape == (6, 16) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    alone = encode.text_encoder(str(tmp_path / "model"))([TEXTS[4]])
    np.testing.assert_allclose(vectors[4], alone[0], atol=1e-5)


def test_open_clip_with_weights_made_here(tmp_path):
    open_clip = _or_skip("open_clip", "image")
    import json

    import torch
    from PIL import Image

    shape = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny-clip.json").write_text(json.dumps(shape))
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    torch.manual_seed(0)
    torch.save(open_clip.create_model("tiny-clip").state_dict(), tmp_path / "weights.pt")
    (tmp_path / "images").mkdir()
    for at, one in enumerate(IDS):
        Image.new("RGB", (20, 20), (40 * at, 255 - 40 * at, 30)).save(tmp_path / "images" / f"{one}.png")
    model = f"tiny-clip/{tmp_path / 'weights.pt'}"
    files = encode.image_files(tmp_path / "images", IDS)
    vectors = np.load(encode.image_features(IDS, files, tmp_path / "out", model=model, block=4))
    assert vectors.shape == (6, 12) and np.isfinite(vectors).all()
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(vectors[5], encode.image_encoder(model)(files[5:])[0], atol=1e-5)
    files[0].write_bytes(b"no image")
    with pytest.raises(DataError, match=r"i0\.png: cannot be read as an image"):
        encode.image_features(IDS, files, tmp_path / "again", model=model)
