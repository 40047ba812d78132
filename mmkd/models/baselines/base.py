"""What the trained baselines share: an id table, projected features, BPR over full tables, the L2 term."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from mmkd import ops
from mmkd.config import StageConfig
from mmkd.graph import BipartiteGraph
from mmkd.models.features import FeatureTable
from mmkd.models.lightgcn import initial_table

if TYPE_CHECKING:
    from mmkd.training.stage import NodeBatch


class BaselineConfig(StageConfig):
    """Settings every trained baseline has; the defaults are starting points, `mmkd reproduce search` tunes them."""

    lr: float = Field(1e-3, gt=0, le=1, description="AdamW learning rate")
    l2: float = Field(1e-2, ge=0, description="weight of the L2 term over the batch's own rows of the free tables")
    batch_size: int = Field(2048, ge=1, description="(user, positive) pairs per step")
    epochs: int = Field(500, ge=0, description="upper bound; early stopping usually ends sooner")
    eval_every: int = Field(5, ge=1, description="epochs between two looks at validation")
    patience: int = Field(8, ge=1, description="looks at validation without a better one before stopping")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled decay of everything but the id table")
    draw: Literal["users", "pairs"] = Field(
        "users", description="what a batch draws uniformly: users, then one of their items; or train pairs"
    )


class Nodes(Protocol):
    """Some nodes: a `NodeBatch` is one.

    Attributes:
        rows: int64 `[n]`, ids, ascending: `num_users` users, then items.
    """

    rows: Tensor
    num_users: int


class Baseline(nn.Module):
    """A model that scores by inner products of a user and an item table, trained on sampled lists.

    A step needs the final vectors of its batch's nodes alone: a model says in :meth:`vectors` how to come by those of some
    nodes, and leaves out what the others alone would need. One trained on something else than BPR overrides :meth:`loss`.

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

    def epoch_tensors(self) -> dict[str, Tensor]:
        """What :meth:`begin_epoch` chose."""
        return {}

    def resume_epoch(self, tensors: dict[str, Tensor]) -> None:
        """Puts :meth:`epoch_tensors` back. Raises ValueError for what they cannot be."""

    def vectors(self, generator: torch.Generator | None = None, nodes: Nodes | None = None) -> Tensor:
        """Final vectors `[n, w]` of `nodes`, of all where None.

        `generator` draws dropout and is None in evaluation.
        """
        raise NotImplementedError

    def loss(self, batch: NodeBatch, generator: torch.Generator) -> dict[str, Tensor]:
        """Terms of the loss on a batch whose list is the observed item and `negatives` more."""
        users, items = batch.split(self.vectors(generator, batch))
        return {"bpr": ops.bpr_loss(users, items, batch.users, batch.pos, batch.neg)}

    def l2(self, batch: NodeBatch) -> Tensor:
        """`l2 * 1/2 sum ||row||^2 / B` over the free rows of the batch's users, observed items and first negatives."""
        users, items = self._sides(batch.touched, batch.num_users)  # every user of a batch stands in a pair
        of_users, of_items = batch.counts.to(self.table.dtype).split([len(users), len(items)])
        parts = [(batch.counts.to(self.table.dtype), self.table.index_select(0, batch.touched))]
        parts += [(of_users, part) for part in self.user_rows(users)]
        parts += [(of_items, part) for part in self.item_rows(items)]
        total = sum(torch.dot(counts, rows.square().sum(1)) for counts, rows in parts)
        return (0.5 * self.settings.l2 / batch.users.numel()) * total

    def user_rows(self, users: Tensor) -> Sequence[Tensor]:
        """What is free of these users beside their ids, `[n, w]` each: the L2 term covers it too."""
        return ()

    def item_rows(self, items: Tensor) -> Sequence[Tensor]:
        """The same of items."""
        return ()

    def sides(self, nodes: Nodes | None) -> tuple[Tensor, Tensor]:
        """User ids and item ids of `nodes`, of all where None."""
        if nodes is None:
            device = self.graph.device
            return torch.arange(self.graph.num_users, device=device), torch.arange(self.graph.num_items, device=device)
        return self._sides(nodes.rows, nodes.num_users)

    def _sides(self, rows: Tensor, num_users: int) -> tuple[Tensor, Tensor]:
        return rows[:num_users], rows[num_users:] - self.graph.num_users

    def tables(self) -> tuple[Tensor, Tensor]:
        """What is ranked, users `[U, w]` and items `[I, w]`: final vectors without dropout or gradient."""
        with torch.no_grad():
            users, items = self.split(self.vectors())
        return users.detach(), items.detach()


def take(x: Tensor, nodes: Nodes | None) -> Tensor:
    """The rows of `nodes` of a table `[N, w]`; the table itself where None."""
    return x if nodes is None else x.index_select(0, nodes.rows)


def rows_of(nodes: Nodes | None) -> Tensor | None:
    """Their ids, as `ops.propagate(rows=)` takes them."""
    return None if nodes is None else nodes.rows


def dropout(x: Tensor, probability: float, generator: torch.Generator | None) -> Tensor:
    """Inverted dropout drawn from `generator`; `x` itself where there is none or the probability is 0."""
    if generator is None or probability == 0:
        return x
    kept = torch.rand(x.shape, generator=generator).to(x.device) >= probability
    return x * kept.to(x.dtype).div_(1.0 - probability)


class _UnitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min_(1e-12)
        unit = x / length
        ctx.save_for_backward(unit, length)
        return unit

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        unit, length = ctx.saved_tensors
        along = torch.linalg.vecdot(grad, unit, dim=1)[:, None]
        return torch.addcmul(grad, unit, along, value=-1.0).div_(length)


def unit_rows(x: Tensor) -> Tensor:
    """`x_i / max(||x_i||, 1e-12)`, `[n, w]`: `torch.nn.functional.normalize(x, dim=1)`, but a quarter of its time forward and
    backward. Rows shorter than that, but not 0, get the gradient of `x_i / ||x_i||`."""
    return _UnitRows.apply(x)


def in_batch_nce(anchors: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """InfoNCE with the other rows as negatives: `-mean log softmax(cos(a_b, t_b') / temperature)_b`.

    Args:
        anchors, targets: `[B, w]`, row b of one belongs to row b of the other.
    """
    anchors = unit_rows(anchors) / temperature  # here, not over [B, B]
    targets = unit_rows(targets)
    return nn.functional.cross_entropy(anchors @ targets.T, torch.arange(anchors.shape[0], device=anchors.device))
