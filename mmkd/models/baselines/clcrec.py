"""CLCRec: Contrastive Learning for Cold-start Recommendation (Wei et al., ACM MM 2021)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from mmkd import ops
from mmkd.models.baselines.base import Baseline, BaselineConfig, take, unit_rows


class CLCRecConfig(BaselineConfig):
    """Settings of CLCRec."""

    negatives: int = Field(64, ge=1, le=4095, description="negative items per observed pair")
    temperature: float = Field(0.2, gt=0, description="τ of both contrastive terms")
    embed_weight: float = Field(0.5, ge=0, le=1, description="λ, share of the embedding-feature term")
    replaced: float = Field(0.5, ge=0, le=1, description="probability that an item enters as its feature vector")


class CLCRec(Baseline):
    """Ids and features of an item are two views of it; both kinds of mutual information are raised by InfoNCE.

    `f_i = W2 LeakyReLU(W1 [x^1 || ...])` (content encoder). Embedding-feature term: `z_i` against `f_i` among the list's
    items, cosine over τ. User-item term: `z_u` against the observed item among the list, where an item's
    vector is `z_i` or, at random, `f_i` (the hybrid training). `L = λ L_embed + (1 - λ) L_user + η ||Θ||^2`.
    An item with train interactions is ranked by `z_i`, a cold one by `f_i`.
    """

    Settings = CLCRecConfig
    needs_features = True

    def __init__(self, graph, features, dim, settings, generator=None) -> None:
        super().__init__(graph, features, dim, settings, generator)
        self.negatives = settings.negatives
        width = sum(table.width for table in self.features)
        self.first, self.second = self.dense(width, 4 * dim), self.dense(4 * dim, dim)
        cold = graph.degree[graph.num_users :] == 0
        self.register_buffer("cold", cold[:, None], persistent=False)

    def _content(self, items: Tensor) -> Tensor:
        """`f_i` of these items, unit length, `[n, d]`."""
        parts = self.first.split([table.width for table in self.features])
        hidden = sum(table.project(part, items) for table, part in zip(self.features, parts, strict=True))
        return unit_rows(nn.functional.leaky_relu(hidden) @ self.second)

    def vectors(self, generator=None, nodes=None) -> Tensor:
        unit = unit_rows(take(self.table, nodes))
        users, items = self.sides(nodes)
        warm = unit[len(users) :]
        return torch.cat([unit[: len(users)], torch.where(self.cold[items], self._content(items), warm)])

    def loss(self, batch, generator) -> dict[str, Tensor]:
        user_emb, item_emb = batch.split(unit_rows(take(self.table, batch)))
        content = self._content(self.sides(batch)[1])
        feature_side = torch.rand(content.shape[0], 1, generator=generator).to(content.device) < self.settings.replaced
        mixed = torch.where(feature_side, content, item_emb)
        share, tau = self.settings.embed_weight, self.settings.temperature
        embed = ops.list_scores(item_emb, content, batch.pos, batch.candidates) / tau
        rank = ops.list_scores(user_emb, mixed, batch.users, batch.candidates) / tau
        return {
            "embed": -share * embed.log_softmax(1)[:, 0].mean(),
            "user": -(1 - share) * rank.log_softmax(1)[:, 0].mean(),
        }
