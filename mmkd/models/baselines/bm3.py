"""BM3: Bootstrap Latent Representations for Multi-modal Recommendation (Zhou et al., WWW 2023)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mmkd import ops
from mmkd.models.baselines.base import Baseline, BaselineConfig, Nodes, dropout, rows_of


class BM3Config(BaselineConfig):
    """Settings of BM3."""

    draw: Literal["users", "pairs"] = Field("pairs", description="what a batch draws uniformly")
    layers: int = Field(2, ge=0, le=8, description="LightGCN layers of the ids")
    dropout: float = Field(0.3, ge=0, lt=1, description="probability of the contrastive view's embedding dropout")
    cl_weight: float = Field(2.0, ge=0, description="weight of the alignment and mask terms")


class BM3(Baseline):
    """Bootstrapping without negatives: an online view predicts a dropped-out, detached target view.

    Backbone: `H = 1/(L+1) sum_l Â^l E`, items get their layer 0 added (the residual); features `h^m = x^m W^m + b^m`.
    Views: target `ḣ = h . Bernoulli(1 - p)`, detached; prediction `h̃ = h W_p + b_p`, one predictor for all.
    With `C(a, b) = -cos(a, b)`: reconstruction of the interactions `L_rec = C(h̃_u, ḣ_i) + C(ḣ_u, h̃_i)`, alignment across
    modalities `L_align = sum_m C(h̃^m, ḣ_i)` and within one `L_mask = sum_m C(h̃^m, ḣ^m)`;
    `L = L_rec + w (L_align + L_mask) + λ ||Θ||^2`, ranked by `h̃_u . h̃_i`.
    There are no negatives: what keeps popular items in front is that they are drawn more often, so batches are uniform
    over train pairs.
    """

    Settings = BM3Config
    needs_features = True

    def __init__(self, graph, features, dim, settings, generator=None) -> None:
        super().__init__(graph, features, dim, settings, generator)
        self.project = nn.ParameterList(self.dense(table.width, dim) for table in self.features)
        self.offset = nn.ParameterList(self._offset(table.width) for table in self.features)
        self.predict_weight, self.predict_bias = self.dense(dim, dim), self._offset(dim)

    def _offset(self, fan_in: int) -> nn.Parameter:
        """A bias as a linear layer starts it: from 0 it stays there, and a popular item cannot lean on a common direction."""
        bound = fan_in**-0.5
        return nn.Parameter(torch.empty(self.dim).uniform_(-bound, bound, generator=self.generator))

    def _online(self, nodes: Nodes | None) -> Tensor:
        """`H`, items with their layer 0 added, of `nodes` (of all where None)."""
        hidden = ops.propagate(self.graph, self.table, self.settings.layers, rows=rows_of(nodes))
        users, items = self.sides(nodes)
        residual = self.split(self.table)[1]
        return torch.cat([hidden[: len(users)], hidden[len(users) :] + residual.index_select(0, items)])

    def _predict(self, x: Tensor) -> Tensor:
        return torch.addmm(self.predict_bias, x, self.predict_weight)

    def vectors(self, generator=None, nodes=None) -> Tensor:
        return self._predict(self._online(nodes))

    def loss(self, batch, generator) -> dict[str, Tensor]:
        users, items = batch.split(self._online(batch))
        user, item = users.index_select(0, batch.users), items.index_select(0, batch.pos)
        target_user, target_item = self._target(user, generator), self._target(item, generator)
        rec = _distance(self._predict(user), target_item) + _distance(self._predict(item), target_user)
        terms = {"rec": rec}
        parts = zip(self.features, self.project, self.offset, strict=True)
        asked = self.sides(batch)[1]
        content = [(table.project(w, asked) + b).index_select(0, batch.pos) for table, w, b in parts]
        align = [_distance(self._predict(x), target_item) for x in content]
        mask = [_distance(self._predict(x), self._target(x, generator)) for x in content]
        terms["align"] = self.settings.cl_weight * torch.stack(align).sum()
        terms["mask"] = self.settings.cl_weight * torch.stack(mask).sum()
        return terms

    def _target(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return dropout(x, self.settings.dropout, generator).detach()


def _distance(prediction: Tensor, target: Tensor) -> Tensor:
    """`1 - mean cos`: `C` shifted to be non-negative."""
    return 1.0 - nn.functional.cosine_similarity(prediction, target, dim=1).mean()
