"""What the trained baselines share: an id table, projected features, BPR over full tables, the L2 term."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mmkd import ops
from mmkd.config import StageConfig
from mmkd.graph import BipartiteGraph
from mmkd.models.features import FeatureTable
from mmkd.models.lightgcn import initial_table


class BaselineConfig(StageConfig):
    """Settings every trained baseline has; the defaults are starting points, `mmkd reproduce search` tunes them."""

    lr: float = Field(1e-3, gt=0, le=1, description="AdamW learning rate")
    l2: float = Field(1e-2, ge=0, description="weight of the L2 term over the batch's own rows of the free tables")
    batch_size: int = Field(2048, ge=1, description="(user, positive) pairs per step")
    epochs: int = Field(200, ge=0, description="upper bound; early stopping usually ends sooner")
    eval_every: int = Field(5, ge=1, description="epochs between two looks at validation")
    patience: int = Field(8, ge=1, description="looks at validation without a better one before stopping")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled decay of everything but the id table")
    draw: Literal["users", "pairs"] = Field(
        "users", description="what a batch draws uniformly: users, then one of their items; or train pairs"
    )


class Baseline(nn.Module):
    """A model that scores by inner products of a user and an item table, trained on sampled lists.

    Args:
        graph: train interactions.
        features: one table per modality, `I` rows each; models of ids alone ignore them.
        dim: `d`.
        settings: the class's own `Settings`.
        generator: of the random start.

    Attributes:
        needs_features: refused on data without item features.
        negatives: negatives per sample.
        table: id embeddings, `[N, d]`, users first.
    """

    Settings: type[BaselineConfig] = BaselineConfig
    needs_features = False
    negatives = 1

    def __init__(
        self,
        graph: BipartiteGraph,
        features: Sequence[FeatureTable],
        dim: int,
        settings: BaselineConfig,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.graph, self.features, self.dim, self.settings = graph, list(features), dim, settings
        self.generator = generator
        self.table = nn.Parameter(initial_table(graph.num_nodes, dim, "xavier", generator))

    def dense(self, rows: int, columns: int) -> nn.Parameter:
        """A Xavier-uniform weight `[rows, columns]`, drawn from the model's generator."""
        return nn.Parameter(nn.init.xavier_uniform_(torch.empty(rows, columns), generator=self.generator))

    def split(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """`[N, w]` as users `[U, w]` and items `[I, w]`."""
        return nodes.split([self.graph.num_users, self.graph.num_items])

    def adjacency(self, x: Tensor) -> Tensor:
        """`Â x`, `[N, w] -> [N, w]`, symmetric normalisation (spec section 1)."""
        users, items = self.split(x)
        return torch.cat([self.graph.users_from_items(items), self.graph.items_from_users(users)])

    def begin_epoch(self, epoch: int) -> None:
        """Called before an epoch's first step."""

    def encode(self, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Users `[U, w]` and items `[I, w]`; `generator` draws dropout and is None in evaluation."""
        raise NotImplementedError

    def loss(self, users: Tensor, candidates: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Terms of the loss for users `[B]` and candidates `[B, 1 + negatives]`, the observed item first."""
        user_emb, item_emb = self.encode(generator)
        return {"bpr": ops.bpr_loss(user_emb, item_emb, users, candidates[:, 0], candidates[:, 1])}

    def l2(self, users: Tensor, candidates: Tensor) -> Tensor:
        """`l2 * 1/2 sum ||row||^2 / B` over the free rows of the batch's users, observed items and first negatives."""
        own, items = self.split(self.table)
        sides = ((users, (own, *self.user_tables())), (candidates[:, :2].flatten(), (items, *self.item_tables())))
        rows = [table.index_select(0, ids) for ids, tables in sides for table in tables]
        return self.settings.l2 * 0.5 * sum(part.square().sum() for part in rows) / users.numel()

    def user_tables(self) -> Sequence[Tensor]:
        """Free parameters of users beside their ids, `[U, w]` each: the L2 term covers them too."""
        return ()

    def item_tables(self) -> Sequence[Tensor]:
        """The same of items, `[I, w]` each."""
        return ()

    def tables(self) -> tuple[Tensor, Tensor]:
        """What is ranked: final tables without dropout or gradient."""
        with torch.no_grad():
            users, items = self.encode(None)
        return users.detach(), items.detach()


def dropout(x: Tensor, probability: float, generator: torch.Generator | None) -> Tensor:
    """Inverted dropout drawn from `generator`; `x` itself where there is none or the probability is 0."""
    if generator is None or probability == 0:
        return x
    kept = torch.rand(x.shape, generator=generator).to(x.device) >= probability
    return x * kept / (1.0 - probability)


def in_batch_nce(anchors: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """InfoNCE with the other rows as negatives: `-mean log softmax(cos(a_b, t_b') / temperature)_b`.

    Args:
        anchors, targets: `[B, w]`, row b of one belongs to row b of the other.
    """
    anchors, targets = nn.functional.normalize(anchors, dim=1), nn.functional.normalize(targets, dim=1)
    labels = torch.arange(anchors.shape[0], device=anchors.device)
    return nn.functional.cross_entropy(anchors @ targets.T / temperature, labels)
