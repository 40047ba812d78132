"""What trains any baseline of the registry: sampled lists in, the model's own loss, AdamW."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkd.data import Dataset
from mmkd.models.baselines import Baseline
from mmkd.training.stage import Ahead, NodeBatch, batches, node_batch, seeded, to_tensors


class BaselineTask:
    """One step: the model's `loss` on a sampled batch plus its L2 term; randomness depends on (seed, epoch, step) alone."""

    def __init__(self, name: str, model: Baseline, dataset: Dataset, seed: int) -> None:
        self.name, self.model, self.seed = name, model, seed
        self.sampler = batches(dataset, model.settings, model.negatives, seed, model.settings.draw)
        self.batch = Ahead(self._batch, self.sampler.num_steps)
        self._epoch: int | None = None

    def _batch(self, epoch: int, step: int) -> NodeBatch:
        graph = self.model.graph
        return node_batch(*to_tensors(self.sampler.batch(epoch, step)), graph.num_users, graph.num_items)

    def optimizer(self) -> torch.optim.Optimizer:
        rest = [p for name, p in self.model.named_parameters() if name != "table"]
        groups = [{"params": [self.model.table]}]
        if rest:
            groups.append({"params": rest, "weight_decay": self.model.settings.weight_decay})
        return torch.optim.AdamW(groups, lr=self.model.settings.lr, weight_decay=0.0, fused=True)

    def step(self, epoch: int, step: int) -> dict[str, Tensor]:
        if epoch != self._epoch:
            self.model.begin_epoch(epoch)
            self._epoch = epoch
        batch = self.batch(epoch, step).to(self.model.graph.device)
        terms = self.model.loss(batch, seeded(self.seed, epoch, step, tag=7))
        terms["l2"] = self.model.l2(batch)
        torch.stack(list(terms.values())).sum().backward()
        return {name: value.detach() for name, value in terms.items()}

    def epoch_tensors(self) -> dict[str, Tensor]:
        return self.model.epoch_tensors()

    def resume_epoch(self, epoch: int, tensors: dict[str, Tensor]) -> None:
        self.model.resume_epoch({name: t.to(self.model.graph.device) for name, t in tensors.items()})
        self._epoch = epoch

    def tables(self) -> tuple[Tensor, Tensor]:
        return self.model.tables()
