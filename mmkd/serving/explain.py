"""Which of a user's own items carry a score: the exact decomposition of LightGCN's inner product."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from mmkd import ops
from mmkd.config import ConfigError, load_config
from mmkd.graph import BipartiteGraph
from mmkd.serving.recommend import RunLoadError, load, load_layer0

TRAIN = 1.0  # in seen.npz; validation interactions are 2: no message passes along them


@dataclass(frozen=True)
class Reason:
    """An item of the user's train interactions and what it adds to the score."""

    item: object  # original id
    score: float


class Explainer:
    """Splits a score into what each train item of the user adds, and the rest.

    The last step of propagation (paper, Eq. 2) is a sum over the user's train items `N_u`, so the user's row is one too:

        e_u = E0_u / (L+1) + sum_{j in N_u} s_u s_j P_j,    P = 1/(L+1) sum_{l=0..L-1} A_hat^l E0,    s = D^-1/2
        score(u, i) = e_u . e_i = own(u, i) + sum_{j in N_u} c_j(u, i)
        own(u, i) = E0_u . e_i / (L+1),    c_j(u, i) = s_u s_j P_j . e_i

    It is exact, not an approximation. `own` is what the user's free parameters add by themselves; an item may subtract.

    Args:
        user_emb, item_emb: final tables, float `[U, d]`, `[I, d]`. user_emb0, item_emb0: the layer-0 tables.
        train: sparse `U x I`. layers: `L`.

    Raises:
        RunLoadError: the final tables are not the propagation of the layer-0 tables over `train`.
    """

    def __init__(
        self, user_emb: Tensor, item_emb: Tensor, user_emb0: Tensor, item_emb0: Tensor, train: sp.csr_matrix,
        layers: int, item_ids: np.ndarray,
    ) -> None:  # fmt: skip
        graph, table = BipartiteGraph.from_scipy(train), torch.cat([user_emb0, item_emb0])
        final, made = torch.cat([user_emb, item_emb]), ops.propagate(graph, table, layers)
        if not torch.allclose(made, final, rtol=1e-3, atol=1e-4 * float(final.abs().max())):
            raise RunLoadError(
                "the final tables are not the propagation of the layer-0 tables over the train interactions, so scores "
                "cannot be explained; train again with this version"
            )
        earlier = ops.propagate(graph, table, layers - 1) if layers else torch.zeros_like(table)
        scaled = graph.scale[:, None] * earlier * (layers / (layers + 1))
        self._user_scale = graph.scale[: graph.num_users].numpy()
        self._carry = scaled[graph.num_users :].numpy()  # s_j P_j, [I, d]
        self._own = (user_emb0 / (layers + 1)).numpy()
        self._items, self._item_ids, self._train = item_emb.numpy(), item_ids, train

    def contributions(self, user: int, items: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`N_u` (rows of items, `[n]`), `c_j(u, i)` `[k, n]` and `own(u, i)` `[k]` for item rows `[k]` of one user row."""
        near = self._train.indices[self._train.indptr[user] : self._train.indptr[user + 1]]
        target = self._items[items]
        return near, target @ self._carry[near].T * self._user_scale[user], target @ self._own[user]

    def reasons(self, user: int, items: np.ndarray, count: int = 3) -> list[list[Reason]]:
        """For each item row the `count` train items that add most, largest first; fewer for a user who has fewer."""
        near, parts, _ = self.contributions(user, items)
        order = np.argsort(-parts, axis=1, kind="stable")[:, :count]
        return [
            [Reason(self._item_ids[near[j]].item(), float(row[j])) for j in best]
            for row, best in zip(parts, order, strict=True)
        ]


def load_explainer(run_dir: str | Path) -> Explainer:
    """The :class:`Explainer` of a run folder.

    Raises:
        RunLoadError: a file is missing or damaged, or the run was made before explanations were.
    """
    student = load(run_dir)
    train = student.seen.multiply(student.seen == TRAIN).tocsr()
    train.eliminate_zeros()
    train.sort_indices()
    try:
        layers = load_config(Path(run_dir) / "config.yaml").student.layers
        tables = student.user_emb, student.item_emb, *load_layer0(run_dir, student)
        return Explainer(*tables, train, layers, student.item_ids)
    except (RunLoadError, ConfigError) as error:
        raise RunLoadError(f"{run_dir}: cannot be explained: {error}") from None
