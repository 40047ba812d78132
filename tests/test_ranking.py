"""Shared negatives and the softmax over them; neighbour graphs that know nothing of taste."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import mmkd
from mmkd import ops
from mmkd.data import synthetic
from mmkd.models.neighbors import neighbor_graph
from mmkd.training.fusion import knows_taste
from mmkd.training.ranking import SharedNegatives, ranking_loss
from mmkd.training.run_folder import RunFolder
from mmkd.training.stage import node_batch


@pytest.fixture(scope="module")
def dataset():
    return synthetic(120, 90, 2500, seed=3)


def test_shared_negatives_are_distinct_and_know_who_has_them(dataset):
    draw, users = SharedNegatives(dataset.train, 20, seed=5), torch.tensor([7, 0, 7, 119])
    one, again, other = draw(2, 3, users), SharedNegatives(dataset.train, 20, seed=5)(2, 3, users), draw(2, 4, users)
    assert len(one.items) == len(set(one.items)) == 20
    assert (one.items == again.items).all() and (one.owned == again.owned).all() and (one.items != other.items).any()
    has = dataset.train.toarray()[users][:, one.items] != 0
    assert sorted(zip(*one.owned.tolist(), strict=True)) == list(
        zip(*(a.tolist() for a in np.nonzero(has)), strict=True)
    )
    assert has.any()
    every = SharedNegatives(dataset.train, 10**6, seed=5)(0, 0, users)
    assert every.items.tolist() == list(range(dataset.num_items))
    assert not len(SharedNegatives(dataset.train, 0, seed=5)(0, 0, users).items)
    drawn = np.concatenate([draw(epoch, 0, users).items for epoch in range(900)])
    counts = np.bincount(drawn, minlength=dataset.num_items)
    assert abs(counts - 200).max() < 5 * (200 * 70 / 90) ** 0.5  # uniform: 900 draws of 20 among 90


def test_the_softmax_against_the_written_out_formula(dataset):
    users, candidates = torch.tensor([7, 0, 7]), torch.from_numpy(dataset.train.indices[[300, 0, 301]].astype(np.int64))
    candidates = torch.stack([candidates, torch.tensor([4, 8, 15])], 1)
    shared = SharedNegatives(dataset.train, 30, seed=1)(0, 0, users)
    batch = node_batch(users, candidates, 120, 90, extra=torch.tensor([3, 150]), shared=shared)
    assert batch.rows[batch.extra].tolist() == [3, 150]
    assert (batch.rows[batch.num_users :][batch.shared] - 120).tolist() == shared.items.tolist()
    table = torch.randn(210, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ours = ranking_loss(*table[batch.rows].split([batch.num_users, len(batch.rows) - batch.num_users]), batch)
    has, truth = dataset.train.toarray() != 0, 0.0
    for user, item in zip(users, candidates[:, 0], strict=True):
        others = [j for j in shared.items.tolist() if not has[user, j]]
        scores = table[120 + torch.tensor([item, *others])] @ table[user]
        truth = truth - scores.log_softmax(0)[0] / 3
    torch.testing.assert_close(ours, truth)
    grads = torch.autograd.grad(ours, table)[0], torch.autograd.grad(truth, table)[0]
    torch.testing.assert_close(*grads)


def test_without_shared_items_it_is_bpr():
    users, candidates = torch.tensor([1, 0]), torch.tensor([[0, 2], [1, 0]])
    batch = node_batch(users, candidates, 2, 3)
    tables = torch.randn(2, 4), torch.randn(3, 4)
    assert torch.equal(ranking_loss(*tables, batch), ops.bpr_loss(*tables, users, candidates[:, 0], candidates[:, 1]))


def test_every_stage_takes_shared_negatives(dataset, tmp_path):
    stage = {"epochs": 4, "eval_every": 1, "batch_size": 256, "shared_negatives": 40, "lr": 0.02}
    config = {
        "dim": 8, "progress": False, "teacher": stage, "student": stage, "lightgcn": stage,
        "baselines": ["popularity", "lightgcn"], "evaluation": {"ks": [20]},
    }  # fmt: skip
    run = mmkd.train(config, out=tmp_path / "r", dataset=dataset)
    by_stage: dict = {}
    for line in RunFolder(run.path).metrics():
        by_stage.setdefault(line["stage"], []).append(line["ranking"])
    assert set(by_stage) == {"teacher", "student", "lightgcn"}
    for name in ("teacher", "lightgcn"):
        assert by_stage[name][0] > 2 and by_stage[name][-1] < by_stage[name][0]  # log 41 = 3.7 at the start


def test_a_neighbour_graph_that_knows_nothing_of_taste_is_told_apart():
    data = synthetic(300, 400, 9000, taste=8.0, zipf=0.0, noise=0.1, latent_dim=4, seed=3)
    informed = torch.from_numpy(np.concatenate([np.asarray(x, np.float32) for x in data.features.values()], 1))
    blind = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
    assert knows_taste(neighbor_graph(informed, 10), data, "recall@20")
    popular = synthetic(300, 400, 9000, taste=0.0, zipf=1.5, noise=0.1, latent_dim=4, seed=3)
    assert not knows_taste(neighbor_graph(blind, 10), popular, "recall@20")
