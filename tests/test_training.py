"""The trainer end to end on planted data: it learns, resumes bit for bit, and refuses what it cannot do."""

from __future__ import annotations

import errno
import json
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import mmkd
from mmkd import ops
from mmkd.config import Config, ConfigError
from mmkd.data import synthetic
from mmkd.evaluation import evaluate, evaluate_scores
from mmkd.files import WriteError
from mmkd.graph import BipartiteGraph
from mmkd.models.baselines.popularity import Popularity
from mmkd.models.lightgcn import LightGCN, initial_table
from mmkd.training import CheckpointError, RunError, TrainingError
from mmkd.training.best import BestWeights
from mmkd.training.checkpoint import load_checkpoint, save_checkpoint
from mmkd.training.fusion import Gate
from mmkd.training.optim import PropagatedAdamW
from mmkd.training.run_folder import RunFolder
from mmkd.training.stage import Stage, add_l2, node_batch
from mmkd.training.trainer import Run

QUICK = {
    "dim": 8, "progress": False, "checkpoint_every": 1, "baselines": ["popularity"],
    "teacher": {"epochs": 3, "eval_every": 1, "batch_size": 256, "layers": 2},
    "student": {"epochs": 3, "eval_every": 1, "batch_size": 256, "layers": 2},
    "lightgcn": {"epochs": 3, "eval_every": 1, "batch_size": 256},
    "evaluation": {"ks": [20, 50]},
}  # fmt: skip


@pytest.fixture(scope="module")
def dataset():
    return synthetic(120, 90, 2500, seed=3)


def quick(**sections) -> Config:
    merged = {k: dict(v) if isinstance(v, dict) else v for k, v in QUICK.items()}
    for name, value in sections.items():
        merged[name] = {**merged.get(name, {}), **value} if isinstance(value, dict) else value
    return Config.model_validate(merged)


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "a"
    return mmkd.train(quick(baselines=["popularity", "item-knn", "lightgcn"]), out=path, dataset=dataset)


def test_the_run_folder_is_complete(finished, dataset):
    names = {p.name for p in finished.path.iterdir()}
    assert names >= {
        "config.yaml", "run.json", "metrics.jsonl", "student.safetensors", "teacher.safetensors", "ids.npz", "seen.npz",
        "summary.md", "checkpoints",
    }  # fmt: skip
    assert not [p for p in finished.path.rglob(".*") if p.is_file()], "a temporary file was left behind"
    info = json.loads((finished.path / "run.json").read_text())
    assert info["data"]["fingerprint"] == dataset.fingerprint()
    assert info["seed"] == 0 and info["torch"] == torch.__version__
    assert set(info["results"]) == {"popularity", "item-knn", "LightGCN", "teacher", "MMKD student"}
    summary = (finished.path / "summary.md").read_text()
    for word in ("recall@20", "ndcg@50", "parameters", "seconds", "MMKD student", "(test)"):
        assert word in summary
    lines = RunFolder(finished.path).metrics()
    assert [(line["stage"], line["epoch"]) for line in lines][:3] == [("lightgcn", 1), ("lightgcn", 2), ("lightgcn", 3)]
    assert all(np.isfinite(line["loss"]) for line in lines)


def test_the_saved_student_is_the_evaluated_one(finished, dataset):
    saved = load_file(finished.path / "student.safetensors")
    again = evaluate(saved["user_emb"], saved["item_emb"], dataset, "test", (20, 50))
    assert again == finished.rows["MMKD student"]
    graph = dataset.graph()
    table = torch.cat([saved["user_emb0"], saved["item_emb0"]])
    final = torch.cat([saved["user_emb"], saved["item_emb"]])
    torch.testing.assert_close(ops.propagate(graph, table, 2), final)


def test_training_learns_the_planted_signal(tmp_path):
    planted = synthetic(300, 400, 9000, taste=8.0, zipf=0.0, noise=0.1, latent_dim=4, seed=3)
    config = quick(
        dim=16, teacher={"epochs": 30, "lr": 0.01, "patience": 30, "eval_every": 5}, student={"epochs": 4, "lr": 0.001}
    )
    rows = mmkd.train(config, out=tmp_path / "r", dataset=planted).rows
    assert rows["teacher"]["recall@20"] > 1.7 * rows["popularity"]["recall@20"]
    assert rows["MMKD student"]["recall@20"] > 0.9 * rows["teacher"]["recall@20"]


