"""Training on a GPU, and in bfloat16: the same trainer. No GPU runs here: the steps are taken by fake tensors of another
device, which refuse to meet tensors of the CPU."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode

import mmkd
from mmkd import backends, ops
from mmkd.config import Config, ConfigError, load_config
from mmkd.data import synthetic
from mmkd.models.baselines import TRAINED
from mmkd.models.features import FeatureTable
from mmkd.models.lightgcn import LightGCN, initial_table
from mmkd.models.prompt import Prompt
from mmkd.models.teacher import Teacher
from mmkd.training.baseline_task import BaselineTask
from mmkd.training.collapse import FrozenTeacher
from mmkd.training.recorded import RandomBytes
from mmkd.training.stage import SIZE, Stage
from mmkd.training.tasks import LightGCNTask, StudentTask, TeacherTask
from mmkd.training.trainer import pick_device

GPU = torch.device("meta")  # autograd knows no CUDA device where torch has none


@pytest.fixture(scope="module")
def dataset():
    return synthetic(120, 90, 2500, seed=3)


def config(**changes) -> Config:
    stage = {"epochs": 6, "eval_every": 2, "batch_size": 256, "layers": 2}
    quick = {"dim": 16, "progress": False, "baselines": ["lightgcn"], "evaluation": {"ks": [20, 50]}}
    return Config.model_validate(quick | dict.fromkeys(("teacher", "student", "lightgcn"), stage) | changes)


def fake(t: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(t, device=GPU)


def to_gpu(module: torch.nn.Module, graph) -> None:
    """Puts fake tensors of another device in the place of the module's parameters, buffers, graph and features."""
    for part in module.modules():
        for name, p in part._parameters.items():
            part._parameters[name] = torch.nn.Parameter(fake(p.detach()), p.requires_grad)
        for name, b in part._buffers.items():
            part._buffers[name] = None if b is None else fake(b)
        if hasattr(part, "graph"):
            part.graph = graph
        for table in getattr(part, "features", ()):
            table.values, table.mean, table.scale = fake(table.values), fake(table.mean), fake(table.scale)


@pytest.mark.parametrize("name", TRAINED)
def test_every_baseline_keeps_to_the_gpu(dataset, name, monkeypatch):
    graph, kind = dataset.graph(), TRAINED[name]
    features = [FeatureTable(m, x) for m, x in dataset.features.items()]
    model = kind(graph, features, 16, kind.Settings(batch_size=256), torch.Generator().manual_seed(0))
    task = BaselineTask(name, model, dataset, 0)
    drawn, expected = task.batch(0, 0), set(task.step(0, 0))
    task.batch = lambda epoch, step: drawn  # `step` moves it
    monkeypatch.setattr(backends, "resolve", lambda op, x, impl="auto": "cuda")
    with FakeTensorMode(allow_non_fake_inputs=True):
        to_gpu(model, graph.to(GPU))
        if name == "lattice":
            model.initial, model.learned = (
                [tuple(map(fake, part)) for part in model.initial],
                [*map(fake, model.learned)],
            )
        task.optimizer().zero_grad(set_to_none=True)
        terms = task.step(0, 0)
        assert set(terms) == expected and all(t.device == GPU for t in terms.values())
        assert all(p.grad is not None and p.grad.device == GPU for p in model.parameters())


