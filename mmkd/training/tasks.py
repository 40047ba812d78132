"""The three things that are trained: LightGCN alone, the teacher, and the student that learns from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmkd import backends, ops
from mmkd.config import Config, StageConfig
from mmkd.data import Dataset
from mmkd.data.sampling import Sampler
from mmkd.graph import BipartiteGraph, ItemRows
from mmkd.models.lightgcn import LightGCN, RowGradient, gathered_in
from mmkd.models.teacher import Teacher, TeacherOutput
from mmkd.ops.student import StudentGradients
from mmkd.training.collapse import FrozenTeacher
from mmkd.training.optim import PropagatedAdamW
from mmkd.training.ranking import SharedNegatives, ranking_loss
from mmkd.training.recorded import RandomBytes, Recordable
from mmkd.training.stage import (
    SIZE,
    Ahead,
    NodeBatch,
    add_l2,
    batches,
    l2_weights,
    mixed_seed,
    node_batch,
    seeded,
    to_tensors,
)

TERMS = ("ranking", "pair", "list", "emb")  # of the student's loss


class _NodesTask(Recordable):
    """A task whose steps use a compact table of the batch's nodes.

    Attributes:
        multiple: what users and items of a batch are filled up to. On a GPU batches come in few sizes, so that their steps
            can be recorded.
    """

    graph: BipartiteGraph
    sampler: Sampler
    shared: SharedNegatives
    pause = 2e-4  # seconds until a step on a CPU is in its first long kernel

    def _draw_from(
        self, dataset: Dataset, graph: BipartiteGraph, settings: StageConfig, sampler: Sampler, seed: int
    ) -> None:
        """Where batches come from; `seed`: of the shared negatives."""
        self.graph, self.sampler = graph, sampler
        self.shared = SharedNegatives(dataset.train, settings.shared_negatives, seed)
        on_cpu = graph.device.type == "cpu"
        self.multiple = 1 if on_cpu else SIZE
        self.batch = Ahead(self._batch, sampler.num_steps, pause=self.pause if on_cpu else 0.0)

    def _nodes(
        self, epoch: int, step: int, users: Tensor, candidates: Tensor, extra: Tensor | None = None
    ) -> NodeBatch:
        sizes, shared = (self.graph.num_users, self.graph.num_items), self.shared(epoch, step, users)
        return node_batch(users, candidates, *sizes, extra, shared, self.multiple)


class LightGCNTask(_NodesTask):
    """`L = ranking + L2` on a plain LightGCN; the ranking loss is BPR (spec section 4) unless negatives are shared."""

    def __init__(
        self, model: LightGCN, settings: StageConfig, dataset: Dataset, graph: BipartiteGraph, seed: int,
        name: str = "lightgcn", sampler: Sampler | None = None,
    ) -> None:  # fmt: skip
        self.name, self.model, self.settings = name, model, settings
        self._draw_from(dataset, graph, settings, sampler or batches(dataset, settings, 1, seed), seed)

    def _batch(self, epoch: int, step: int) -> NodeBatch:
        return self._nodes(epoch, step, *to_tensors(self.sampler.batch(epoch, step)))

    def optimizer(self) -> torch.optim.Optimizer:
        return PropagatedAdamW(self.model, [{"params": [self.model.table]}], self.settings.lr)

    def recordable(self, batch: NodeBatch) -> bool:
        return not len(batch.shared)  # what a user owns of them differs from step to step

    def gradients(self, batch: NodeBatch) -> dict[str, Tensor]:
        users, items = batch.split(self.model(batch.rows))
        ranking = ranking_loss(users, items, batch)
        ranking.backward()
        return {"ranking": ranking.detach(), "l2": add_l2(self.model, batch, self.settings.l2)}

    def tables(self) -> tuple[Tensor, Tensor]:
        return self.model.tables()


@dataclass
class TeacherBatch:
    """A batch of the teacher's stage.

    Attributes:
        nodes: of the compact tables. item_rows: the entries of its items, cut out on the host; None on a GPU.
        mask: of dropout, `[I, M d]`: 0 or 1 / (1 - p) on a CPU, random bytes on a GPU; None without dropout.
    """

    nodes: NodeBatch
    item_rows: ItemRows | None
    mask: Tensor | RandomBytes | None

    def to(self, device: torch.device) -> TeacherBatch:
        """The same batch, made on the CPU, on `device`."""
        if device.type == "cpu":
            return self
        return TeacherBatch(self.nodes.to(device), None, None if self.mask is None else self.mask.to(device))


class TeacherTask(_NodesTask):
    """`BPR(E^T) + mu sum_m BPR(F^m) + nu BPR(p, R̂p) + L2` (spec section 3), dropout on the projected features.

    With shared negatives the first two are softmax losses over them (:func:`mmkd.training.ranking.ranking_loss`).
    """

    name = "teacher"
    pause = 2e-3  # small products come before the first large one

    def __init__(self, model: Teacher, config: Config, dataset: Dataset, graph: BipartiteGraph) -> None:
        self.model, self.config, self.settings = model, config, config.teacher
        self._draw_from(dataset, graph, self.settings, batches(dataset, self.settings, 1, config.seed), config.seed)

    def optimizer(self) -> torch.optim.Optimizer:
        dense = [*self.model.weights, *self.model.biases, *self.model.prompt.parameters()]
        groups = [{"params": [self.model.table]}, {"params": dense, "weight_decay": self.settings.weight_decay}]
        return PropagatedAdamW(self.model, groups, self.settings.lr)

    def _batch(self, epoch: int, step: int) -> TeacherBatch:
        batch = self._nodes(epoch, step, *to_tensors(self.sampler.batch(epoch, step)))
        if self.graph.device.type != "cpu":
            return TeacherBatch(batch, None, self._mask(epoch, step))
        items = batch.rows[batch.num_users :] - self.graph.num_users
        return TeacherBatch(batch, self.graph.item_rows(items), self._mask(epoch, step))

    @property
    def _dropped(self) -> int:
        """Of 256 bytes, how many stand for a dropped entry: `p` is a multiple of 1/256."""
        return round(self.settings.dropout * 256)

    def _mask(self, epoch: int, step: int) -> Tensor | RandomBytes | None:
        """One random byte per entry; on a CPU the mask that is made of them."""
        if self._dropped == 0:
            return None
        shape = (self.graph.num_items, sum(weight.shape[1] for weight in self.model.weights))
        if self.graph.device.type != "cpu":
            return RandomBytes(shape, mixed_seed(self.config.seed, epoch, step, tag=1))
        count = shape[0] * shape[1]
        generator = seeded(self.config.seed, epoch, step, tag=1)
        words = torch.randint(-(2**63), 2**63 - 1, (-(-count // 8),), generator=generator)
        mask = (words.view(torch.uint8)[:count].numpy() >= self._dropped).astype(np.float32)
        mask *= np.float32(256 / (256 - self._dropped))
        return torch.from_numpy(mask.reshape(shape))

    def mask_of(self, mask: Tensor | None) -> Tensor | None:
        """`[I, M d]`, 0 or 1 / (1 - p), of a batch on its device."""
        if mask is None or mask.is_floating_point():
            return mask
        return (mask >= self._dropped).float().mul_(256 / (256 - self._dropped))

    def recordable(self, batch: TeacherBatch) -> bool:
        """Features that stay in their file are copied to the device block by block."""
        there = all(table.values.device == self.graph.device for table in self.model.features)
        return there and not len(batch.nodes.shared)

    def gradients(self, drawn: TeacherBatch) -> dict[str, Tensor]:
        batch, asked = drawn.nodes, (drawn.nodes.rows, drawn.nodes.num_users, self.mask_of(drawn.mask), drawn.item_rows)
        weights = {"ranking": 1.0, "modalities": self.settings.modality_loss, "prompt": self.settings.prompt_loss}
        prompt = self.model.prompt_at(batch.rows) if weights["prompt"] else None
        plain = _unwatched(self.model, Teacher.forward) and not self.model.omega.requires_grad
        if len(batch.shared) or not plain:
            loss, terms = self._by_heads(self.model(*asked), batch, prompt, tuple(weights.values()))
        else:
            pairs, by = (batch.users, batch.pos, batch.neg, self.model.omega), tuple(weights.values())
            loss, terms = ops.teacher_loss(*self.model.parts(*asked), *pairs, prompt, weights=by)
        loss.backward()
        terms = {name: term for (name, weight), term in zip(weights.items(), terms.unbind(), strict=True) if weight}
        return {**terms, "l2": add_l2(self.model, batch, self.settings.l2)}

    @staticmethod
    def _by_heads(
        out: TeacherOutput, batch: NodeBatch, prompt: Tensor | None, weights: tuple[float, float, float]
    ) -> tuple[Tensor, Tensor]:
        """The loss and its summands `[3]` from what the model gives; the first two against shared negatives where there are some."""
        joint, zero = ranking_loss(*batch.split(out.joint), batch), out.joint.new_zeros(())
        heads = [ranking_loss(u, i, batch) for u, i in zip(out.users, out.items, strict=True)] if weights[1] else [zero]
        own = zero if prompt is None else ops.bpr_loss(*batch.split(prompt), batch.users, batch.pos, batch.neg)
        terms = torch.stack([joint, weights[1] * torch.stack(heads).sum(), weights[2] * own])
        return terms.sum(), terms.detach()

    def tables(self) -> tuple[Tensor, Tensor]:
        return self.model.tables()


class _StudentParameters(torch.nn.Module):
    """The student's table and the prompt that keeps learning through the frozen teacher (Θ_S; Θ_P of Eq. 5)."""

    def __init__(self, student: LightGCN, prompt: torch.nn.Module) -> None:
        super().__init__()
        self.student, self.prompt = student, prompt