@pytest.mark.parametrize("stop", ["teacher", "student"])
def test_a_resumed_run_ends_bit_equal(finished, dataset, tmp_path, monkeypatch, stop):
    from mmkd.training import stage as stage_module

    epochs = []
    original = stage_module.Stage._epoch

    def stop_in_second_epoch(self, optimizer, state, *rest):
        epochs.append(state["epoch"])
        if self.task.name == stop and state["epoch"] == 1:
            raise KeyboardInterrupt
        return original(self, optimizer, state, *rest)

    config = quick(baselines=["popularity", "item-knn", "lightgcn"])
    with monkeypatch.context() as patch:
        patch.setattr(stage_module.Stage, "_epoch", stop_in_second_epoch)
        with pytest.raises(KeyboardInterrupt):
            mmkd.train(config, out=tmp_path / "r", dataset=dataset)
    assert not (tmp_path / "r" / "student.safetensors").exists()
    again = mmkd.train(config, out=tmp_path / "r", dataset=dataset, resume=True)
    for name in ("student", "teacher"):
        one, two = load_file(finished.path / f"{name}.safetensors"), load_file(again.path / f"{name}.safetensors")
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one), name
    assert again.rows == finished.rows


def test_the_prompt_learns_in_the_students_stage_and_the_rest_of_the_teacher_does_not(dataset, tmp_path):
    config = quick(prompt={"lr": 0.05, "strength": 0.5}, distill={"emb": 0.5, "list": 1.0})
    path = mmkd.train(config, out=tmp_path / "r", dataset=dataset).path
    teacher = load_file(path / "teacher.safetensors")
    tensors, state = load_checkpoint(path / "checkpoints" / "student.safetensors")
    assert state["finished"]
    assert not torch.equal(tensors["model.prompt.weight"], teacher["prompt.weight"])
    assert not any("weights" in name for name in tensors)


@pytest.mark.parametrize(
    "distill", [{"pair": 0}, {"list": 0}, {"emb": 0}, {"pair": 0, "list": 0, "emb": 0}, {"emb_sample": 30, "emb_nodes": "all"},
                {"list_weight": "decoupled", "pair_kind": "positive", "modality_weights": "uniform"}], ids=str
)  # fmt: skip
def test_every_term_can_be_switched(dataset, tmp_path, distill):
    config = quick(distill=distill, teacher={"epochs": 1}, student={"epochs": 1})
    run = mmkd.train(config, out=tmp_path / "r", dataset=dataset)
    terms = next(line for line in RunFolder(run.path).metrics() if line["stage"] == "student")
    for name in ("pair", "list", "emb"):
        assert (name in terms) == (distill.get(name, 1) != 0)


def test_embedding_kd_counts_a_modality_as_list_kd_does(dataset, tmp_path):
    config = quick(distill={"emb": 0.5, "emb_sample": None})
    run = Run(config, dataset, RunFolder.start(tmp_path / "r", config, dataset, False))
    teacher = run.build_teacher()

    def term(*weights: float) -> torch.Tensor:
        return run.student_task(teacher, torch.tensor(weights)).step(0, 0)["emb"]

    first, second, both = term(1.0, 0.0), term(0.0, 1.0), term(0.5, 0.5)
    assert first > 0 and second > 0 and first != second and term(0.0, 0.0) == 0
    torch.testing.assert_close(first + second, 2 * both)  # weights that sum to one: a mean of the two
    heads = [torch.cat([u, i]) for u, i in zip(teacher().users, teacher().items, strict=True)]
    table, items = torch.cat(teacher.tables()), slice(dataset.num_users, None)
    paper = ops.emb_kd_loss(table[items], [head[items] for head in heads], gamma=config.distill.emb_gamma)
    torch.testing.assert_close(both, 0.5 * paper.detach(), rtol=1e-3, atol=1e-5)  # uniform: the paper's sum


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("held", [False, True])
def test_node_batch_and_l2_against_plain_indexing(dtype, held):
    graph = BipartiteGraph.from_edges([0, 1, 2, 3], [0, 1, 2, 0], 4, 3)
    users, candidates = torch.tensor([1, 3, 1]), torch.tensor([[1, 0, 2], [0, 2, 2], [1, 1, 0]])
    batch = node_batch(users, candidates, 4, 3, extra=torch.tensor([0, 6]))
    assert torch.equal(batch.rows[: batch.num_users][batch.users], users)
    assert torch.equal(batch.rows[batch.num_users :][batch.candidates] - 4, candidates)
    model = LightGCN(graph, initial_table(7, 5, "normal", torch.Generator().manual_seed(0)).to(dtype), 1)
    optimizer = PropagatedAdamW(model, [{"params": [model.table]}], 0.1) if held else None
    (0 * model(batch.rows)).sum().backward()
    assert (model.table.grad is None) == (held and dtype != torch.bfloat16)
    value = add_l2(model, batch, 0.3)
    if optimizer:
        optimizer.materialize()
    leaf = model.table.detach().clone().requires_grad_()
    parts = (leaf[users], leaf[4 + candidates[:, 0]], leaf[4 + candidates[:, 1]])
    truth = 0.3 * 0.5 * sum(p.square().sum() for p in parts) / 3
    truth.backward()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(value.to(dtype), truth.detach())
    torch.testing.assert_close(model.table.grad, leaf.grad)


