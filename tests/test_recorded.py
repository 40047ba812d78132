"""Recorded steps: what is played back is what would have been made. A recorder that simply runs the function again stands in
for CUDA graphs where there is no GPU; with one, graphs themselves."""

from __future__ import annotations

import logging

import pytest
import torch

from mmkd.config import Config
from mmkd.data import synthetic
from mmkd.models.features import FeatureTable
from mmkd.models.lightgcn import LightGCN, initial_table
from mmkd.models.prompt import Prompt
from mmkd.models.teacher import Teacher
from mmkd.training import recorded, stage
from mmkd.training.collapse import FrozenTeacher
from mmkd.training.recorded import Inputs, RandomBytes, RecordedSteps, Steps, parts, rebuilt, size_of, steps_of
from mmkd.training.tasks import LightGCNTask, StudentBatch, StudentTask, TeacherBatch, TeacherTask

CPU, HAS_GPU = torch.device("cpu"), torch.cuda.is_available()
OTHER = 6  # a step whose batch is of another size
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


def sized(task, dataset):
    """The task's batches as a GPU gets them; the teacher's dropout by the same mask, handed over as the bytes it is made of."""
    draw = task._batch

    def batch(epoch: int, step: int):
        drawn, size = draw(epoch, step), (dataset.num_users, dataset.num_items, 512 if step == OTHER else stage.SIZE)
        if isinstance(drawn, StudentBatch):
            return StudentBatch(drawn.nodes.padded(*size), drawn.candidates, drawn.asked)
        if isinstance(drawn, TeacherBatch):
            return TeacherBatch(drawn.nodes.padded(*size), None, drawn.mask)
        return drawn.padded(*size)

    task.batch = batch
    return task


def again(run):
    """Stands in for a CUDA graph."""
    return run


def rounds(steps: Steps, task, number: int, start: int = 0) -> list[dict[str, float]]:
    terms = []
    for step in range(start, start + number):
        got = steps.gradients(0, step)
        steps.update()
        terms.append({name: float(value) for name, value in got.items()})
    return terms


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_played_back_is_what_is_made(kind, dataset):
    plain, played = make(kind, dataset), sized(make(kind, dataset), dataset)
    ours = RecordedSteps(played, played.optimizer(), CPU, again)
    truth = rounds(Steps(plain, plain.optimizer()), plain, 6)
    mine = rounds(ours, played, 6)
    assert ours.recordings == 1
    assert [list(t) for t in mine] == [list(t) for t in truth]
    for a, b in zip(mine, truth, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-7)
    for (name, p), (_, q) in zip(played.model.named_parameters(), plain.model.named_parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_another_size_is_made_as_ever_and_then_recorded_too(kind, dataset):
    task = sized(make(kind, dataset), dataset)
    steps = RecordedSteps(task, task.optimizer(), CPU, again)
    for epoch in range(4):
        for step in (0, 1, OTHER):
            assert all(torch.isfinite(v) for v in steps.gradients(epoch, step).values())
            steps.update()
    assert steps.recordings == 2


def test_a_loss_that_was_returned_stays_what_it_was(dataset):
    task = sized(make("student", dataset), dataset)
    steps = RecordedSteps(task, task.optimizer(), CPU, again)
    kept = [steps.gradients(0, step) for step in range(4)]
    before = [{name: float(v) for name, v in terms.items()} for terms in kept]
    steps.gradients(0, 4)
    assert [{name: float(v) for name, v in terms.items()} for terms in kept] == before


def test_a_step_that_cannot_be_recorded_is_made_as_ever_with_one_warning(dataset, caplog):
    def refuse(run):
        run()  # a recording that breaks off has left gradients behind
        raise RuntimeError("operation not permitted when stream is capturing")

    plain, task = make("lightgcn", dataset), sized(make("lightgcn", dataset), dataset)
    steps = RecordedSteps(task, task.optimizer(), CPU, refuse)
    with caplog.at_level(logging.WARNING, "mmkd"):
        mine = rounds(steps, task, 6)
    assert steps.recordings == 0 and caplog.text.count("launched one by one: operation not permitted") == 1
    truth = rounds(Steps(plain, plain.optimizer()), plain, 6)
    for a, b in zip(mine, truth, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_the_number_of_recordings_is_bounded(dataset, monkeypatch):
    monkeypatch.setattr(recorded, "MOST", 1)
    task = sized(make("lightgcn", dataset), dataset)
    steps = RecordedSteps(task, task.optimizer(), CPU, again)
    for epoch in range(4):
        for step in (0, 1, OTHER):
            steps.gradients(epoch, step)
            steps.update()
    assert steps.recordings == 1


def test_shared_negatives_are_not_recorded(dataset):
    for kind in KINDS:
        task = make(kind, dataset, shared_negatives=8)
        assert not task.recordable(task.batch(0, 0))
        assert make(kind, dataset).recordable(make(kind, dataset).batch(0, 0))


def test_inputs_hold_one_batch_after_the_other(dataset):
    task = sized(make("student", dataset), dataset)
    first, second = task.batch(0, 0), task.batch(0, 1)
    assert size_of(parts(first)) == size_of(parts(second)) != size_of(parts(task.batch(0, OTHER)))
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
    batch = stage.node_batch(users, candidates, dataset.num_users, extra)
    more = batch.padded(dataset.num_users, dataset.num_items)
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
    same = more.padded(dataset.num_users, dataset.num_items)
    assert all(
        torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(parts(more), parts(same), strict=True)
    )


def test_a_batch_of_nothing_is_padded_too():
    batch = stage.node_batch(torch.empty(0, dtype=torch.int64), torch.empty(0, 2, dtype=torch.int64), 5)
    assert len(batch.padded(5, 4).rows) == 0 and len(batch.padded(0, 4).rows) == 0


def test_parts_and_rebuilt_are_inverse(dataset):
    batch = make("student", dataset).batch(0, 0)
    copy = rebuilt(batch, iter(parts(batch)))
    assert all(a is b for a, b in zip(parts(batch), parts(copy), strict=True)) and type(copy) is type(batch)


def test_a_cpu_makes_its_steps_as_ever(dataset):
    task = make("lightgcn", dataset)
    assert type(steps_of(task, task.optimizer())) is Steps


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_graphs_play_back_what_is_made(kind, dataset):
    plain, played = make(kind, dataset, "cuda"), make(kind, dataset, "cuda")
    ours = steps_of(played, played.optimizer())
    truth, mine = rounds(Steps(plain, plain.optimizer()), plain, 9), rounds(ours, played, 9)
    assert type(ours) is RecordedSteps and ours.recordings >= 1
    for a, b in zip(mine, truth, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    for (name, p), (_, q) in zip(played.model.named_parameters(), plain.model.named_parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    assert type(steps_of(played, played.optimizer(), recorded=False)) is Steps
