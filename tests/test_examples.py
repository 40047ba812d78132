"""The examples run beside the real peers, and both sides agree. A peer that is not installed is skipped by name."""

from __future__ import annotations

import importlib
import logging
import sys
from pathlib import Path

import pytest

SMALL = (300, 200, 3000)


@pytest.fixture
def example(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    monkeypatch.chdir(tmp_path)  # RecBole writes logs where it stands
    monkeypatch.setattr(sys, "argv", ["example"])  # and reads the command line, pytest's here
    level = logging.getLogger().level
    yield importlib.import_module
    logging.getLogger().setLevel(level)  # and sets the level of everybody's


def test_own_loop(example):
    assert example("own_loop").main(*SMALL, steps=10)["loss"] < 1e-5


def test_compiled_step(example):
    result = example("compiled_step").main(*SMALL, batch=64, rounds=1)
    assert result["loss"] < 1e-6 and result["gradient"] < 1e-6


def test_pyg(example):
    pytest.importorskip("torch_geometric", reason="PyTorch Geometric is not installed: pip install 'mmkd[examples]'")
    result = example("pyg_lightgcn").main(*SMALL, rounds=1)
    assert max(result["output"], result["gradient"], result["conv"]) < 1e-5


def test_pyg_model_methods_stay(example):
    pytest.importorskip("torch_geometric", reason="PyTorch Geometric is not installed: pip install 'mmkd[examples]'")
    import torch

    pyg, common = example("pyg_lightgcn"), example("common")
    graph = common.random_graph(*SMALL)
    edges = common.edge_index(graph)
    theirs, ours = pyg.LightGCN(graph.num_nodes, 16, 2), pyg.FusedLightGCN(graph, 16, 2)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(edges, edges[:, :50]), theirs(edges, edges[:, :50]), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="edge_weight"):
        ours.get_embedding(edges, torch.ones(edges.shape[1]))


@pytest.mark.slow
def test_recbole(example):
    pytest.importorskip("recbole", reason="RecBole is not installed: pip install 'recbole>=1.2,<1.3'")
    result = example("recbole_lightgcn").main(epochs=3)
    assert result["loss"] < 1e-4 and result["last"] < 0.9 * result["first"]
