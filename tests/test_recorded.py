"""Recorded steps: what is played back is what would have been made. `graph_emulator.py` stands in for CUDA graphs where there
is no GPU; with one, graphs themselves."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mmkd
from mmkd.config import Config
from mmkd.data import synthetic
from mmkd.models import lightgcn
from mmkd.models.features import FeatureTable
from mmkd.models.lightgcn import LightGCN, initial_table
from mmkd.models.prompt import Prompt
from mmkd.models.teacher import Teacher
from mmkd.training import recorded, stage
from mmkd.training.checkpoint import restore_training, training_tensors
from mmkd.training.collapse import FrozenTeacher
from mmkd.training.recorded import Inputs, RandomBytes, RecordedSteps, Steps, parts, rebuilt, size_of, steps_of
from mmkd.training.tasks import LightGCNTask, StudentTask, TeacherBatch, TeacherTask
from tests.graph_emulator import Recorder

CPU, HAS_GPU = torch.device("cpu"), torch.cuda.is_available()
OTHER = 2  # of three steps, the one whose batch is of another size
KINDS = ("lightgcn", "teacher", "student")


@pytest.fixture(scope="module")
def dataset():
    return synthetic(120, 90, 2500, seed=3)


def config(**changes) -> Config:
    settings = {"batch_size": 256, "layers": 2, **changes}
    return Config.model_validate({"dim": 16, **dict.fromkeys(("teacher", "student", "lightgcn"), settings)})


def make(kind: str, dataset, device: str = "cpu", **changes):
    c, graph = config(**changes), dataset.graph().to(device)
    table = initial_table(graph.num_nodes, c.dim, "normal", torch.Generator().manual_seed(1))
    if kind == "lightgcn":
        return LightGCNTask(LightGCN(graph, table, 2).to(device), c.lightgcn, dataset, graph, 0)
    features = [FeatureTable(name, x).to(device) for name, x in dataset.features.items()]
    basis = torch.randn(dataset.num_items, c.dim, generator=torch.Generator().manual_seed(2))
    prompt = Prompt(basis, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(4)
    teacher = Teacher(graph, features, prompt, layers=2, generator=generator).to(device)
    if kind == "teacher":
        return TeacherTask(teacher, c, dataset, graph)
    weights = torch.full((len(features),), 0.5, device=device)
    return StudentTask(LightGCN(graph, table, 2).to(device), FrozenTeacher(teacher), c, dataset, graph, weights)


@pytest.fixture(autouse=True)
def gradients_of_torch(monkeypatch):
    """As on a GPU, where no table holds its gradient back."""
    monkeypatch.setattr(lightgcn, "can_hold", lambda table, compute: False)


def sized(task, dataset):
    """The task, with batches as a GPU gets them."""
    draw = task._batch

    def batch(epoch: int, step: int):
        task.multiple = stage.SIZE * (2 if step % 3 == OTHER else 1)
        drawn = draw(epoch, step)
        if isinstance(drawn, TeacherBatch):
            return Moved(drawn.nodes, None, RandomBytes(tuple(drawn.mask.shape), stage.mixed_seed(0, epoch, step)))
        return drawn

    task.batch = batch
    return task


class Moved(TeacherBatch):
    """Goes to a device as others do, to the CPU too."""

    def to(self, device):
        return TeacherBatch(self.nodes.to(device), None, self.mask.to(device))


def recording(task, optimizer=None) -> tuple[RecordedSteps, Recorder]:
    optimizer = optimizer or task.optimizer()

    def kept():
        return [*task.model.parameters(), *(t for slots in optimizer.state.values() for t in slots.values())]

    recorder = Recorder(kept)
    return RecordedSteps(task, optimizer, CPU, recorder), recorder


def rounds(steps: Steps, number: int, recorder: Recorder | None = None, between=None) -> list[dict[str, float]]:
    terms, optimizer = [], steps.optimizer
    for step in range(number):
        if between is not None:
            between(step, optimizer, steps.task)
        got = steps.gradients(0, step)
        kept = [None if p.grad is None else p.grad.clone() for p in steps.task.model.parameters()]
        steps.update()
        if recorder is not None:
            recorder.spoil()
        terms.append({name: float(value) for name, value in got.items()} | {"grads": kept})
    return terms


def assert_equal(mine: list[dict], truth: list[dict], played, plain, **tolerance) -> None:
    for step, (a, b) in enumerate(zip(mine, truth, strict=True)):
        grads, others = a.pop("grads"), b.pop("grads")
        assert list(a) == list(b) and a == pytest.approx(b, rel=1e-5, abs=1e-7), step
        for x, y in zip(grads, others, strict=True):
            assert (x is None) == (y is None)
            if x is not None:
                torch.testing.assert_close(x, y, **tolerance)
    for (name, p), (_, q) in zip(played.model.named_parameters(), plain.model.named_parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


EXACT = {"rtol": 0, "atol": 0}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_played_back_is_what_is_made(kind, dataset):
    """Two sizes in turns; the rate changes; gradients are dropped; a tensor that the step reads is changed in place."""

    def between(step, optimizer, task):
        if step == 12:
            for group in optimizer.param_groups:
                group["lr"] *= 0.5
        if step == 14:
            optimizer.zero_grad(set_to_none=True)
        if step == 16 and kind == "teacher":
            with torch.no_grad():
                task.model.omega.mul_(torch.linspace(0.3, 0.9, len(task.model.omega)))

    plain, played = sized(make(kind, dataset), dataset), sized(make(kind, dataset), dataset)
    ours, recorder = recording(played)
    truth = rounds(Steps(plain, plain.optimizer()), 20, between=between)
    mine = rounds(ours, 20, recorder, between)
    assert ours.recordings == 2 and len(recorder.tapes) == 6  # gradients, update, and update with the other rate
    assert_equal(mine, truth, played, plain, **EXACT)
    assert not any(group["capturable"] for group in ours.optimizer.param_groups)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_few_sizes_train_as_others_do(kind, dataset):
    plain, played = make(kind, dataset), sized(make(kind, dataset), dataset)
    if kind == "teacher":  # the same mask, made of the bytes the other draws
        draw = plain._batch

        def batch(epoch, step):
            drawn = draw(epoch, step)
            bytes_ = RandomBytes(tuple(drawn.mask.shape), stage.mixed_seed(0, epoch, step)).to(CPU)
            return TeacherBatch(drawn.nodes, drawn.item_rows, plain.mask_of(bytes_))

        plain.batch = batch
    truth, mine = rounds(Steps(plain, plain.optimizer()), 6), rounds(Steps(played, played.optimizer()), 6)
    assert_equal(mine, truth, played, plain, rtol=1e-4, atol=1e-5)


def test_a_run_goes_on_from_its_checkpoint(dataset):
    begun, plain, played = (sized(make("student", dataset), dataset) for _ in range(3))
    first = begun.optimizer()
    rounds(Steps(begun, first), 4)
    saved = training_tensors(begun.model, first, {})
    optimizers = [task.optimizer() for task in (plain, played)]
    for task, optimizer in zip((plain, played), optimizers, strict=True):
        restore_training(saved, task.model, optimizer, Path("x"))
    ours, recorder = recording(played, optimizers[1])
    truth, mine = rounds(Steps(plain, optimizers[0]), 10), rounds(ours, 10, recorder)
    assert ours.recordings == 2
    assert_equal(mine, truth, played, plain, **EXACT)


def test_restored_slots_are_where_their_parameter_is(dataset):
    task = make("lightgcn", dataset)
    optimizer = task.optimizer()
    rounds(Steps(task, optimizer), 1)
    saved = training_tensors(task.model, optimizer, {})
    task.model.table = torch.nn.Parameter(task.model.table.detach().to("meta"))
    fresh = torch.optim.AdamW(task.model.parameters())
    restore_training(saved, task.model, fresh, Path("x"))
    slots = fresh.state[task.model.table]
    assert set(slots) == {"step", "exp_avg", "exp_avg_sq"} and {t.device.type for t in slots.values()} == {"meta"}


def test_a_loss_that_was_returned_stays_what_it_was(dataset):
    task = sized(make("student", dataset), dataset)
    steps, recorder = recording(task)
    kept = []
    for step in (0, 1, 3, 4):
        kept.append(steps.gradients(0, step))
        steps.update()
    before = [{name: float(v) for name, v in terms.items()} for terms in kept]
    steps.gradients(0, 6)
    recorder.spoil()
    assert steps.recordings == 1 and [{name: float(v) for name, v in terms.items()} for terms in kept] == before


@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize("where", ["recording", "inputs"])
def test_a_step_that_cannot_be_recorded_is_made_as_ever_with_one_warning(where, which, dataset, caplog, monkeypatch):
    """The attempt at which it fails: gradients and update of either size, and an update with another rate."""
    plain, task = sized(make("student", dataset), dataset), sized(make("student", dataset), dataset)
    steps, recorder = recording(task)
    attempts = iter(range(100))

    def refuse(run):
        if next(attempts) != which:
            return recorder(run)
        before = [(t.detach(), t.detach().clone()) for t in recorder.kept()]
        run()  # an attempt that breaks off has left gradients behind
        for t, value in before:
            t.copy_(value)
        raise RuntimeError("operation not permitted when stream is capturing")

    def no_room(*args):
        raise torch.OutOfMemoryError("out of memory: operation not permitted")

    steps._record = refuse
    if where == "inputs":
        if which > 0:
            pytest.skip("one attempt")
        monkeypatch.setattr(recorded, "Inputs", no_room)

    def between(step, optimizer, task):
        if step == 10:
            optimizer.param_groups[0]["lr"] *= 0.5

    with caplog.at_level(logging.WARNING, "mmkd"):
        mine = rounds(steps, 14, recorder, between)
    assert caplog.text.count("launched one by one") == 1 and "operation not permitted" in caplog.text
    assert_equal(mine, rounds(Steps(plain, plain.optimizer()), 14, between=between), task, plain, **EXACT)


def test_a_step_that_waits_for_the_device_is_not_recorded(dataset, caplog):
    task = sized(make("lightgcn", dataset), dataset)
    inner = task.gradients
    task.gradients = lambda batch: {name: value * float(value > -1) for name, value in inner(batch).items()}
    steps, recorder = recording(task)
    recorder.strict = True
    with caplog.at_level(logging.WARNING, "mmkd"):
        rounds(steps, 8, recorder)
    assert steps.recordings == 0 and caplog.text.count("launched one by one") == 1


def test_the_number_of_recordings_is_bounded(dataset, monkeypatch):
    monkeypatch.setattr(recorded, "MOST", 1)
    task = sized(make("lightgcn", dataset), dataset)
    steps, recorder = recording(task)
    rounds(steps, 12, recorder)
    assert steps.recordings == 1


def test_sizes_that_are_never_recorded_are_not_remembered(dataset):
    task = sized(make("student", dataset, shared_negatives=8), dataset)
    steps, recorder = recording(task)
    rounds(steps, 8, recorder)
    assert steps.recordings == 0 and not steps._seen


def test_shared_negatives_are_not_recorded(dataset):
    for kind in KINDS:
        task = make(kind, dataset, shared_negatives=8)
        assert not task.recordable(task.batch(0, 0))
        assert make(kind, dataset).recordable(make(kind, dataset).batch(0, 0))


def test_inputs_hold_one_batch_after_the_other(dataset):
    task = sized(make("student", dataset), dataset)
    first, second = task.batch(0, 0), task.batch(0, 1)
    assert size_of(parts(first)) == size_of(parts(second)) != size_of(parts(task.batch(0, OTHER)))
    users = replace(first.nodes, num_users=first.nodes.num_users - 1)
    assert size_of(parts(users)) != size_of(parts(first.nodes))
    inputs = Inputs(first, CPU)
    for batch in (first, second):
        inputs.load(parts(batch))
        for held, given in zip(parts(inputs.batch), parts(batch), strict=True):
            assert torch.equal(held, given) and held.dtype == given.dtype if torch.is_tensor(given) else held == given
    assert inputs.batch.nodes.num_users == first.nodes.num_users


def test_random_bytes_are_their_seed_s_and_drawn_anew_for_every_batch():
    one, other = RandomBytes((40, 6), 5), RandomBytes((40, 6), 6)
    inputs = Inputs(TeacherBatch(None, None, one), CPU)
    inputs.load([None, None, one])
    first = inputs.batch.mask.clone()
    inputs.load([None, None, other])
    assert (
        torch.equal(first, one.to(CPU)) and torch.equal(inputs.batch.mask, other.to(CPU)) and len(first.unique()) > 50
    )
    assert not torch.equal(first, inputs.batch.mask)


def test_a_mask_of_bytes_drops_the_share_it_should(dataset):
    task = make("teacher", dataset)
    mask = task.mask_of(torch.arange(256, dtype=torch.uint8).repeat(4))
    dropped = round(task.settings.dropout * 256)
    assert (mask == 0).sum() == 4 * dropped and mask.mean() == pytest.approx(1.0)
    assert task.mask_of(None) is None


@pytest.mark.parametrize("extra", [None, torch.tensor([119, 0, 125, 125, 209])])
def test_padding_adds_nodes_that_nothing_looks_at(dataset, extra):
    users, candidates = torch.tensor([3, 9, 3]), torch.tensor([[0, 4, 7], [80, 2, 2], [5, 0, 1]])
    sizes = dataset.num_users, dataset.num_items
    batch, more = (stage.node_batch(users, candidates, *sizes, extra, multiple=m) for m in (1, stage.SIZE))
    assert more.num_users == len(more.rows) - more.num_users == len(more.touched) == stage.SIZE
    assert (more.rows[: more.num_users] < dataset.num_users).all() and (
        more.rows[more.num_users :] >= dataset.num_users
    ).all()
    assert torch.equal(more.rows[more.users], users)
    assert torch.equal(more.rows[more.num_users :][more.candidates], candidates + dataset.num_users)
    assert torch.equal(more.rows[more.extra], torch.empty(0, dtype=torch.int64) if extra is None else extra)
    weight = torch.zeros(dataset.num_users + dataset.num_items)
    for rows, counts in ((more.touched, more.counts), (more.rows, more.all_counts)):
        one = weight.index_add(0, rows, counts)
        assert torch.equal(one, weight.index_add(0, batch.touched, batch.counts))


def test_a_batch_of_nothing_is_padded_too():
    nothing = torch.empty(0, dtype=torch.int64), torch.empty(0, 2, dtype=torch.int64)
    for sizes in ((5, 4), (0, 4), (5, 0), (0, 0)):
        assert len(stage.node_batch(*nothing, *sizes, multiple=64).rows) == 0, sizes


def test_parts_and_rebuilt_are_inverse(dataset):
    batch = make("student", dataset).batch(0, 0)
    copy = rebuilt(batch, iter(parts(batch)))
    assert all(a is b for a, b in zip(parts(batch), parts(copy), strict=True)) and type(copy) is type(batch)


def test_what_is_played_back(dataset, monkeypatch):
    """A CPU's steps are made as ever, and so are those of a task that has a `step` of its own."""
    task = make("lightgcn", dataset)
    assert type(steps_of(task, task.optimizer())) is Steps
    monkeypatch.setattr(recorded, "RecordedSteps", lambda task, optimizer, device: "played back")
    monkeypatch.setattr(torch.nn.Parameter, "device", torch.device("cuda"), raising=False)
    assert steps_of(task, task.optimizer()) == "played back"
    assert type(steps_of(task, task.optimizer(), recorded=False)) is Steps

    class Own(LightGCNTask):
        def step(self, epoch, step):
            return super().step(epoch, step)

    task.__class__ = Own
    assert type(steps_of(task, task.optimizer())) is Steps
    task.__class__ = LightGCNTask
    monkeypatch.setattr(recorded, "_refused", True)
    assert type(steps_of(task, task.optimizer())) is Steps


