"""The three things that are trained: LightGCN alone, the teacher, and the student that learns from it."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkd import ops
from mmkd.config import Config, StageConfig
from mmkd.data import Dataset
from mmkd.graph import BipartiteGraph
from mmkd.models.lightgcn import LightGCN
from mmkd.models.teacher import Teacher
from mmkd.training.collapse import FrozenTeacher
from mmkd.training.stage import NodeBatch, add_l2, batches, node_batch, seeded, to_tensors


def _adamw(groups: list[dict], lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=lr, weight_decay=0.0, fused=True)


def _split(table: Tensor, batch: NodeBatch) -> tuple[Tensor, Tensor]:
    return table.split([batch.num_users, table.shape[0] - batch.num_users])


class LightGCNTask:
    """`L = BPR + L2` (spec section 4) on a plain LightGCN."""

    def __init__(
        self, model: LightGCN, settings: StageConfig, dataset: Dataset, graph: BipartiteGraph, seed: int,
        name: str = "lightgcn",
    ) -> None:  # fmt: skip
        self.name, self.model, self.settings, self.graph = name, model, settings, graph
        self.sampler = batches(dataset, settings, 1, seed)

    def optimizer(self) -> torch.optim.Optimizer:
        return _adamw([{"params": [self.model.table]}], self.settings.lr)

    def step(self, epoch: int, step: int) -> dict[str, Tensor]:
        sampled = to_tensors(self.sampler.batch(epoch, step))
        batch = node_batch(*sampled, self.graph.num_users, device=self.graph.device)
        users, items = _split(self.model(batch.rows), batch)
        bpr = ops.bpr_loss(users, items, batch.users, batch.pos, batch.neg)
        bpr.backward()
        return {"bpr": bpr.detach(), "l2": add_l2(self.model.table, batch, self.settings.l2)}

    def tables(self) -> tuple[Tensor, Tensor]:
        return self.model.tables()


class TeacherTask:
    """`BPR(E^T) + mu sum_m BPR(F^m) + nu BPR(p, R̂p) + L2` (spec section 3), dropout on the projected features."""

    name = "teacher"

    def __init__(self, model: Teacher, config: Config, dataset: Dataset, graph: BipartiteGraph) -> None:
        self.model, self.config, self.settings, self.graph = model, config, config.teacher, graph
        self.sampler = batches(dataset, config.teacher, 1, config.seed)

    def optimizer(self) -> torch.optim.Optimizer:
        dense = [*self.model.weights, *self.model.biases, *self.model.prompt.parameters()]
        return _adamw(
            [{"params": [self.model.table]}, {"params": dense, "weight_decay": self.settings.weight_decay}],
            self.settings.lr,
        )

    def _mask(self, epoch: int, step: int) -> Tensor | None:
        # One random byte per entry, eight from a draw: the probability is a multiple of 1/256, the scale matches it.
        dropped = round(self.settings.dropout * 256)
        if dropped == 0:
            return None
        shape = (self.graph.num_items, sum(weight.shape[1] for weight in self.model.weights))
        count = shape[0] * shape[1]
        generator = seeded(self.config.seed, epoch, step, tag=1)
        words = torch.randint(-(2**63), 2**63 - 1, (-(-count // 8),), generator=generator)
        kept = words.view(torch.uint8)[:count].to(self.graph.device).view(shape) >= dropped
        return kept.float().mul_(256 / (256 - dropped))

    def step(self, epoch: int, step: int) -> dict[str, Tensor]:
        sampled = to_tensors(self.sampler.batch(epoch, step))
        batch = node_batch(*sampled, self.graph.num_users, device=self.graph.device)
        out = self.model(batch.rows, batch.num_users, self._mask(epoch, step))
        where = (batch.users, batch.pos, batch.neg)
        terms = {"bpr": ops.bpr_loss(*_split(out.joint, batch), *where)}
        if self.settings.modality_loss:
            heads = [ops.bpr_loss(u, i, *where) for u, i in zip(out.users, out.items, strict=True)]
            terms["modalities"] = self.settings.modality_loss * torch.stack(heads).sum()
        if self.settings.prompt_loss:
            users = self.graph.users_from_items(out.prompt).index_select(0, batch.rows[: batch.num_users])
            items = out.prompt.index_select(0, batch.rows[batch.num_users :] - self.graph.num_users)
            terms["prompt"] = self.settings.prompt_loss * ops.bpr_loss(users, items, *where)
        torch.stack(list(terms.values())).sum().backward()
        terms = {name: value.detach() for name, value in terms.items()}
        return {**terms, "l2": add_l2(self.model.table, batch, self.settings.l2)}

    def tables(self) -> tuple[Tensor, Tensor]:
        return self.model.tables()


class _StudentParameters(torch.nn.Module):
    """The student's table and the prompt that keeps learning through the frozen teacher (Θ_S; Θ_P of Eq. 5)."""

    def __init__(self, student: LightGCN, prompt: torch.nn.Module) -> None:
        super().__init__()
        self.student, self.prompt = student, prompt