@dataclass
class StudentBatch:
    """A batch of the student's stage.

    Attributes:
        nodes: the student's compact table.
        candidates: int64 `[B, K]`, item ids.
        asked: int64 `[3B (+ n)]`, node ids where the teacher is asked: users, observed items, BPR's negatives, EmbKD's nodes.
        l2: `[n]`, weights of the L2 term on the rows of `nodes`; None on a GPU, and without that term.
    """

    nodes: NodeBatch
    candidates: Tensor
    asked: Tensor
    l2: Tensor | None = None

    def to(self, device: torch.device) -> StudentBatch:
        """The same batch, made on the CPU, on `device`."""
        if device.type == "cpu":  # Tensor.to lets other threads run first, also where there is nothing to do
            return self
        return StudentBatch(self.nodes.to(device), self.candidates.to(device), self.asked.to(device))


def _add(p: Tensor, grad: Tensor) -> None:
    """To the gradient of a parameter, as a backward pass does."""
    p.grad = grad if p.grad is None else p.grad + grad


def _unwatched(model: torch.nn.Module, forward: Callable) -> bool:
    """Whether calling a model is calling `forward` of its class, and no hook sees it."""
    kind, own = type(model), vars(model)
    if getattr(kind, "forward", None) is not forward or kind.__call__ is not torch.nn.Module.__call__:
        return False
    return not ("forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"])