@pytest.mark.parametrize(("settings", "wanted"), [({}, True), ({"cuda_graphs": False}, False), ({"profile": 2}, False)])
def test_the_settings_say_whether_steps_are_recorded(settings, wanted, dataset, tmp_path, monkeypatch):
    seen = set()

    def spy(task, optimizer, recorded):
        seen.add(recorded)
        return Steps(task, optimizer)

    monkeypatch.setattr(stage, "steps_of", spy)
    quick = {"dim": 8, "progress": False, "baselines": [], "model": "lightgcn", "lightgcn": {"epochs": 1, "layers": 1}}
    mmkd.train(quick | settings, out=tmp_path / "r", dataset=dataset)
    assert seen == {wanted}


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_graphs_play_back_what_is_made(kind, dataset):
    def between(step, optimizer, task):
        if step == 12:
            optimizer.param_groups[0]["lr"] *= 0.5

    plain, played = sized(make(kind, dataset, "cuda"), dataset), sized(make(kind, dataset, "cuda"), dataset)
    ours = steps_of(played, played.optimizer())
    assert type(ours) is RecordedSteps
    truth = rounds(Steps(plain, plain.optimizer()), 16, between=between)
    mine = rounds(ours, 16, between=between)
    assert ours.recordings == 2
    assert_equal(mine, truth, played, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no CUDA device")
def test_a_gpu_that_cannot_record_a_step_goes_on(dataset, caplog, monkeypatch):
    monkeypatch.setattr(recorded, "_refused", False)
    task = make("lightgcn", dataset, "cuda")
    inner = task.gradients
    task.gradients = lambda batch: {name: value * float(value > -1) for name, value in inner(batch).items()}
    with caplog.at_level(logging.WARNING, "mmkd"):
        rounds(steps_of(task, task.optimizer()), 8)
    assert caplog.text.count("launched one by one") == 1
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    other = make("lightgcn", dataset, "cuda")
    rounds(steps_of(other, other.optimizer()), 4)
