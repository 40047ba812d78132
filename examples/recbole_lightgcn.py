"""RecBole 1.2's own LightGCN with mmkd's propagation and BPR, trained by RecBole's own trainer on its own data.

Needs: pip install "recbole>=1.2,<1.3". RecBole 1.2.1 was written for older libraries; `_for_todays_libraries` below says what broke.

python examples/recbole_lightgcn.py        ml-100k: the loss curve of both, seconds an epoch of both
"""

from __future__ import annotations

import logging
import statistics
import time

import numpy as np
import scipy.sparse as sp
import torch
from common import report
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.general_recommender import LightGCN
from recbole.trainer import Trainer
from recbole.utils import init_seed

from mmkd import BipartiteGraph, ops


def _for_todays_libraries() -> None:
    """Names that RecBole 1.2.1 uses and that numpy 2.0 and scipy 1.13 took away; this gives them back."""
    for old, new in (("float_", np.float64), ("complex_", np.complex128), ("object_", object), ("unicode_", np.str_)):
        if not hasattr(np, old):
            setattr(np, old, new)
    if not hasattr(sp.dok_matrix, "_update"):  # how its LightGCN fills the adjacency matrix
        sp.dok_matrix._update = lambda self, entries: self._dict.update(entries)


class FusedLightGCN(LightGCN):
    """Everything is RecBole's but the propagation and the loss."""

    def __init__(self, config, dataset) -> None:
        super().__init__(config, dataset)
        self.graph = BipartiteGraph.from_scipy(self.interaction_matrix).to(self.device)

    def get_norm_adj_mat(self):
        return torch.empty(0)  # not needed

    def forward(self):
        out = ops.propagate(self.graph, self.get_ego_embeddings(), self.n_layers)
        return out.split([self.n_users, self.n_items])

    def calculate_loss(self, interaction):
        self.restore_user_e = self.restore_item_e = None
        users, pos, neg = (interaction[name] for name in (self.USER_ID, self.ITEM_ID, self.NEG_ITEM_ID))
        bpr = ops.bpr_loss(*self.forward(), users, pos, neg)
        own = (self.user_embedding(users), self.item_embedding(pos), self.item_embedding(neg))
        return bpr + self.reg_weight * self.reg_loss(*own, require_pow=self.require_pow)


class Training:
    """One model with RecBole's trainer and loader, an epoch at a time."""

    def __init__(self, model: type[LightGCN], settings: dict) -> None:
        config = Config(model="LightGCN", dataset="ml-100k", config_dict=settings)
        logging.getLogger().setLevel(logging.ERROR)
        init_seed(config["seed"], True)
        self.data = data_preparation(config, create_dataset(config))[0]
        init_seed(config["seed"], True)
        self.model = model(config, self.data._dataset).to(config["device"])
        self.trainer = Trainer(config, self.model)

    def epoch(self, number: int) -> tuple[float, float]:
        """Loss and seconds; batches and negatives depend on the epoch alone."""
        init_seed(number, True)
        start = time.perf_counter()
        loss = self.trainer._train_epoch(self.data, number)
        return float(loss), time.perf_counter() - start


def main(epochs: int = 5, **settings) -> dict[str, float]:
    """Largest relative difference of the epochs' losses, and median seconds an epoch of both, epochs alternating."""
    _for_todays_libraries()
    settings = {"device": "cpu", "use_gpu": False, "show_progress": False, "seed": 2020, "state": "ERROR", **settings}
    theirs, ours = Training(LightGCN, settings), Training(FusedLightGCN, settings)
    curve = [(theirs.epoch(number), ours.epoch(number)) for number in range(epochs)]
    for number, ((loss, _), (other, _)) in enumerate(curve):
        print(f"epoch {number}: loss {loss:.6f}, with mmkd {other:.6f}")
    result = {
        "loss": max(abs(a[0] - b[0]) / a[0] for a, b in curve),
        "theirs": statistics.median(a[1] for a, _ in curve),
        "ours": statistics.median(b[1] for _, b in curve),
        "first": curve[0][0][0],
        "last": curve[-1][0][0],
    }
    report("epoch of ml-100k", "RecBole", result["theirs"], result["ours"], result["loss"])
    return result


if __name__ == "__main__":
    main()
