"""Item features made from text and images: `NAME_feat.npy` and `NAME_ids.npy`, a block at a time, so a stop loses little."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmkd.files import make_folder, write_atomic, write_json

from .errors import DataError
from .features import check_features
from .files import open_npy
from .ids import first_duplicate
from .table import ITEM_NAMES, read_columns

__all__ = [
    "TFIDF",
    "image_encoder",
    "image_features",
    "image_files",
    "read_image",
    "read_texts",
    "text_encoder",
    "text_features",
]

TFIDF = "tfidf"
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
Encoder = Callable[[Sequence[Any]], np.ndarray]
Progress = Callable[[int, int], None]


def read_texts(path: str | Path, column: str | None = None) -> tuple[np.ndarray, list[str] | None]:
    """Item ids of a CSV, TSV or Parquet file (column `item` or `item_id`), and the texts of `column` if one is named.

    Raises:
        DataError: no such column, an id that is empty or there twice, or what `read_columns` refuses.
    """
    path = Path(path)
    table = read_columns(path)
    key = next((name for name in ITEM_NAMES if name in table.names), None)
    if key is None:
        raise DataError(f"{path}: expected an item id column named item or item_id, found {', '.join(table.names)}")
    ids = table.ids(key)
    twice = first_duplicate(ids)
    if twice is not None:
        raise DataError(
            f"{path}: item {ids[twice[0]].item()!r} is there twice, in rows {twice[0] + 1} and {twice[1] + 1}"
        )
    if column is None:
        return ids, None
    if column not in table.names:
        raise DataError(f"{path}: no column {column!r}: found {', '.join(table.names)}")
    values = table.columns[column]
    return ids, ["" if value is None or value != value else str(value) for value in values]


def image_files(folder: str | Path, ids: np.ndarray) -> list[Path]:
    """The image of every item: the file of `folder` whose name without ending is the item's id.

    Raises:
        DataError: an item without an image, or with two.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of images")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in IMAGES:
            if path.stem in found:
                raise DataError(f"{folder}: item {path.stem!r} has two images, {found[path.stem].name} and {path.name}")
            found[path.stem] = path
    missing = [one for one in ids.tolist() if str(one) not in found]
    if missing:
        raise DataError(
            f"{folder}: item {missing[0]!r} has no image ({len(missing)} of {len(ids)} have none); expected "
            f"{missing[0]}.jpg (or {', '.join(IMAGES[1:])}), found {len(found)} images"
        )
    return [found[str(one)] for one in ids.tolist()]


def text_features(
    ids: np.ndarray, texts: Sequence[str], out: str | Path, *, model: str = TFIDF, dim: int = 256, name: str = "text",
    block: int = 256, progress: Progress | None = None, encoder: Encoder | None = None,
) -> Path:  # fmt: skip
    """Vectors of texts, float32 `[I, d]`, rows of unit length; written to `out/NAME_feat.npy` with `NAME_ids.npy`.

    Args:
        model: "tfidf" (TF-IDF of words, SVD to `dim`, needs scikit-learn), or a sentence-transformers model: name or folder.
        encoder: instead of `model`: texts -> `[n, d]`.
        block: texts encoded, and saved, at once. progress: called with (done, all) after each block.

    A run that was stopped goes on where it was if texts, ids, model and block are the same.

    Raises:
        ImportError: the library is not installed. DataError: vectors of different width or not finite.
    """
    if model == TFIDF and encoder is None:
        array = _tfidf(texts, dim)
        if progress:
            progress(len(texts), len(texts))
        return _write(Path(out), name, ids, array)
    return _encode(ids, list(texts), Path(out), name, model, encoder or text_encoder(model), block, progress)


def image_features(
    ids: np.ndarray, files: Sequence[Path], out: str | Path, *, model: str, name: str = "image", block: int = 64,
    progress: Progress | None = None, encoder: Encoder | None = None,
) -> Path:  # fmt: skip
    """Vectors of images by an open_clip model (`NAME/PRETRAINED`, the latter a tag or a weights file); else as `text_features`."""
    return _encode(ids, list(files), Path(out), name, model, encoder or image_encoder(model), block, progress)


def text_encoder(model: str) -> Encoder:
    """A sentence-transformers model (name or folder) as texts -> float32 `[n, d]`, rows of unit length."""
    try:
        from sentence_transformers import SentenceTransformer
    except (ImportError, RuntimeError) as error:
        raise ImportError(f"text models need sentence-transformers: pip install 'mmkd[text]' ({error})") from error
    loaded = SentenceTransformer(model)

    def encode(texts: Sequence[str]) -> np.ndarray:
        return loaded.encode(list(texts), normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False)

    return encode