def test_a_diverging_run_stops_with_the_term_and_keeps_its_checkpoint(dataset, tmp_path, monkeypatch):
    from mmkd.training.tasks import TeacherTask

    original = TeacherTask.step

    def poisoned(self, epoch, step):
        terms = original(self, epoch, step)
        return {**terms, "modalities": terms["modalities"] * float("nan")} if epoch == 1 else terms

    monkeypatch.setattr(TeacherTask, "step", poisoned)
    with pytest.raises(TrainingError, match="stage teacher, epoch 2, step 1: the term 'modalities' is nan"):
        mmkd.train(quick(), out=tmp_path / "r", dataset=dataset)
    assert load_checkpoint(tmp_path / "r" / "checkpoints" / "teacher.safetensors")[1]["epoch"] == 1


def test_refused(dataset, finished, tmp_path):
    from dataclasses import replace

    with pytest.raises(RunError, match="already holds a run"):
        mmkd.train(quick(), out=finished.path, dataset=dataset)
    with pytest.raises(RunError, match=r"other settings \(.*teacher.lr"):
        mmkd.train(quick(teacher={"lr": 0.5}), out=finished.path, dataset=dataset, resume=True)
    same = quick(baselines=["popularity", "item-knn", "lightgcn"])
    with pytest.raises(RunError, match="other data"):
        mmkd.train(same, out=finished.path, dataset=synthetic(120, 90, 2500, seed=4), resume=True)
    with pytest.raises(TrainingError, match=r"no validation part .* evaluation.select=last"):
        mmkd.train(quick(), out=tmp_path / "v", dataset=replace(dataset, val=None))
    with pytest.raises(ConfigError, match="no item features"):
        mmkd.train(quick(), out=tmp_path / "f", dataset=replace(dataset, features={}))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="torch sees no CUDA device"):
            mmkd.train(quick(device="cuda"), out=tmp_path / "c", dataset=dataset)


def test_without_a_validation_part_the_last_epoch_counts(dataset, tmp_path):
    from dataclasses import replace

    config = quick(evaluation={"select": "last"})
    run = mmkd.train(config, out=tmp_path / "r", dataset=replace(dataset, val=None))
    assert run.part == "test" and run.rows["MMKD student"]["recall@20"] >= 0
    nothing = mmkd.train(config, out=tmp_path / "n", dataset=replace(dataset, val=None, test=None))
    assert nothing.part == "none" and "nothing to evaluate on" in nothing.table


