"""Incremental learning: a finished run's student takes in new interactions, users and items (paper, section 7.3.1)."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from mmkd import ops
from mmkd.config import Config, ConfigError, UpdateConfig, load_config
from mmkd.data.joining import Joined, join
from mmkd.data.npz import write_npz
from mmkd.data.sampling import Batch, Sampler
from mmkd.data.table import read_interactions
from mmkd.evaluation import evaluate, metrics
from mmkd.evaluation.evaluator import as_exclude, relevant_items, seen_items
from mmkd.files import write_text
from mmkd.models.lightgcn import LightGCN
from mmkd.reference.sampling import below, philox4x32
from mmkd.serving.recommend import Recommender, load, load_layer0
from mmkd.training.run_folder import RunError, RunFolder
from mmkd.training.stage import Stage, StageResult
from mmkd.training.stop import Stop
from mmkd.training.summary import Row, markdown_table, plot_curves
from mmkd.training.tasks import LightGCNTask
from mmkd.training.trainer import RunResult, pick_device, save_student

log = logging.getLogger("mmkd")

FRESH = 1  # second counter word of the draws that replace positives (mmkd.data.sampling uses 0 and >= 2^31)
MAY_CHANGE = (
    "log", "profile", "update", "evaluation", "seed", "device", "cuda_graphs", "threads", "progress", "checkpoint_every",
)  # fmt: skip


def update(
    run: str | Path,
    new: str | Path,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    overrides: Sequence[str] = (),
    columns: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    stop: Stop | None = None,
) -> RunResult:
    """Fine-tunes the student of a finished run on new interactions and leaves a new run folder; the old one is only read.

    The graph becomes everything the run has seen plus the new pairs that teach. New users and items get the mean of their
    neighbours' layer-0 rows. Then BPR over the users of the new pairs, from the old layer-0 table. Item features and the
    teacher take no part. Validation and test are new pairs: weights are chosen on validation, test is read once, at the end.

    Args:
        run: a finished run folder, of `train` or of an earlier `update`.
        new: CSV, TSV or Parquet with columns user, item[, timestamp]; original ids. Pairs the run knows are left out.
        out: the new run folder, `runs/<data>-update-<time>` by default.
        resume: go on with an interrupted update in `out`.
        overrides: `["update.lr=1e-4", ...]`: settings of `update.*`, `evaluation.*`, `seed`, `device`, `threads`, `progress`.
        columns: role ("user", "item", "timestamp") -> column name, where the file names them otherwise.
        ignore: columns of the file to leave out.
        stop: asks the update to stop after the step at hand, as in :func:`mmkd.train`.

    Returns:
        RunResult with three rows: the old student as it was (unknown users score 0, unknown items are never recommended),
        new rows without fine-tuning, and the fine-tuned student.

    Raises:
        DataError, ConfigError, RunLoadError, RunError, CheckpointError, TrainingError: with the file, row, setting or term.
    """
    run, new = Path(run), Path(new)
    old = load(run)
    settings = _settings(run, overrides)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    start = time.perf_counter()
    u, source = settings.update, RunFolder(run).info()["data"]["name"]
    joined = join(
        source, old.seen, old.user_ids, old.item_ids, read_interactions(new, columns, ignore), new,
        val_fraction=u.val_fraction, test_fraction=u.test_fraction, seed=settings.seed, item_names=old.item_names,
    )  # fmt: skip
    layer0 = load_layer0(run, old)
    folder = _start(run, new, out, settings, joined, resume)
    with folder.held():
        write_npz(joined.dataset, folder.path / "data")
        return _Update(settings, joined, folder, old, layer0, stop or Stop()).run(time.perf_counter() - start)


def _settings(run: Path, overrides: Sequence[str]) -> Config:
    before, settings = load_config(run / "config.yaml"), load_config(run / "config.yaml", overrides)
    changed = [
        name
        for name in Config.model_fields
        if name not in MAY_CHANGE and getattr(before, name) != getattr(settings, name)
    ]
    if changed:
        raise ConfigError(
            f"setting '{changed[0]}' belongs to the run and cannot change in an update; what can: {', '.join(MAY_CHANGE)}"
        )
    if settings.update.val_fraction == 0 and settings.evaluation.select == "best":
        log.info("update.val_fraction=0: nothing to choose by, the last epoch's weights are kept")
        settings.evaluation.select = "last"
    return settings


def _start(run: Path, new: Path, out: str | Path | None, settings: Config, joined: Joined, resume: bool) -> RunFolder:
    path = Path(out or Path("runs") / f"{joined.dataset.name}-update-{time.strftime('%Y%m%d-%H%M%S')}")
    if path.resolve() == run.resolve():
        raise RunError(f"out: {path} is the run that is updated, which stays as it was; name another folder")
    settings.data = settings.data.model_validate(
        {
            "path": str((path / "data").resolve()),
            "format": "npz",
            "options": {"features": {}, "name": joined.dataset.name},
        }
    )
    folder = RunFolder.start(path, settings, joined.dataset, resume)
    parent = {"path": str(run.resolve()), "student": _sha256(run / "student.safetensors")}
    known = folder.info().get("parent", parent)
    if known["student"] != parent["student"]:
        raise RunError(f"run folder {path} was started from other weights than those in {run} now; use another --out")
    folder.update_info(parent=parent, new={"file": str(new.resolve()), "sha256": _sha256(new)})
    return folder


def _sha256(path: Path) -> str:
    return hashlib.sha256(np.memmap(path, mode="r")).hexdigest()


def extend_table(users: Tensor, items: Tensor, interactions: sp.csr_matrix) -> Tensor:
    """Layer-0 table `[N, d]` of a grown graph: old rows as they are, new rows the mean of their neighbours' rows.

    Neighbours that are new themselves count once they have a row, in rounds; a node that nothing known leads to gets the
    mean of all old rows of its kind.

    Args:
        users, items: old rows `[U0, d]`, `[I0, d]`, the first of their kind.
        interactions: `U x I`, `U >= U0`, `I >= I0`.
    """
    matrices = (interactions, interactions.T.tocsr())
    tables, known = [], []
    for old, size in zip((users, items), interactions.shape, strict=True):
        table = old.double().mean(0).numpy() * np.ones((size, 1))
        table[: len(old)] = old.numpy()
        tables.append(table)
        known.append(np.arange(size) < len(old))
    while True:
        found = []
        for side, matrix in enumerate(matrices):
            rows = np.flatnonzero(~known[side])
            part = matrix[rows].multiply(known[1 - side]).tocsr()  # pairs with a neighbour that has a row
            count = np.asarray(part.sum(1)).ravel()
            found.append((rows[count > 0], (part[count > 0] @ tables[1 - side]) / count[count > 0, None]))
        if not any(len(rows) for rows, _ in found):
            return torch.from_numpy(np.concatenate(tables)).to(users.dtype)
        for side, (rows, means) in enumerate(found):
            tables[side][rows], known[side][rows] = means, True


class FreshSampler:
    """Batches for an update: users with new train pairs, a positive that is new with probability `new_share`.

    The other positives come from all of the user's train items, old ones too, so that what was learned stays; negatives
    are uniform over items the user has not interacted with in train.

    Args:
        train: `U x I`, all train interactions.
        fresh: `U x I`, those that are new; at least one.
        batch_size, new_share, seed: as in :class:`mmkd.config.UpdateConfig`.
    """

    def __init__(
        self, train: sp.csr_matrix, fresh: sp.csr_matrix, batch_size: int, new_share: float, seed: int
    ) -> None:
        concerned = np.diff(fresh.indptr) > 0
        rows = sp.csr_matrix(sp.diags(concerned.astype(np.float32)) @ train)
        rows.eliminate_zeros()
        rows.sort_indices()
        self.sampler = Sampler(rows, 1, batch_size, seed)
        self.num_steps = -(-fresh.nnz // batch_size)
        self._share = round(new_share * 2**32)
        self._rowptr, self._col = fresh.indptr.astype(np.int64), fresh.indices.astype(np.int64)

    def batch(self, epoch: int, step: int) -> Batch:
        """The batch of `step` in `epoch`: the same for every call."""
        batch, seed = self.sampler.batch(epoch, step), self.sampler.seed
        words = philox4x32((np.arange(len(batch.users)), FRESH, step, epoch), (seed & 0xFFFFFFFF, seed >> 32))
        first, degree = self._rowptr[batch.users], np.diff(self._rowptr)[batch.users]
        fresh = self._col[first + below(words[0], degree)]
        batch.candidates[:, 0] = np.where(words[1] < self._share, fresh, batch.pos)
        return batch


class UpdateTask(LightGCNTask):
    """`L = BPR + L2` (spec section 4) over the users of the new interactions."""

    def __init__(self, model: LightGCN, settings: UpdateConfig, joined: Joined, seed: int) -> None:
        sampler = FreshSampler(joined.dataset.train, joined.fresh, settings.batch_size, settings.new_share, seed + 3)
        super().__init__(model, settings, joined.dataset, model.graph, seed, "update", sampler)


def evaluate_known(old: Recommender, joined: Joined, part: str, ks: Sequence[int]) -> dict[str, float]:
    """:func:`mmkd.evaluation.evaluate` of a student that knows only the first users and items of the joined data set.

    Items it does not know are never ranked; a user it does not know counts with 0 in every metric.
    """
    relevant, known = relevant_items(joined.dataset, part), joined.known_users
    users = np.flatnonzero(np.diff(relevant.indptr))
    ranked = np.full((len(users), max(ks)), -1, np.int64)
    exclude = as_exclude(sp.csr_matrix(seen_items(joined.dataset, part)[:known, : joined.known_items]))
    k = min(max(ks), joined.known_items)
    ids = ops.topk(old.user_emb, old.item_emb, k, users=torch.from_numpy(users[users < known]), exclude=exclude)[1]
    ranked[users < known, :k] = ids.numpy()
    return metrics.mean(metrics.per_user(ranked, relevant[users], ks))


class _Update:
    def __init__(
        self, settings: Config, joined: Joined, folder: RunFolder, old: Recommender, layer0: tuple[Tensor, Tensor],
        stop: Stop,
    ) -> None:  # fmt: skip
        self.settings, self.joined, self.folder, self.old = settings, joined, folder, old
        self.dataset, self.layer0, self.stop = joined.dataset, layer0, stop
        self.device = pick_device(settings.device)
        self.ks = sorted({20, *settings.evaluation.ks})

    def run(self, seconds: float) -> RunResult:
        """The update; `seconds` went into reading and joining."""
        start = time.perf_counter()
        self.folder.write_ids(self.dataset, everything=True)
        table = extend_table(*self.layer0, self.dataset.train)
        model = LightGCN(self.dataset.graph().to(self.device), table, self.settings.student.layers).to(self.device)
        joining = seconds + time.perf_counter() - start
        untouched = model.tables()
        result = self._fine_tune(model)
        tables = model.tables()
        save_student(self.folder, tables, model.table)
        return self._report(untouched, tables, joining, result)

    def _fine_tune(self, model: LightGCN) -> StageResult:
        task = UpdateTask(model, self.settings.update, self.joined, self.settings.seed)
        steps = task.sampler.num_steps
        return Stage(task, self.settings.update, self.settings, self.dataset, self.folder, steps, self.stop).run()

    def _report(self, untouched: tuple, tables: tuple, joining: float, result: StageResult) -> RunResult:
        # The only place where the test part is read.
        part = "test" if self.dataset.test is not None else "val" if self.dataset.val is not None else "none"
        rows, inference = [], 0.0
        size = sum(t.numel() for t in self.layer0)
        new_size = sum(t.numel() for t in tables)
        for name, count, seconds, score in (
            ("old student as it was", size, 0.0, lambda: evaluate_known(self.old, self.joined, part, self.ks)),
            ("new rows, not fine-tuned", new_size, joining, lambda: evaluate(*untouched, self.dataset, part, self.ks)),
            ("fine-tuned", new_size, joining + result.seconds, lambda: evaluate(*tables, self.dataset, part, self.ks)),
        ):
            start = time.perf_counter()
            rows.append(Row(name, score() if part != "none" else {}, count, seconds))
            inference = time.perf_counter() - start
        text = self._text(markdown_table(rows, part), joining, result, inference if part != "none" else None)
        write_text(self.folder.path / "summary.md", f"# {self.dataset.name}, updated\n\n{text}\n")
        plot_curves(self.folder, self.settings)
        results = {row.method: row.metrics for row in rows}
        self.folder.update_info(
            part=part, results=results, finished=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            seconds={"joining": joining, "fine-tuning": result.seconds, "evaluation": inference},
        )  # fmt: skip
        return RunResult(self.folder.path, results, part, text)

    def _text(self, table: str, joining: float, result: StageResult, inference: float | None) -> str:
        j, d = self.joined, self.dataset
        held = {part: m.nnz for part in ("val", "test") if (m := getattr(d, part)) is not None}
        lines = [
            f"{j.pairs:,} new interactions ({j.repeated:,} more were known), {d.num_users - j.known_users:,} new users, "
            f"{d.num_items - j.known_items:,} new items; {j.fresh.nnz:,} of them train"
            + "".join(f", {count:,} {part}" for part, count in held.items())
            + f" ({d.notes[0]}).",
            f"Epoch {result.best_epoch} of {result.epochs} is kept"
            + (
                f", validation {self.settings.evaluation.metric} {result.best_metric:.4f}"
                if result.best_metric is not None
                else ""
            )
            + f". Joining {joining:.2f} s, fine-tuning {result.seconds:.2f} s"
            + ("." if inference is None else f", ranking for the held-out users {inference:.2f} s."),
        ]
        return "\n\n".join((table, *lines))