@pytest.mark.parametrize(("amp", "norm"), [(None, "mean"), ("bf16", "row")])
def test_every_step_keeps_to_the_gpu(dataset, amp, norm, monkeypatch):
    """A tensor left on the CPU by any step, forward or backward, is an error of the fake tensors."""
    c, graph, compute = config(amp=amp, prompt={"norm": norm}), dataset.graph(), torch.bfloat16 if amp else None
    tables = [FeatureTable(name, x) for name, x in dataset.features.items()]
    teacher = Teacher(
        graph, tables, Prompt(torch.randn(dataset.num_items, c.dim)), layers=2, norm=norm, compute=compute
    )
    frozen = FrozenTeacher(teacher)
    table = initial_table(graph.num_nodes, c.dim, "xavier", None)
    weights = torch.ones(len(tables))

    def tasks_of(graph, weights):
        light, student = (LightGCN(graph, table, 2, compute) for _ in range(2))
        return [
            LightGCNTask(light, c.lightgcn, dataset, graph, 0),
            TeacherTask(teacher, c, dataset, graph),
            StudentTask(student, frozen, c, dataset, graph, weights),
        ]

    real, elsewhere = tasks_of(graph, weights), graph.to(GPU)
    expected, batches = {t.name: set(t.step(0, 0)) for t in real}, {}
    for task in real:
        task.graph, task.multiple = elsewhere, SIZE  # batches are what they are for a graph there
        batches[task.name] = task._batch(0, 0)
    monkeypatch.setattr(backends, "resolve", lambda op, x, impl="auto": "cuda")
    monkeypatch.setattr(RandomBytes, "fill", lambda self, out: out.fill_(0))  # no generator is of a device that is none
    with FakeTensorMode(allow_non_fake_inputs=True):
        there = graph.to(GPU)
        for task in real:
            to_gpu(task.model, there)
            if task.name == "student":
                to_gpu(frozen, there)
                for name in ("modality_weights", "emb_modalities", "lambdas"):
                    setattr(task, name, fake(getattr(task, name)))
            task.graph = there
            task.batch = lambda epoch, step, drawn=batches[task.name]: drawn  # `step` moves it
            terms = task.step(0, 0)
            assert set(terms) == expected[task.name]
            assert all(v.device == GPU and v.dtype == torch.float32 for v in terms.values())
            for name, p in task.model.named_parameters():
                if not p.requires_grad:  # omega, which is read off validation
                    continue
                assert p.grad is not None and p.grad.device == GPU and p.grad.dtype == torch.float32, name
            assert all(t.device == GPU and t.dtype == torch.float32 for t in task.tables())


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory):
    """The same run in float32 and in bfloat16, and the types `ops.propagate` saw in each, in training steps (which ask for
    rows; a table that holds its gradient is propagated without autograd) and elsewhere."""
    real, seen, done = ops.propagate, {}, {}
    with pytest.MonkeyPatch.context() as patch:
        for amp in (None, "bf16"):
            types = seen.setdefault(amp, {True: set(), False: set()})

            def spy(graph, x, *rest, types=types, **named):
                types[torch.is_grad_enabled() or named.get("rows") is not None].add(named.get("gather") or x.dtype)
                return real(graph, x, *rest, **named)

            patch.setattr(ops, "propagate", spy)
            done[amp] = mmkd.train(config(amp=amp), out=tmp_path_factory.mktemp("amp") / str(amp), dataset=dataset)
    return done, seen


def test_bf16_trains_in_bf16_and_keeps_float32_weights_and_results(runs):
    done, seen = runs
    assert seen[None] == {True: {torch.float32}, False: {torch.float32}}
    assert seen["bf16"] == {True: {torch.bfloat16}, False: {torch.float32}}
    for name in ("student", "teacher"):
        weights = load_file(done["bf16"].path / f"{name}.safetensors")
        assert {t.dtype for t in weights.values()} == {torch.float32}
        if name == "student":  # master weights, not weights that were rounded
            table = weights["user_emb0"]
            assert not torch.equal(table, table.bfloat16().float())


def test_bf16_learns_what_float32_learns(runs):
    done, _ = runs
    for method in ("LightGCN", "teacher", "MMKD student"):
        one, other = (done[amp].rows[method]["recall@50"] for amp in (None, "bf16"))
        assert one > 0.3 and abs(one - other) < 0.05, (method, one, other)


def test_the_options_reach_the_settings(tmp_path):
    from typer.testing import CliRunner

    from mmkd.cli import app

    run = tmp_path / "r"
    arguments = ["train", "--data", "synthetic", "--out", str(run), "--device", "cpu", "--amp", "bf16"]
    arguments += ["--set", "baselines=[]", "--set", "dim=8", "--set", "progress=false"]
    arguments += [a for stage in ("teacher", "student") for a in ("--set", f"{stage}.epochs=1")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    saved = load_config(run / "config.yaml")
    assert (saved.device, saved.amp) == ("cpu", "bf16")


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="setting 'amp'"):
        load_config(overrides=["amp=fp8"])
    if not torch.cuda.is_available():
        assert pick_device("auto").type == "cpu"
        with pytest.raises(ConfigError, match="torch sees no CUDA device"):
            pick_device("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("amp", [None, "bf16"])
def test_on_a_gpu_the_run_is_the_cpu_s(amp, dataset, runs, tmp_path):
    there = mmkd.train(config(amp=amp, device="cuda"), out=tmp_path / "r", dataset=dataset)
    for method, metrics in runs[0][amp].rows.items():
        assert abs(there.rows[method]["recall@50"] - metrics["recall@50"]) < 0.05, method


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_a_resumed_run_ends_where_the_whole_one_does(dataset, tmp_path, monkeypatch):
    c, inner = config(device="cuda", baselines=[], checkpoint_every=1), Stage._epoch

    def break_off(self, steps, state, *rest):
        if self.task.name == "student" and state["epoch"] == 3:
            raise KeyboardInterrupt
        return inner(self, steps, state, *rest)

    whole = mmkd.train(c, out=tmp_path / "whole", dataset=dataset)
    with monkeypatch.context() as patch:
        patch.setattr(Stage, "_epoch", break_off)
        with pytest.raises(KeyboardInterrupt):
            mmkd.train(c, out=tmp_path / "r", dataset=dataset)
    again = mmkd.train(c, out=tmp_path / "r", dataset=dataset, resume=True)
    mine, truth = (load_file(run.path / "student.safetensors") for run in (again, whole))
    for name, values in truth.items():
        torch.testing.assert_close(mine[name], values, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