class StudentTask:
    """`L = BPR + λ2 PairKD + λ3 ListKD + λ4 EmbKD + L2` (paper, Eq. 12) over the compact table of the batch's own rows."""

    name = "student"

    def __init__(
        self, student: LightGCN, teacher: FrozenTeacher, config: Config, dataset: Dataset, graph: BipartiteGraph,
        modality_weights: Tensor,
    ) -> None:  # fmt: skip
        self.student, self.teacher, self.config, self.settings = student, teacher, config, config.student
        self.graph, self.modality_weights = graph, modality_weights
        self.distill = config.distill
        self.model = _StudentParameters(student, teacher.prompt)
        self.learn_prompt = config.prompt.lr > 0 and config.prompt.strength > 0
        for parameter in teacher.prompt.parameters():
            parameter.requires_grad_(self.learn_prompt)
        negatives = self.distill.negatives if self.distill.list else 1
        self.sampler = batches(dataset, config.student, negatives, config.seed + 1)

    def optimizer(self) -> torch.optim.Optimizer:
        groups = [{"params": list(self.student.parameters())}]
        if self.learn_prompt:
            groups.append({"params": list(self.teacher.prompt.parameters()), "lr": self.config.prompt.lr})
        return _adamw(groups, self.settings.lr)

    def _emb_nodes(self, epoch: int, step: int) -> Tensor | None:
        """Node ids EmbKD looks at: all, or a uniform sample with replacement (an unbiased estimate of the mean)."""
        if not self.distill.emb:
            return None
        first = 0 if self.distill.emb_nodes == "all" else self.graph.num_users
        if self.distill.emb_sample is None:
            return torch.arange(first, self.graph.num_nodes)
        generator = seeded(self.config.seed, epoch, step, tag=2)
        return torch.randint(first, self.graph.num_nodes, (self.distill.emb_sample,), generator=generator)

    def step(self, epoch: int, step: int) -> dict[str, Tensor]:
        sampled, nodes = to_tensors(self.sampler.batch(epoch, step)), self._emb_nodes(epoch, step)
        batch = node_batch(*sampled, self.graph.num_users, nodes, device=self.graph.device)
        table = self.student(batch.rows)
        with torch.set_grad_enabled(self.learn_prompt):
            frozen = self.teacher(batch.rows, batch.num_users)
        terms = self._ranking(batch, table, frozen)
        if nodes is not None:
            terms["emb"] = self.distill.emb * self._emb(batch, nodes.to(batch.rows.device), table, frozen)
        torch.stack(list(terms.values())).sum().backward()
        terms = {name: value.detach() for name, value in terms.items()}
        return {**terms, "l2": add_l2(self.student.table, batch, self.settings.l2)}

    def _ranking(self, batch: NodeBatch, table: Tensor, frozen) -> dict[str, Tensor]:
        d, (users, items) = self.distill, _split(table, batch)
        where = (batch.users, batch.pos, batch.neg)
        if d.pair:
            scores = ops.list_scores(*_split(frozen.joint, batch), batch.users, batch.candidates[:, :2])
            bpr, pair = ops.bpr_pair_kd_loss(
                users, items, *where, scores[:, 0] - scores[:, 1], tau=d.pair_tau, kind=d.pair_kind
            )
            terms = {"bpr": bpr, "pair": d.pair * pair}
        else:
            terms = {"bpr": ops.bpr_loss(users, items, *where)}
        if d.list:
            logits = torch.stack(
                [
                    ops.list_scores(u, i, batch.users, batch.candidates)
                    for u, i in zip(frozen.users, frozen.items, strict=True)
                ]
            )
            terms["list"] = d.list * ops.list_kd_loss(
                users, items, batch.users, batch.candidates, logits, alpha=d.list_alpha, beta=d.list_beta, tau=d.list_tau,
                weight=d.list_weight, modality_weights=self.modality_weights,
            )  # fmt: skip
        return terms

    def _emb(self, batch: NodeBatch, nodes: Tensor, table: Tensor, frozen) -> Tensor:
        where = torch.searchsorted(batch.rows, nodes)
        targets = torch.cat([frozen.users, frozen.items], dim=1).to(table.dtype)  # [M, n, d]
        return ops.emb_kd_loss(
            table.index_select(0, where), targets.index_select(1, where), gamma=self.distill.emb_gamma
        )

    def tables(self) -> tuple[Tensor, Tensor]:
        return self.student.tables()
