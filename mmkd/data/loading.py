"""`load`: one door for every format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import splits
from .assemble import assemble
from .atomic import find_inter, read_recbole
from .dataset import Dataset
from .demo import load_demo
from .errors import DataError
from .features import align_features, read_keyed, resolve_features
from .files import refuse_pickle
from .ids import distinct, locate, unify
from .json_lists import find_json_folder, load_json
from .mmrec import is_mmrec, read_mmrec
from .npz import PART_NAMES, find_parts, load_npz
from .pairs import Pairs, k_core, merge_pairs
from .raw import ONE_FILE, RawData
from .synthesis import synthetic
from .table import TABLE_SUFFIXES, RawInteractions, read_interactions

if TYPE_CHECKING:
    from mmkd.config import DataConfig

__all__ = ["FORMATS", "SPLITS", "build", "load", "load_configured", "make_plan"]

FORMATS = ("auto", "npz", "json", "table", "mmrec", "recbole")
SPLITS = ("given", "random", "leave-last-out", "time")


def load(
    path: str | Path | Sequence[str | Path],
    *,
    format: str = "auto",
    split: str | None = None,
    seed: int = 0,
    val_fraction: float = 0.1,
    test_fraction: float = 0.1,
    features: Mapping[str, str | Path] | Sequence[str | Path] | None = None,
    columns: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    min_count: int = 1,
    core: int = 0,
    name: str | None = None,
    **options: Any,
) -> Dataset:
    """Load interactions and item features.

    Args:
        path: a folder, a CSV/TSV/Parquet file, several files (interactions first or by name, ``NAME_feat.*``
            are features), ``"demo"`` (the demo data set) or ``"synthetic"`` (the generator).
        format: "auto", "npz", "json", "table" ("csv" and "parquet" mean "table"), "mmrec" or "recbole".
        split: "given" (default where validation or test files are there), "time" (default where there are
            timestamps), "random" (by user; default otherwise) or "leave-last-out".
        seed: of the random split and the generator.
        val_fraction, test_fraction: shares for "random" and "time"; 0 leaves the part out.
        features: modality -> file, or files; default: the ``*_feat.*`` files beside the interactions; ``{}``
            for none.
        columns: role ("user", "item", "timestamp") -> column name of a table.
        ignore: columns of a table to leave out.
        min_count: keep pairs that occur at least so often (tables); a pair's time is then that of this
            occurrence.
        core: keep only users and items with at least so many pairs, repeatedly (tables); 0 keeps all.
        name: name of the data set; default: the folder or file.
        **options: passed on to `load_demo` or `synthetic`.

    Raises:
        DataError: the data is not what it has to be; the message names file, row or id, expected and found.
        ValueError, TypeError: an argument that does not fit.
    """
    plan = _Plan(split, seed, val_fraction, test_fraction, min_count, core)
    if not isinstance(path, (str, Path)) and len(path) == 1:
        path = path[0]
    if path in ("demo", "synthetic"):
        _refuse_given(str(path), format=format != "auto", features=features, columns=columns, ignore=ignore)
        return (_demo if path == "demo" else _synthetic)(plan, name, options)
    if options:
        raise TypeError(
            f"load() got an unknown argument {next(iter(options))!r}; the extra ones are for 'demo' and 'synthetic'"
        )
    paths = [Path(path)] if isinstance(path, (str, Path)) else [Path(one) for one in path]
    if not paths:
        raise ValueError("path is empty; expected a folder, a file, 'demo' or 'synthetic'")
    for one in paths:
        _refuse_missing(one)
    kind = _detect(paths[0], format)
    if kind == "table":
        return _load_table(paths, plan, features, columns, ignore, name)
    if kind in ("mmrec", "recbole"):
        if len(paths) > 1:
            raise ValueError(f"{paths[1]}: the {kind} format is one folder; got {len(paths)} paths")
        _refuse_given(f"the {kind} format", columns=columns, ignore=ignore)
        return build((read_mmrec if kind == "mmrec" else read_recbole)(paths[0], features), plan, name)
    if len(paths) > 1:
        raise ValueError(f"{paths[1]}: the {kind} format is one folder; got {len(paths)} paths")
    _refuse_given(f"the {kind} format", columns=columns, ignore=ignore, min_count=min_count > 1, core=core > 1)
    dataset = (load_npz if kind == "npz" else load_json)(_folder(paths[0]), features=features, name=name)
    return dataset if split in (None, "given") else _resplit(dataset, plan)


def load_configured(settings: DataConfig, seed: int, path: str | Path = "") -> Dataset:
    """What the settings `data.*` name, or the same read from `path`.

    Raises:
        DataError: as `load`, and for entries of `data.options` that it does not take.
    """
    try:
        return load(path or settings.path, format=settings.format, split=settings.split, seed=seed, **settings.options)
    except TypeError as error:
        given = ", ".join(map(repr, settings.options))
        raise DataError(
            f"data.options: expected arguments that mmkd.data.load takes here, got {given} ({error})"
        ) from error


@dataclass(frozen=True)
class _Plan:
    """How to split, and what to filter before."""

    split: str | None
    seed: int
    val: float
    test: float
    min_count: int
    core: int

    def __post_init__(self) -> None:
        if self.split is not None and self.split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {self.split!r}")
        splits.check_fractions(self.val, self.test)
        if self.min_count < 1 or self.core < 0:
            raise ValueError(f"expected min_count >= 1 and core >= 0, got {self.min_count} and {self.core}")


def make_plan(
    split: str | None = None,
    seed: int = 0,
    val_fraction: float = 0.1,
    test_fraction: float = 0.1,
    min_count: int = 1,
    core: int = 0,
) -> _Plan:
    """How to split and filter, from the arguments of `load`."""
    return _Plan(split, seed, val_fraction, test_fraction, min_count, core)


def _refuse_given(what: str, **arguments: Any) -> None:
    """Refuse arguments that would have no effect; nothing is dropped silently."""
    for name, value in arguments.items():
        if value:
            raise ValueError(f"{name} has no effect on {what}; leave it out")


def _demo(plan: _Plan, name: str | None, options: dict[str, Any]) -> Dataset:
    if plan.split not in (None, "time"):
        raise ValueError(f"the demo data set is split by time, got split={plan.split!r}")
    filters = {"min_count": plan.min_count} if plan.min_count > 1 else {}
    if plan.core:
        filters["core"] = plan.core
    dataset = load_demo(val_fraction=plan.val, test_fraction=plan.test, **filters, **options)
    return dataset if name is None else replace(dataset, name=name)


def _synthetic(plan: _Plan, name: str | None, options: dict[str, Any]) -> Dataset:
    if plan.split not in (None, "random"):
        raise ValueError(f"the synthetic data set is split at random by user, got split={plan.split!r}")
    _refuse_given("the synthetic data set", min_count=plan.min_count > 1, core=plan.core > 1)
    dataset = synthetic(seed=plan.seed, val_fraction=plan.val, test_fraction=plan.test, **options)
    return dataset if name is None else replace(dataset, name=name)


def _refuse_missing(path: Path) -> None:
    if not path.exists():
        raise DataError(
            f"{path}: no such file or folder; expected a data folder, a CSV or Parquet file, 'demo' or 'synthetic'"
        )
    if path.is_file():
        refuse_pickle(path)


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _detect(path: Path, format: str) -> str:
    wanted = {"csv": "table", "parquet": "table"}.get(format, format)
    if wanted not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if wanted != "auto":
        return wanted
    if path.is_file():
        kinds = {".npz": "npz", ".json": "json"} | dict.fromkeys(TABLE_SUFFIXES, "table")
        kinds[".inter"] = "mmrec" if path.suffix.lower() == ".inter" and is_mmrec(path) else "recbole"
        kind = kinds.get(path.suffix.lower())
        if kind is None:
            raise DataError(f"{path}: expected a file ending in {', '.join(kinds)}, found {path.suffix!r}")
        return kind
    found = [
        kind
        for kind, there in (
            ("npz", bool(find_parts(path, (".npz",)))),
            ("json", find_json_folder(path) is not None),
            ("table", bool(_table_files(path))),
            *_inter_kinds(path),
        )
        if there
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{path}: holds the formats {' and '.join(found)}; name one with format=")
    for inside in sorted(entry for entry in path.iterdir() if entry.is_file()):
        refuse_pickle(inside)
    raise DataError(
        f"{path}: expected train.npz, train.json, train.csv, interactions.csv (or .tsv, .parquet) or NAME.inter, found "
        + (", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "an empty folder")
    )


def _inter_kinds(folder: Path) -> list[tuple[str, bool]]:
    files = find_inter(folder)
    if not files:
        return []
    mmrec = is_mmrec(next(iter(files.values())))
    return [("mmrec", mmrec), ("recbole", not mmrec)]


def _table_files(folder: Path) -> dict[str, Path]:
    parts = find_parts(folder, TABLE_SUFFIXES)
    single = [folder / (ONE_FILE + suffix) for suffix in TABLE_SUFFIXES]
    single = [path for path in single if path.is_file()]
    if len(single) + bool(parts) > 1:
        names = [path.name for path in (*single, *parts.values())]
        raise DataError(f"{folder}: expected one {ONE_FILE} file or train/val/test files, found {', '.join(names)}")
    return {ONE_FILE: single[0]} if single else parts


def _sort_files(paths: Sequence[Path]) -> tuple[dict[str, Path], list[Path]]:
    """Interaction files by part, and the feature files named beside them."""
    if paths[0].is_dir():
        return _table_files(paths[0]), [Path(path) for path in paths[1:]]
    feature_files = [path for path in paths[1:] if path.stem.endswith(("_feat", "_features"))]
    tables = [path for path in paths if path not in feature_files]
    if len(tables) == 1:
        return {ONE_FILE: tables[0]}, feature_files
    parts = {part: path for path in tables for part, names in PART_NAMES.items() if path.stem in names}
    if len(parts) != len(tables) or "train" not in parts:
        raise DataError(
            f"{', '.join(path.name for path in tables)}: several interaction files must be named train, val "
            "and test; "
            "feature files NAME_feat"
        )
    return parts, feature_files


def _load_table(
    paths: Sequence[Path],
    plan: _Plan,
    features: Mapping[str, str | Path] | Sequence[str | Path] | None,
    columns: Mapping[str, str] | None,
    ignore: Sequence[str],
    name: str | None,
) -> Dataset:
    files, feature_files = _sort_files(paths)
    if "train" not in files and ONE_FILE not in files:
        found = ", ".join(path.name for path in files.values()) or "none"
        raise DataError(f"{paths[0]}: expected a train file or {ONE_FILE}.csv, found {found}")
    if feature_files and features is not None:
        raise ValueError("feature files are named both in path and in features; name them once")
    raw = {part: read_interactions(path, columns, ignore) for part, path in files.items()}
    feature_paths = resolve_features(feature_files or features, _folder(paths[0]))
    item_column = (columns or {}).get("item")
    keyed = {modality: read_keyed(path, item_column) for modality, path in feature_paths.items()}
    label = name or (paths[0].resolve().name if paths[0].is_dir() else paths[0].stem)
    described = " and ".join(path.name for path in files.values())
    return build(RawData(label, str(paths[0]), described, raw, keyed, feature_paths), plan)


def build(data: RawData, plan: _Plan, name: str | None = None) -> Dataset:
    """Rows with original ids to a `Dataset`: internal ids, filters, split, features in the order of the items."""
    raw, keyed, source = data.parts, data.features, data.source
    users, items = (unify(*(getattr(one, what) for one in raw.values())) for what in ("users", "items"))
    user_ids = distinct(np.concatenate(users))
    item_ids = _universe(np.concatenate(items), keyed, plan.core)
    rows = {
        part: RawInteractions(locate(user_ids, users[index]), locate(item_ids, items[index]), one.times)
        for index, (part, one) in enumerate(raw.items())
    }
    if ONE_FILE in rows or plan.split not in (None, "given"):
        pairs, filtered = _merge_and_filter(rows, plan, source)
        user_ids = user_ids[np.unique(pairs.users)]
        item_ids = item_ids[np.unique(pairs.items)] if plan.core > 1 else item_ids
        pairs = _renumber(pairs, plan.core > 1)
        parts, note = _split(pairs, plan, source)
        notes = (note, *filtered, *data.notes)
    else:
        if plan.core > 1 or plan.min_count > 1:
            raise ValueError("core and min_count change what is split; give a split other than 'given'")
        parts, notes = {part: (one.users, one.items) for part, one in rows.items()}, ("split: given", *data.notes)
    arrays = align_features(keyed, item_ids, data.feature_paths, data.described)
    item_names = None if data.names is None else _names_of(data.names, item_ids)
    return assemble(
        name or data.name, parts, user_ids, item_ids, arrays, item_names=item_names, source=source, notes=notes
    )


def _names_of(names: tuple[np.ndarray, np.ndarray], item_ids: np.ndarray) -> np.ndarray:
    ids, texts = names
    rows = locate(ids, item_ids)
    return np.where(rows >= 0, texts[rows], "") if len(texts) else np.full(len(item_ids), "")


def _universe(items: np.ndarray, keyed: Mapping[str, tuple[np.ndarray, np.ndarray]], core: int) -> np.ndarray:
    """Sorted ids of the items interacted with and, unless a core is asked for, of those every modality
    describes."""
    if not keyed or core > 1:
        return distinct(items)
    items, *described = unify(items, *(ids for ids, _ in keyed.values()))
    common = described[0]
    for ids in described[1:]:
        common = np.intersect1d(common, ids)
    return distinct(np.concatenate([items, common]))


def _merge_and_filter(rows: Mapping[str, RawInteractions], plan: _Plan, source: str) -> tuple[Pairs, tuple[str, ...]]:
    users = np.concatenate([one.users for one in rows.values()])
    items = np.concatenate([one.items for one in rows.values()])
    known = [one.times for one in rows.values() if one.times is not None]
    pairs = merge_pairs(users, items, np.concatenate(known) if len(known) == len(rows) else None, plan.min_count)
    merged = len(pairs.users) != len(users)
    notes = (f"{len(users)} rows are {len(pairs.users)} pairs (min_count={plan.min_count})",) if merged else ()
    pairs = pairs.select(k_core(pairs.users, pairs.items, plan.core))
    if not len(pairs.users):
        raise DataError(
            f"{source}: the train set is empty: no pair is left after min_count={plan.min_count} and "
            f"core={plan.core}; expected smaller values"
        )
    return pairs, notes


def _renumber(pairs: Pairs, items_too: bool) -> Pairs:
    """Internal ids without gaps; items keep theirs unless a core was taken (some are only described)."""
    users = np.unique(pairs.users, return_inverse=True)[1]
    return Pairs(users, np.unique(pairs.items, return_inverse=True)[1] if items_too else pairs.items, pairs.times)


def _split(pairs: Pairs, plan: _Plan, source: str) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], str]:
    """Pairs by part, and a sentence that says how they were split."""
    kind = plan.split or ("random" if pairs.times is None else "time")
    if kind == "given":
        raise DataError(f"{source}: split='given' needs train and val or test files, found one file")
    if kind == "random":
        labels = splits.random_by_user(pairs.users, pairs.items, val=plan.val, test=plan.test, seed=plan.seed)
        note = f"split: random by user, val {plan.val:g}, test {plan.test:g}, seed {plan.seed}"
        return splits.by_label(pairs.users, pairs.items, labels, plan.val > 0, plan.test > 0), note
    if pairs.times is None:
        raise DataError(f"{source}: split={kind!r} needs a timestamp column, found none; use split='random'")
    if kind == "leave-last-out":
        labels = splits.leave_last_out(pairs.users, pairs.items, pairs.times)
        return splits.by_label(pairs.users, pairs.items, labels), "split: leave last out by time"
    labels, cuts = splits.time_cut(pairs.times, val=plan.val, test=plan.test)
    moments = " and ".join(str(cut) for cut in cuts if cut is not None) or "no moment"
    note = f"split: global time cut at {moments} (val {plan.val:g}, test {plan.test:g})"
    return splits.by_label(pairs.users, pairs.items, labels, plan.val > 0, plan.test > 0), note


def _resplit(dataset: Dataset, plan: _Plan) -> Dataset:
    """Split the union of a given data set's parts anew."""
    parts = [matrix.tocoo() for matrix in (dataset.train, dataset.val, dataset.test) if matrix is not None]
    pairs = merge_pairs(np.concatenate([part.row for part in parts]), np.concatenate([part.col for part in parts]))
    labelled, note = _split(pairs, plan, dataset.name)
    return assemble(dataset.name, labelled, dataset.user_ids, dataset.item_ids, dataset.features, notes=(note,))