def test_damaged_checkpoints_are_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, {"a": torch.arange(100.0)}, {"epoch": 3})
    tensors, state = load_checkpoint(path)
    assert state == {"epoch": 3} and torch.equal(tensors["a"], torch.arange(100.0))
    whole = path.read_bytes()
    for damaged in (whole[:50], whole[:-8], b"", b"\x80\x04garbage" + whole[10:]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            load_checkpoint(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint(tmp_path / "none.safetensors")


def test_a_profile_names_the_ops_and_changes_no_number(finished, dataset, tmp_path):
    config = quick(baselines=["popularity", "item-knn", "lightgcn"], profile=2, checkpoint_every=5)
    run = mmkd.train(config, out=tmp_path / "r", dataset=dataset)
    assert run.rows == finished.rows
    for stage, op in (
        ("student", "mmkd::student, teacher and losses"),
        ("teacher", "mmkd::spmm"),
        ("lightgcn", "mmkd::propagate"),
    ):
        text = (run.path / f"profile-{stage}.md").read_text()
        assert op in text and (
            "aten::" in text or " others |" in text
        )  # torch's may all be small beside one that waits
        rows = [line.split("|") for line in text.splitlines() if line.startswith("|")][2:]
        assert abs(sum(float(row[3].strip(" %")) for row in rows) - 100) < 2
        assert len({row[1] for row in rows}) == len(rows)


def test_a_profile_longer_than_the_epoch_says_so(dataset, tmp_path, caplog):
    mmkd.train(quick(profile=500, student={"epochs": 1}, teacher={"epochs": 1}), out=tmp_path / "r", dataset=dataset)
    assert "profile: an epoch of stage teacher has 8 steps" in caplog.text


@pytest.mark.parametrize("teacher", [{"feature_compute": "bfloat16"}, {"feature_memory": "mapped"}], ids=str)
def test_features_may_be_mapped_and_multiplied_in_bfloat16(dataset, tmp_path, teacher):
    run = mmkd.train(quick(teacher=teacher, baselines=[]), out=tmp_path / "r", dataset=dataset)
    assert all(np.isfinite(line["loss"]) for line in RunFolder(run.path).metrics())


def test_batches_made_ahead_are_those_asked_for():
    from mmkd.training.stage import Ahead

    made = []

    def make(epoch, step):
        made.append((epoch, step))
        if (epoch, step) == (2, 0):
            raise ValueError("of the background thread")
        return epoch, step

    ahead = Ahead(make, steps=3)
    assert [ahead(e, s) for e in (0, 1) for s in range(3)] == [(e, s) for e in (0, 1) for s in range(3)]
    assert ahead(0, 2) == (0, 2)  # a jump, as after a resumption
    assert made.count((0, 1)) == 1
    with pytest.raises(ValueError, match="of the background thread"):
        ahead(2, 0)


def test_a_batch_that_is_asked_for_is_not_waited_for():
    from mmkd.training.stage import Ahead

    ahead, start = Ahead(lambda epoch, step: (epoch, step), steps=3, pause=30.0), time.perf_counter()
    assert [ahead(0, s) for s in (0, 1, 2)] == [(0, 0), (0, 1), (0, 2)] and ahead(2, 1) == (2, 1)
    assert time.perf_counter() - start < 15
    ahead._next[2].set()  # or the process waits for it when it ends


def test_a_modality_that_ranks_badly_counts_for_little(dataset, tmp_path):
    run = Run(quick(), dataset, RunFolder.start(tmp_path / "a", quick(), dataset, False))
    teacher = run.build_teacher()
    items = np.linalg.svd(dataset.train.toarray(), full_matrices=False)[2][: teacher.table.shape[1]]
    with (
        torch.no_grad()
    ):  # the ids are right singular vectors, and the users' sums of them; the first head knows nothing
        item_rows = torch.from_numpy(items.T.astype(np.float32))
        teacher.table.copy_(torch.cat([torch.from_numpy(dataset.train @ items.T).float(), item_rows]))
        teacher.weights[0].zero_()
    gate, out = Gate(teacher, dataset, "recall@20", weight=0.7, power=2.0), teacher()
    assert gate.floor == evaluate_scores(Popularity().fit(dataset).scores, dataset, "val", (20,))["recall@20"]
    tables = [teacher.split(out.ids), *zip(out.users, out.items, strict=True)]
    ids, *heads = (evaluate(u.detach(), i.detach(), dataset, "val", (20,))["recall@20"] for u, i in tables)
    for gate.floor in (min(heads), max(heads), 0.9):
        gate()
        wanted = [0.7 * (head > gate.floor) * min(1, head / max(ids, gate.floor)) ** 2 for head in heads]
        assert teacher.omega.tolist() == pytest.approx(wanted, rel=1e-5) and not teacher.omega.requires_grad
    assert heads[0] < heads[1]


@pytest.mark.parametrize("model", ["mmkd", "lightgcn"])
def test_a_run_has_the_same_bits_whether_gradients_are_held_or_written(
    model, dataset, tmp_path, monkeypatch, one_thread
):
    if torch.ops.mmkd.cpu_isa() == "generic" or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this processor rounds products that torch's build or ours does not")
    config = quick(model=model, dim=16, baselines=[], teacher={"neighbors": 0})
    held = mmkd.train(config, out=tmp_path / "held", dataset=dataset)
    monkeypatch.setattr("mmkd.models.lightgcn.can_hold", lambda table, compute: False)
    written = mmkd.train(config, out=tmp_path / "written", dataset=dataset)
    ours, theirs = (load_file(run.path / "student.safetensors") for run in (held, written))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert held.rows == written.rows


def test_omega_is_saved_with_the_teacher_and_may_be_fixed(finished, dataset, tmp_path):
    gated = load_file(finished.path / "teacher.safetensors")["omega"]
    assert (gated != 1).any() and (gated >= 0).all()
    config = quick(model="teacher", teacher={"fusion": "fixed", "feature_weight": 0.7}, baselines=[])
    mmkd.train(config, out=tmp_path / "fixed", dataset=dataset)
    assert load_file(tmp_path / "fixed" / "teacher.safetensors")["omega"].tolist() == pytest.approx([0.7] * len(gated))


def test_a_look_holds_no_gradients_and_better_weights_go_to_disk(dataset, tmp_path, monkeypatch):
    original, kept = Stage._validate, []

    def look(self, state):
        parameters = dict(self.task.model.named_parameters())
        assert all(p.grad is None for p in parameters.values()), "a look is taken with gradients in memory"
        values = original(self, state)
        if state["best_epoch"] == state["epoch"]:
            assert all(torch.equal(t, parameters[name]) for name, t in self.best.tensors().items())
            kept.append(state["epoch"])
        return values

    monkeypatch.setattr(Stage, "_validate", look)
    mmkd.train(quick(model="lightgcn", lightgcn={"epochs": 6}, baselines=[]), out=tmp_path / "r", dataset=dataset)
    assert len(kept) > 2
    assert not list((tmp_path / "r").rglob("*best*")), "the file has no name"


def test_best_weights_survive_a_disk_that_is_full(tmp_path, monkeypatch):
    best = BestWeights(tmp_path)
    assert not best and best.tensors() == {}
    first = {"a": torch.randn(30, 4), "b": torch.tensor(2.0), "c": torch.randn(0, 3), "d": torch.randn(5).bfloat16()}
    for step in range(4):  # each beside the one before
        now = {name: t + step for name, t in first.items()}
        best.keep(now.items())
        kept = best.tensors()
        assert best and all(torch.equal(kept[name], t) and kept[name].dtype == t.dtype for name, t in now.items())
    original = BestWeights._write

    def full(self, t, at):
        original(self, t, at)
        raise OSError(errno.ENOSPC, "No space left on device")

    for sizes in ((3,), (50, 9), (20,), (20, 200)):  # smaller than what is there, and larger
        later = {f"p{i}": torch.randn(size) for i, size in enumerate(sizes)}
        with monkeypatch.context() as patched:
            patched.setattr(BestWeights, "_write", full)
            with pytest.raises(WriteError, match=r"No space left.*what was there before is untouched"):
                best.keep(later.items())
        kept = best.tensors()
        assert kept.keys() == now.keys() and all(torch.equal(kept[name], t) for name, t in now.items())
        best.keep(later.items())
        now = later


@pytest.mark.parametrize("bad", [None, 5])
def test_losses_read_for_many_steps_at_once_are_the_same(bad, dataset, tmp_path, monkeypatch):
    """As on a GPU; a step that went wrong is named all the same."""
    from mmkd.training import stage
    from mmkd.training.tasks import LightGCNTask

    original, make = LightGCNTask.step, stage.Stage.__init__

    def step(self, epoch, step):
        terms = original(self, epoch, step)
        return {**terms, "l2": terms["l2"] * float("nan")} if (epoch, step) == (1, bad) else terms

    def patient(self, *args, **kwargs):
        make(self, *args, **kwargs)
        self.look_every = 4

    monkeypatch.setattr(LightGCNTask, "step", step)
    settings = quick(model="lightgcn", baselines=[], lightgcn={"epochs": 2, "batch_size": 128, "layers": 1})
    if bad is None:
        mmkd.train(settings, out=tmp_path / "one", dataset=dataset)
    monkeypatch.setattr(stage.Stage, "__init__", patient)
    if bad is not None:
        with pytest.raises(TrainingError, match=f"epoch 2, step {bad + 1}: the term 'l2' is nan"):
            mmkd.train(settings, out=tmp_path / "four", dataset=dataset)
        return
    mmkd.train(settings, out=tmp_path / "four", dataset=dataset)
    one, four = (RunFolder(tmp_path / name).metrics() for name in ("one", "four"))
    assert len(one) == len(four) == 2
    for a, b in zip(one, four, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6) and a["l2"] == pytest.approx(b["l2"], rel=1e-6)


def _teacher_task(dataset, **settings):
    """A teacher's stage at its beginning, of two modalities, without dropout."""
    from mmkd.models.features import FeatureTable
    from mmkd.models.prompt import Prompt, prompt_basis
    from mmkd.models.teacher import Teacher
    from mmkd.training.tasks import TeacherTask

    own = {"batch_size": 256, "dropout": 0.0, **settings}
    config, generator = quick(dim=16, teacher=own), torch.Generator().manual_seed(0)
    graph = BipartiteGraph.from_scipy(dataset.train)
    tables = [FeatureTable(name, values, config.teacher.features) for name, values in dataset.features.items()]
    prompt = Prompt(prompt_basis(tables, 16), generator)
    model = Teacher(graph, tables, prompt, layers=2, strength=config.prompt.strength, generator=generator)
    model.omega.copy_(torch.tensor([0.7, 0.2]))
    return TeacherTask(model, config, dataset, graph)


def _teacher_terms(task, batch):
    """The terms of a teacher's loss, written out over all nodes; its L2 term is not among them."""
    from mmkd.training.ranking import ranking_loss

    model, settings, graph = task.model, task.settings, task.graph
    out, prompt = model(), model.prompt.design @ model.prompt.stacked()
    at = batch.rows[: batch.num_users], batch.rows[batch.num_users :] - graph.num_users

    def ranked(users, items):
        return ranking_loss(users[at[0]], items[at[1]], batch)

    def bpr(users, items):
        u, p, n = users[at[0]][batch.users], items[at[1]][batch.pos], items[at[1]][batch.neg]
        return torch.nn.functional.softplus((u * n).sum(1) - (u * p).sum(1)).mean()

    terms = {"ranking": ranked(*model.split(out.joint))}
    if settings.modality_loss:
        terms["modalities"] = settings.modality_loss * sum(
            ranked(u, i) for u, i in zip(out.users, out.items, strict=True)
        )
    if settings.prompt_loss:
        terms["prompt"] = settings.prompt_loss * bpr(graph.users_from_items(prompt), prompt)
    return terms


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"modality_loss": 0.0},
        {"prompt_loss": 0.0},
        {"modality_loss": 0.4, "prompt_loss": 0.3, "shared_negatives": 8},
    ],
)
def test_a_teachers_step_is_what_its_loss_says(dataset, settings, hooked):
    task = _teacher_task(dataset, l2=0.0, **settings)
    task.model.double()
    optimizer, seen = task.optimizer(), []
    if hooked:
        task.model.register_forward_hook(lambda module, given, out: seen.append(out) or out)
    batch = task.batch(0, 0)
    terms = task.gradients(batch)
    optimizer.materialize()
    leaves = [p for p in task.model.parameters() if p.requires_grad]
    grads = [p.grad.clone() for p in leaves]
    assert bool(seen) == hooked
    expected = _teacher_terms(task, batch.nodes)
    assert list(terms) == [*expected, "l2"]
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value.detach(), rtol=1e-10, atol=1e-12)
    for mine, truth in zip(grads, torch.autograd.grad(sum(expected.values()), leaves, allow_unused=True), strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-9, atol=1e-12)