def _plain(student: torch.nn.Module, prompt: torch.nn.Module) -> bool:
    """Whether a student is a LightGCN that nobody watches, so that its gradients need not go by autograd."""
    if not _unwatched(student, LightGCN.forward):
        return False
    table = student.table
    watched = (p._backward_hooks or p._post_accumulate_grad_hooks for p in (table, prompt.weight, prompt.bias))
    return table.is_leaf and table.requires_grad and not any(watched)


class StudentTask(_NodesTask):
    """`L = BPR + λ2 PairKD + λ3 ListKD + λ4 EmbKD + L2` (paper, Eq. 12) over the compact table of the batch's own rows.

    With shared negatives BPR gives way to :func:`mmkd.training.ranking.ranking_loss` over them.
    """

    name = "student"

    def __init__(
        self, student: LightGCN, teacher: FrozenTeacher, config: Config, dataset: Dataset, graph: BipartiteGraph,
        modality_weights: Tensor,
    ) -> None:  # fmt: skip
        self.student, self.teacher, self.config, self.settings = student, teacher, config, config.student
        self.modality_weights = modality_weights
        self.emb_modalities = modality_weights * len(modality_weights)  # a sum over modalities, ListKD's a mean
        self.distill = config.distill
        by = self.distill.pair, self.distill.list, self.distill.emb
        self.lambdas = torch.tensor([1.0, *by], device=student.table.device)  # of BPR, PairKD, ListKD, EmbKD
        self.model = _StudentParameters(student, teacher.prompt)
        self._gradients: StudentGradients | None = None
        self._made_of: tuple | None = None
        self.learn_prompt = config.prompt.lr > 0 and config.prompt.strength > 0
        for parameter in teacher.prompt.parameters():
            parameter.requires_grad_(self.learn_prompt)
        negatives = self.distill.negatives if self.distill.list else 1
        sampler, seed = batches(dataset, self.settings, negatives, config.seed + 1), config.seed + 1
        self._draw_from(dataset, graph, self.settings, sampler, seed)

    def optimizer(self) -> torch.optim.Optimizer:
        groups = [{"params": list(self.student.parameters())}]
        if self.learn_prompt:
            groups.append({"params": list(self.teacher.prompt.parameters()), "lr": self.config.prompt.lr})
        return PropagatedAdamW(self.student, groups, self.settings.lr)

    def _batch(self, epoch: int, step: int) -> StudentBatch:
        users, candidates = to_tensors(self.sampler.batch(epoch, step))
        nodes, extra = self.graph.num_users, self._emb_nodes(epoch, step)
        asked = [users, candidates[:, 0] + nodes, candidates[:, 1] + nodes]
        if extra is not None:
            asked.append(extra)
        batch = self._nodes(epoch, step, users, candidates, extra)
        l2 = l2_weights(batch, self.settings.l2, self.student.table) if self.graph.device.type == "cpu" else None
        return StudentBatch(batch, candidates, torch.cat(asked), l2)

    def _emb_nodes(self, epoch: int, step: int) -> Tensor | None:
        """Node ids EmbKD looks at: all, or a uniform sample with replacement (an unbiased estimate of the mean)."""
        if not self.distill.emb:
            return None
        first = 0 if self.distill.emb_nodes == "all" else self.graph.num_users
        if self.distill.emb_sample is None:
            return torch.arange(first, self.graph.num_nodes)
        generator = seeded(self.config.seed, epoch, step, tag=2)
        return torch.randint(first, self.graph.num_nodes, (self.distill.emb_sample,), generator=generator)

    def recordable(self, batch: StudentBatch) -> bool:
        return not len(batch.nodes.shared)

    def gradients(self, drawn: StudentBatch) -> dict[str, Tensor]:
        made = None if len(drawn.nodes.shared) else self._in_one_call()
        return self._by_autograd(drawn) if made is None else self._all_at_once(made, drawn)

    def in_parts(self, epoch: int, step: int) -> dict[str, Tensor]:
        return self._by_autograd(self.batch(epoch, step).to(self.graph.device))

    def _by_autograd(self, drawn: StudentBatch) -> dict[str, Tensor]:
        batch = drawn.nodes
        table = self.student(batch.rows)  # [n, d]
        loss, terms = self._distill(drawn, table)
        if len(batch.shared):
            ranking = ranking_loss(*batch.split(table), batch)
            loss, terms = loss + ranking, {"ranking": ranking, **terms}
        loss.backward()
        terms = {name: value.detach() for name, value in terms.items()}
        return {**terms, "l2": add_l2(self.student, batch, self.settings.l2)}

    def _in_one_call(self) -> StudentGradients | None:
        """What makes a step's gradients without autograd; None where teacher, table or student are of a kind that there is no
        kernel for, or where somebody is to see the student's call or its gradients."""
        student, teacher, prompt = self.student, self.teacher, self.teacher.prompt
        if teacher.norm != "mean" or not teacher.strength or not _plain(student, prompt):
            return None
        made_of = (
            student.table, student.table.dtype, student.compute, student.layers, prompt.weight, prompt.bias, teacher.content,
            teacher.mixed, self.modality_weights, self.emb_modalities, self.distill,
        )  # fmt: skip
        if self._made_of is None or any(a is not b for a, b in zip(made_of, self._made_of, strict=True)):
            self._made_of, self._gradients = made_of, self._fresh()
        return self._gradients

    def _fresh(self) -> StudentGradients | None:
        """A new one; None where there is no kernel."""
        student, teacher, table = self.student, self.teacher, self.student.table
        gather = gathered_in(table, student.compute)
        kernel = backends.why_not("student", "cpp", table.device.type) is None and table.is_contiguous()
        rounded = student.compute is not None and gather is None  # the table is, not what is gathered
        if not kernel or rounded or table.dtype != teacher.content.dtype:
            return None
        return StudentGradients(
            student.graph, table, student.layers, teacher.constants(teacher.mixed), teacher.prompt.weight,
            teacher.prompt.bias, teacher.mixed, self.graph.num_users, gather=gather, **self._settings(),
        )  # fmt: skip

    def _all_at_once(self, gradients: StudentGradients, drawn: StudentBatch) -> dict[str, Tensor]:
        """:meth:`gradients` in one call."""
        batch, student, prompt = drawn.nodes, self.student, (self.teacher.prompt.weight, self.teacher.prompt.bias)
        learn = [p.requires_grad for p in prompt]
        l2 = None if drawn.l2 is None else drawn.l2.to(student.table.dtype)  # drawn ahead, maybe before it changed
        terms, rows, *grads = gradients(
            batch.rows, l2, batch.num_users, batch.users, batch.candidates, batch.extra, drawn.asked,
            drawn.candidates, any(learn),
        )  # fmt: skip
        held = student.held
        if held is not None and held.gather == gradients.gather:
            held.put(batch.rows, rows, l2, ascending=self.multiple == 1)
        else:
            written = RowGradient(student.graph, student.layers, gradients.gather)
            written.put(batch.rows, rows, l2)
            _add(student.table, written.dense(student.table))
        for p, grad, wanted in zip(prompt, grads, learn, strict=True):
            if wanted:
                _add(p, grad)
        *losses, squares = terms.unbind()
        named = zip(TERMS, gradients.by, losses, strict=True)
        return {**{name: term for name, by, term in named if by}, "l2": squares}

    def _distill(self, drawn: StudentBatch, table: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The losses of the compact table; BPR only where no shared negatives take its place."""
        batch, settings = drawn.nodes, self._settings(ranking=not len(drawn.nodes.shared))
        weights, d = settings["weights"], self.distill
        own, state = (table, batch.num_users, batch.users, batch.candidates), self.teacher.state()
        constants = self.teacher.constants(state)
        if constants is not None:
            asked = drawn.asked, drawn.candidates, self.graph.num_users
            loss, terms = ops.distill_frozen_loss(*own, batch.extra, *constants, state, *asked, **settings)
        else:
            margin, logits, targets = self.teacher.asked(drawn.asked, drawn.candidates, state, lists=bool(d.list))
            loss, terms = ops.distill_loss(*own, margin, logits, batch.extra, targets.to(table.dtype), **settings)
        named = zip(TERMS, weights, (terms * self.lambdas).unbind(), strict=True)
        return loss, {name: term for name, weight, term in named if weight}

    def _settings(self, ranking: bool = True) -> dict:
        """Of the losses; ranking: whether BPR is one of them."""
        d = self.distill
        return {
            "weights": (1.0 if ranking else 0.0, d.pair, d.list, d.emb), "pair_tau": d.pair_tau, "pair_kind": d.pair_kind,
            "alpha": d.list_alpha, "beta": d.list_beta, "list_tau": d.list_tau, "list_weight": d.list_weight,
            "gamma": d.emb_gamma, "list_modalities": self.modality_weights, "emb_modalities": self.emb_modalities,
        }  # fmt: skip

    def tables(self) -> tuple[Tensor, Tensor]:
        return self.student.tables()