def image_encoder(model: str) -> Encoder:
    """An open_clip model `NAME/PRETRAINED` as image files -> float32 `[n, d]`, rows of unit length."""
    try:
        import open_clip
        import torch
    except (ImportError, RuntimeError) as error:  # a torchvision built for another torch raises the latter
        raise ImportError(f"image models need open_clip: pip install 'mmkd[image]' ({error})") from error
    name, slash, pretrained = model.partition("/")
    if not slash:
        raise DataError(
            f"image model {model!r}: expected NAME/PRETRAINED, e.g. ViT-B-32/laion2b_s34b_b79k or ViT-B-32/file.pt"
        )
    loaded, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=pretrained)
    loaded.eval()

    def encode(files: Sequence[Path]) -> np.ndarray:
        with torch.no_grad():
            vectors = loaded.encode_image(torch.stack([preprocess(read_image(path)) for path in files])).float()
        return torch.nn.functional.normalize(vectors, dim=1).numpy()

    return encode


def read_image(path: Path):
    """An image file as RGB (`PIL.Image.Image`), of at most 89 million pixels (`PIL.Image.MAX_IMAGE_PIXELS`).

    Raises:
        DataError: no image, a damaged one, or one of more pixels.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return image.convert("RGB")
    except Exception as error:  # whatever the decoders say of a broken file
        raise DataError(f"{path}: cannot be read as an image ({type(error).__name__}: {error})") from error


def _tfidf(texts: Sequence[str], dim: int) -> np.ndarray:
    try:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise ImportError("TF-IDF needs scikit-learn: pip install 'mmkd[demo]'") from error
    try:
        weights = TfidfVectorizer(sublinear_tf=True, min_df=2 if len(texts) >= 1000 else 1).fit_transform(texts)
    except ValueError as error:
        raise DataError(f"text: no word to make features of ({error})") from None
    if dim >= min(weights.shape):
        raise DataError(f"dim: expected below the number of words and of items, {min(weights.shape)}, got {dim}")
    array = TruncatedSVD(dim, algorithm="randomized", n_iter=7, random_state=0).fit_transform(weights)
    length = np.linalg.norm(array, axis=1, keepdims=True)
    return (array / np.maximum(length, 1e-12)).astype(np.float32)


def _encode(
    ids: np.ndarray, things: list, out: Path, name: str, model: str, encoder: Encoder, block: int, progress: Progress | None
) -> Path:  # fmt: skip
    if len(ids) != len(things):
        raise DataError(f"{name}: {len(ids)} item ids and {len(things)} things to encode; expected as many of each")
    partial = out / f".{name}_feat.partial"
    _start(partial, {"model": model, "block": block, "items": len(ids), "content": _digest(ids, things)})
    files = []
    for start in range(0, len(things), block):
        path, some = partial / f"{start:09d}.npy", things[start : start + block]
        files.append(path)
        if not _is_block(path, len(some)):
            rows = np.asarray(encoder(some), np.float32)
            if rows.ndim != 2 or len(rows) != len(some):
                raise DataError(f"model {model}: expected one vector for each item, got shape {rows.shape}")
            check_features(rows, Path(f"{name} of items {start} ..."), ids[start : start + block])
            write_atomic(path, lambda temporary, rows=rows: np.save(temporary, rows))
        if progress:
            progress(min(start + block, len(things)), len(things))
    blocks = [open_npy(path) for path in files]
    widths = {array.shape[1] for array in blocks}
    if len(widths) != 1:
        raise DataError(f"model {model}: expected vectors of one width, got {sorted(widths)}")
    written = _write(out, name, ids, np.concatenate(blocks))
    shutil.rmtree(partial)
    return written


def _is_block(path: Path, rows: int) -> bool:
    """Whether a stopped run left a whole block there; a damaged one is made again."""
    try:
        array = open_npy(path)
    except DataError:
        return False
    return array.ndim == 2 and array.dtype == np.float32 and len(array) == rows and bool(np.isfinite(array).all())


def _start(partial: Path, plan: dict[str, Any]) -> None:
    """Keeps the blocks of a stopped run of the same plan; those of another plan are removed."""
    about = partial / "plan.json"
    try:
        same = json.loads(about.read_text(encoding="utf-8")) == plan
    except (OSError, ValueError, RecursionError):
        same = False
    if not same:
        shutil.rmtree(partial, ignore_errors=True)
        make_folder(partial)
        write_json(about, plan)


def _digest(ids: np.ndarray, things: list) -> str:
    digest = hashlib.sha256()
    for one, thing in zip(ids.tolist(), things, strict=True):
        if isinstance(thing, Path):
            status = thing.stat()
            thing = f"{thing.name} {status.st_size} {status.st_mtime_ns}"
        for text in (str(one), str(thing)):
            raw = text.encode()
            digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()


def _write(out: Path, name: str, ids: np.ndarray, array: np.ndarray) -> Path:
    make_folder(out)
    write_atomic(out / f"{name}_ids.npy", lambda temporary: np.save(temporary, ids))
    return write_atomic(out / f"{name}_feat.npy", lambda temporary: np.save(temporary, array))