def test_weights_of_the_modalities_get_a_gradient_where_somebody_asks(dataset):
    task = _teacher_task(dataset)
    task.model.omega.requires_grad_()
    task.step(0, 0)
    assert task.model.omega.grad.ne(0).all()


def test_a_teachers_step_in_an_autocast_region(dataset):
    task = _teacher_task(dataset)
    with torch.autocast("cpu", torch.bfloat16):
        terms = task.step(0, 0)
    plain = _teacher_task(dataset).step(0, 0)
    for name, value in plain.items():
        torch.testing.assert_close(terms[name], value, rtol=0.02, atol=1e-3)


@pytest.fixture
def student_task(dataset):
    """A student's stage at its beginning, of two modalities and a prompt that learns."""
    from mmkd.models.features import FeatureTable
    from mmkd.models.prompt import Prompt, prompt_basis
    from mmkd.models.teacher import Teacher
    from mmkd.training.collapse import FrozenTeacher
    from mmkd.training.tasks import StudentTask

    config, graph, generator = quick(dim=16), BipartiteGraph.from_scipy(dataset.train), torch.Generator().manual_seed(0)
    tables = [FeatureTable(name, values, config.teacher.features) for name, values in dataset.features.items()]
    prompt = Prompt(prompt_basis(tables, 16), generator)
    teacher = Teacher(graph, tables, prompt, layers=2, strength=config.prompt.strength, generator=generator)
    frozen = FrozenTeacher(teacher)
    weights = torch.full((len(tables),), 1 / len(tables))
    return StudentTask(LightGCN(graph, torch.cat(teacher.tables()), 2), frozen, config, dataset, graph, weights)


