"""The trained baselines: each learns the planted signal, each parameter gets a gradient, settings are checked."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import mmkd
from mmkd import ops
from mmkd.config import Config, ConfigError, load_config
from mmkd.data import synthetic
from mmkd.evaluation import evaluate, evaluate_scores
from mmkd.models.baselines import NAMES, TITLES, TRAINED, Popularity
from mmkd.models.baselines.base import dropout, in_batch_nce, unit_rows
from mmkd.models.features import FeatureTable
from mmkd.models.lightgcn import initial_table
from mmkd.models.student import ENCODERS
from mmkd.training.baseline_task import BaselineTask
from mmkd.training.checkpoint import load_checkpoint
from mmkd.training.run_folder import RunFolder
from mmkd.training.stage import Stage, node_batch
from mmkd.training.stop import RunStopped, Stop

QUICK = {"lr": 2e-2, "batch_size": 512, "epochs": 25}
OWN = {
    "clcrec": {"negatives": 8},
    "grcn": {"routings": 1},
    "bm3": {"layers": 1, "dropout": 0.2, "cl_weight": 0.1, "epochs": 40},
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The models are tiny: a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def planted():
    return synthetic(150, 120, 3600, taste=8.0, zipf=0.2, noise=0.2, latent_dim=4, seed=5)


def build(name: str, dataset, **settings):
    kind = TRAINED[name]
    features = [FeatureTable(m, x) for m, x in dataset.features.items()]
    chosen = kind.Settings(**QUICK | OWN.get(name, {}) | settings)
    return kind(dataset.graph(), features, 16, chosen, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", TRAINED)
def test_it_beats_popularity_on_planted_taste(name, planted):
    model = build(name, planted)
    task = BaselineTask(name, model, planted, seed=3)
    optimizer = task.optimizer()
    for epoch in range(model.settings.epochs):
        for step in range(-(-planted.train.nnz // model.settings.batch_size)):
            optimizer.zero_grad(set_to_none=True)
            terms = task.step(epoch, step)
            optimizer.step()
    assert all(torch.isfinite(value) for value in terms.values())
    popular = evaluate_scores(Popularity().fit(planted).scores, planted, "test", (20,))["recall@20"]
    assert evaluate(*model.tables(), planted, "test", (20,))["recall@20"] > 1.3 * popular


@pytest.mark.parametrize("name", TRAINED)
def test_every_parameter_learns_and_a_step_repeats(name, planted):
    gradients = []
    for _ in range(2):
        model = build(name, planted)
        BaselineTask(name, model, planted, seed=3).step(0, 0)
        gradients.append({key: p.grad for key, p in model.named_parameters()})
    for key, grad in gradients[0].items():
        assert grad is not None and grad.abs().sum() > 0, f"{name}: {key} gets no gradient"
        assert torch.equal(grad, gradients[1][key]), f"{name}: {key} differs between two equal steps"


@pytest.mark.parametrize("name", TRAINED)
def test_evaluation_is_free_of_dropout_and_of_held_out_items(name, planted):
    model = build(name, planted)
    first, second = model.tables(), model.tables()
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(first, second, strict=True))
    assert model.graph.num_edges == planted.train.nnz


@pytest.mark.parametrize("name", TRAINED)
def test_vectors_of_some_nodes_are_those_of_all(name, planted):
    for settings in ({}, {"layers": 1} if "layers" in TRAINED[name].Settings.model_fields else {}):
        model = build(name, planted, **settings)
        for parameter in model.parameters():  # VBPR's biases start at 0
            parameter.data.add_(0.1 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(2)))
        every, nodes = model.vectors(), torch.tensor([0, 3, 149, 150, 151, 269])
        some_nodes = SimpleNamespace(rows=nodes, num_users=3)
        torch.testing.assert_close(model.vectors(nodes=some_nodes), every[nodes], rtol=1e-5, atol=1e-6)
        weights = torch.randn(6, every.shape[1], generator=torch.Generator().manual_seed(3))
        for parameter, full, some in zip(
            model.parameters(),
            torch.autograd.grad((every[nodes] * weights).sum(), list(model.parameters()), allow_unused=True),
            torch.autograd.grad(
                (model.vectors(nodes=some_nodes) * weights).sum(), list(model.parameters()), allow_unused=True
            ),
            strict=True,
        ):
            assert (full is None) == (some is None), parameter.shape
            if full is not None:
                torch.testing.assert_close(some, full, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vbpr", "mmgcn", "grcn", "clcrec"])
def test_the_l2_term_is_that_of_the_batch_s_rows(name, planted):
    model = build(name, planted, l2=0.5)
    users, candidates = torch.tensor([3, 3, 8]), torch.tensor([[1, 5, 7], [2, 5, 8], [5, 9, 30]])
    found = model.l2(node_batch(users, candidates, 150, planted.num_items))
    free_users = [model.split(model.table)[0], *model.user_rows(torch.arange(150))]
    free_items = [model.split(model.table)[1], *model.item_rows(torch.arange(120))]
    truth = sum(t[users].square().sum() for t in free_users) + sum(
        t[candidates[:, :2]].square().sum() for t in free_items
    )
    torch.testing.assert_close(found, 0.5 * 0.5 / 3 * truth)


def test_ngcf_against_dense_algebra(planted):
    model = build("ngcf", planted, layers=2)
    adjacency = np.zeros((270, 270))
    adjacency[:150, 150:] = planted.train.toarray()
    adjacency += adjacency.T
    scale = np.where(adjacency.sum(1) > 0, np.maximum(adjacency.sum(1), 1) ** -0.5, 0)
    laplacian = torch.from_numpy(scale[:, None] * adjacency * scale).float()
    x, layers = model.table, [model.table]
    for own, affinity in zip(model.own, model.affinity, strict=True):
        x = torch.nn.functional.leaky_relu((laplacian @ x + x) @ own + (laplacian @ x * x) @ affinity, 0.2)
        layers.append(torch.nn.functional.normalize(x, dim=1))
    torch.testing.assert_close(model.vectors(), torch.cat(layers, 1), rtol=1e-4, atol=1e-6)


def test_vbpr_scores_are_equation_4(planted):
    model = build("vbpr", planted)
    for p in model.visual_bias:
        torch.nn.init.normal_(p)
    users, items = model.tables()
    own, of_items = model.split(model.table)
    expected = own @ of_items.T + model.bias.T
    for table, e, theta, beta in zip(model.features, model.embedding, model.taste, model.visual_bias, strict=True):
        content = table.prepared() / table.width**0.5
        expected = expected + theta @ (content @ e).T + (content @ beta).T
    torch.testing.assert_close(users @ items.T, expected.detach(), rtol=1e-3, atol=1e-3)


def test_lattice_graph_against_dense_algebra(planted):
    model = build("lattice", planted, neighbors=7)
    ids, values = model.initial[0]
    unit = torch.nn.functional.normalize(model.features[0].prepared(), dim=1).double()
    similar = unit @ unit.T
    kept = torch.zeros_like(similar).scatter(1, similar.topk(7).indices, 1.0) * similar.clamp(min=0)
    scale = kept.sum(1).rsqrt()
    dense = torch.zeros_like(similar).scatter(1, ids, values.double())
    torch.testing.assert_close(dense, scale[:, None] * kept * scale, rtol=1e-4, atol=1e-6)


def test_grcn_affinities_are_a_softmax_over_neighbours(planted):
    model = build("grcn", planted)
    nodes, g = torch.randn(model.graph.num_nodes, 16, generator=torch.Generator().manual_seed(0)), model.graph
    weight, total = model._affinity(nodes)
    weights = weight / total[:, 0].repeat_interleave(g.degree)
    for row in (0, 7, 200):
        start, end = int(g.rowptr[row]), int(g.rowptr[row + 1])
        truth = (nodes[row] @ nodes[g.col[start:end].long()].T).softmax(0)
        torch.testing.assert_close(weights[start:end], truth)


def test_unit_rows_are_those_of_torch():
    x = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[2] = 0
    found, truth = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.testing.assert_close(unit_rows(found), torch.nn.functional.normalize(truth, dim=1))
    weights = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (unit_rows(found) * weights).sum().backward()
    (torch.nn.functional.normalize(truth, dim=1) * weights).sum().backward()
    torch.testing.assert_close(found.grad, truth.grad)
    assert torch.autograd.gradcheck(unit_rows, x[:2].clone().requires_grad_())


def test_dropout_and_info_nce():
    generator = torch.Generator().manual_seed(0)
    x = torch.ones(400, 50)
    dropped = dropout(x, 0.25, generator)
    assert abs((dropped == 0).float().mean() - 0.25) < 0.02 and abs(dropped.mean() - 1) < 0.02
    assert dropout(x, 0.25, None) is x
    a, b = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    cosine = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=2) / 0.3
    truth = -(cosine.diag() - cosine.logsumexp(1)).mean()
    torch.testing.assert_close(in_batch_nce(a, b, 0.3), truth)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_students_agree_on_rows_and_start_near_their_table(encoder, planted):
    graph = planted.graph()
    table = initial_table(graph.num_nodes, 16, "normal", torch.Generator().manual_seed(0))
    student = ENCODERS[encoder](graph, table, 2)
    rows = torch.tensor([3, 9, 160, 200])
    torch.testing.assert_close(student(rows), student()[rows])
    ops.bpr_loss(*student().split([150, 120]), rows[:2], rows[:2], rows[:2] + 5).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())


def test_one_model_alone_through_the_trainer(planted, tmp_path):
    config = {
        "model": "bm3", "models": {"bm3": {**QUICK, "epochs": 2}}, "baselines": ["popularity"], "dim": 8, "progress": False,
        "evaluation": {"ks": [20, 50]},
    }  # fmt: skip
    run = mmkd.train(config, out=tmp_path / "r", dataset=planted)
    assert list(run.rows) == ["popularity", "BM3"]
    assert len(run.recommend(3, 5)[0]) == 5
    info = json.loads((run.path / "run.json").read_text())
    assert info["parameters"]["BM3"] > 270 * 8
    again = load_config(run.path / "config.yaml")
    assert again.models["bm3"]["layers"] == 2, "the settings of the baseline are written out in full"


@pytest.mark.parametrize("encoder", ["gcn", "mlp"])
def test_other_students_through_the_trainer(encoder, planted, tmp_path):
    config = {
        "student": {"encoder": encoder, "epochs": 2, "layers": 2}, "teacher": {"epochs": 2}, "baselines": [], "dim": 8,
        "progress": False, "evaluation": {"ks": [20]},
    }  # fmt: skip
    run = mmkd.train(config, out=tmp_path / "r", dataset=planted)
    assert run.rows["MMKD student"]["recall@20"] > 0.05


def test_names_and_refusals(planted, tmp_path):
    assert set(TITLES) == set(NAMES)
    for content, message in (
        ({"model": "bm4"}, "unknown model 'bm4'; did you mean 'bm3'"),
        ({"baselines": ["light"]}, "unknown model 'light'; did you mean 'lightgcn'"),
        ({"models": {"ngcf": {"layer": 2}}}, "unknown setting 'models.ngcf.layer'; did you mean 'models.ngcf.layers'"),
        ({"models": {"ngcf": {"lr": -1}}}, "setting 'models.ngcf.lr'"),
        ({"models": {"ngcf": 3}}, "expected a mapping"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(content)
    with pytest.raises(ConfigError, match="item features, which bm3 learns from"):
        mmkd.train({"model": "bm3", "baselines": []}, out=tmp_path / "f", dataset=replace(planted, features={}))
    assert Config.model_validate({"model": "vbpr"}).models["vbpr"]["lr"] == 1e-3


def test_lattice_stopped_within_an_epoch_keeps_its_neighbours(planted, tmp_path, monkeypatch):
    config = {
        "model": "lattice", "baselines": [], "dim": 8, "progress": False, "evaluation": {"ks": [20]},
        "models": {"lattice": {"lr": 5e-2, "batch_size": 256, "epochs": 4, "eval_every": 1, "neighbors": 5}},
    }  # fmt: skip
    whole = mmkd.train(config, out=tmp_path / "whole", dataset=planted)
    looks = [line["val_recall@20"] for line in RunFolder(whole.path).metrics()]
    alone = replace(planted, test=None)
    part = mmkd.train(config, out=tmp_path / "val", dataset=alone)
    assert part.rows["LATTICE"]["recall@20"] == max(looks), "the best look is not what its weights give"

    stop, original = Stop(), Stage._check_finite

    def request(self, epoch, steps, optimizer):
        original(self, epoch, steps, optimizer)
        if (epoch, steps[-1][0]) == (2, 3):
            stop.request()

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "_check_finite", request)
        with pytest.raises(RunStopped):
            mmkd.train(config, out=tmp_path / "r", dataset=planted, stop=stop)
    again = mmkd.train(config, out=tmp_path / "r", dataset=planted, resume=True)
    one, other = (load_checkpoint(r.path / "checkpoints" / "lattice.safetensors")[0] for r in (whole, again))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_lattice_refuses_neighbours_that_cannot_be(planted):
    model = build("lattice", planted, neighbors=5)
    model.begin_epoch(0)
    good = model.epoch_tensors()
    model.resume_epoch(good)
    far = good["learned.0"].clone()
    far[0, 0] = planted.num_items
    for bad in ({}, good | {"learned.0": good["learned.0"].float()}, good | {"learned.0": far}):
        with pytest.raises(ValueError, match="expected the neighbours of 120 items"):
            model.resume_epoch(bad)