def _step_of(task, by):
    """Terms and gradients of a step; None where there is no gradient."""
    optimizer = task.optimizer()
    optimizer.zero_grad()
    terms = by(task.batch(0, 0))
    optimizer.materialize()
    leaves = task.student.table, *task.teacher.prompt.parameters()
    return terms, [None if p.grad is None else p.grad.clone() for p in leaves]


CHANGES = {
    "nothing": lambda task: None,
    "another prompt": lambda task: setattr(
        task.teacher.prompt, "weight", torch.nn.Parameter(0.5 * task.teacher.prompt.weight.detach())
    ),
    "other weights": lambda task: setattr(task, "modality_weights", torch.tensor([0.9, 0.1])),
    "other settings": lambda task: setattr(
        task, "distill", task.distill.model_copy(update={"list_tau": 0.5, "emb_gamma": 1.0})
    ),
    "three layers": lambda task: setattr(task.student, "layers", 3),
    "a frozen prompt": lambda task: task.teacher.prompt.requires_grad_(False),
    "half a frozen prompt": lambda task: task.teacher.prompt.bias.requires_grad_(False),
    "float64": lambda task: (task.model.double(), task.teacher.double()),
    "a float64 student": lambda task: task.student.double(),
    "a hooked call": lambda task: task.student.register_forward_hook(lambda module, given, out: 2 * out),
    "a hooked gradient": lambda task: task.teacher.prompt.weight.register_hook(lambda grad: 0 * grad),
    "another forward": lambda task: setattr(task.student, "forward", lambda rows: 2 * task.student.table[rows]),
    "batches filled up": lambda task: setattr(task, "multiple", 64),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_students_step_in_one_call_is_the_one_by_autograd(student_task, change):
    task = student_task
    before = _step_of(task, task.gradients)
    assert task._gradients is not None, "the step went by autograd"
    CHANGES[change](task)
    ours, theirs = _step_of(task, task.gradients), _step_of(task, task._by_autograd)
    assert list(ours[0]) == list(theirs[0])
    for mine, other in (*zip(ours[0].values(), theirs[0].values(), strict=True), *zip(ours[1], theirs[1], strict=True)):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
    if change not in ("nothing", "batches filled up"):
        same = all(
            (a is None) == (b is None) and (a is None or (a.dtype == b.dtype and torch.equal(a, b)))
            for a, b in zip(ours[1], before[1], strict=True)
        )
        assert not same, "the change was not seen"
    optimizer = task.optimizer()
    drawn = task.batch(0, 1)
    if drawn.l2 is not None:
        drawn.l2 = drawn.l2.to(torch.float32)  # as where it was drawn before the change
    task.gradients(drawn)
    optimizer.step()
