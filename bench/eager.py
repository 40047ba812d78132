"""The training steps of spec sections 3 and 4 as people write them: eager PyTorch, everything in full in every step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmkd import BipartiteGraph, reference
from mmkd.config import Config
from mmkd.models.features import FeatureTable
from mmkd.models.teacher import Teacher
from mmkd.reference.teacher import row_normalize


def _sparse(rows: Tensor, cols: Tensor, values: Tensor, shape: tuple[int, int], layout: str) -> Tensor:
    matrix = torch.sparse_coo_tensor(torch.stack([rows, cols]), values, shape).coalesce()
    if layout == "coo":
        return matrix
    csr = matrix.to_sparse_csr()  # 64-bit indices; MKL is faster with 32-bit ones
    return torch.sparse_csr_tensor(csr.crow_indices().int(), csr.col_indices().int(), csr.values(), shape)


class EagerGraph:
    """`Â`, `R̂` and `R̂ᵀ` with stored values, in torch's COO (as the published codes) or CSR layout."""

    def __init__(self, graph: BipartiteGraph, layout: str) -> None:
        users = torch.arange(graph.num_users, device=graph.device).repeat_interleave(graph.user_rowptr.diff())
        items, size = graph.user_col.long(), (graph.num_users, graph.num_items)
        values = graph.scale[users] * graph.scale[graph.num_users + items]
        self.num_users, self.num_items = size
        self.users_from_items = _sparse(users, items, values, size, layout)
        self.items_from_users = _sparse(items, users, values, size[::-1], layout)
        rows = torch.cat([users, items + graph.num_users])
        cols = torch.cat([items + graph.num_users, users])
        self.adjacency = _sparse(rows, cols, values.repeat(2), (graph.num_nodes, graph.num_nodes), layout)

    def propagate(self, table: Tensor, layers: int) -> Tensor:
        out = hidden = table
        for _ in range(layers):
            hidden = torch.sparse.mm(self.adjacency, hidden)
            out = out + hidden
        return out / (layers + 1)


class EagerTeacher(nn.Module):
    """Eq. 1-4 in full: `p^m = c p (pᵀX)` is built, `I x d_m`, as the published code does."""

    def __init__(self, teacher: Teacher, layout: str) -> None:
        super().__init__()
        self.graph, self.layers = EagerGraph(teacher.graph, layout), teacher.layers
        self.strength, self.omega = teacher.strength, teacher.omega.tolist()
        self.features, self.basis = [prepared(table) for table in teacher.features], teacher.prompt.basis
        self.table = nn.Parameter(teacher.table.detach().clone())
        self.weights = nn.ParameterList(w.detach().clone() for w in teacher.weights)
        self.biases = nn.ParameterList(b.detach().clone() for b in teacher.biases)
        self.prompt_weight = nn.Parameter(teacher.prompt.weight.detach().clone())
        self.prompt_bias = nn.Parameter(teacher.prompt.bias.detach().clone())

    def freeze(self) -> EagerTeacher:
        for parameter in (self.table, *self.weights, *self.biases):
            parameter.requires_grad_(False)
        return self

    def prompt(self) -> Tensor:
        return self.basis @ self.prompt_weight + self.prompt_bias

    def forward(self, masks: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
        prompt, users, items = self.prompt(), [], []
        joint = self.graph.propagate(self.table, self.layers)
        for m, (x, weight, bias) in enumerate(zip(self.features, self.weights, self.biases, strict=True)):
            guided = prompt @ (prompt.T @ x) / x.shape[0]  # p^m, [I, d_m]
            hidden = (x + self.strength * guided) @ weight + bias
            hidden = hidden if masks is None else hidden * masks[m]
            users.append(torch.sparse.mm(self.graph.users_from_items, hidden))
            items.append(torch.sparse.mm(self.graph.items_from_users, users[m]))
            joint = joint + self.omega[m] * row_normalize(torch.cat([users[m], items[m]]))
        return joint, users, items, prompt


def prepared(table: FeatureTable) -> Tensor:
    """The `I x d_m` array of prepared features that an eager loop multiplies with."""
    return torch.cat(list(table.blocks())).float()


def _l2(table: Tensor, users: Tensor, candidates: Tensor, num_users: int, weight: float) -> Tensor:
    ids = torch.cat([users, num_users + candidates[:, 0], num_users + candidates[:, 1]])
    return weight * 0.5 * table[ids].square().sum() / users.numel()


def teacher_loss(model: EagerTeacher, users: Tensor, candidates: Tensor, masks, config: Config) -> Tensor:
    """The loss of `TeacherTask.step` over full tables."""
    joint, head_users, head_items, prompt = model(masks)
    graph, settings = model.graph, config.teacher
    where = (users, candidates[:, 0], candidates[:, 1])
    loss = reference.bpr(reference.margins(*joint.split([graph.num_users, graph.num_items]), *where))
    for u, i in zip(head_users, head_items, strict=True):
        loss = loss + settings.modality_loss * reference.bpr(reference.margins(u, i, *where))
    prompt_users = torch.sparse.mm(graph.users_from_items, prompt)
    loss = loss + settings.prompt_loss * reference.bpr(reference.margins(prompt_users, prompt, *where))
    return loss + _l2(model.table, users, candidates, graph.num_users, settings.l2)


def student_loss(
    table: Tensor, teacher: EagerTeacher, users: Tensor, candidates: Tensor, nodes: Tensor, config: Config,
    modality_weights: Tensor,
) -> Tensor:  # fmt: skip
    """The loss of `StudentTask.step` over full tables, the teacher recomputed with its prompt learning."""
    graph, d = teacher.graph, config.distill
    student_users, student_items = graph.propagate(table, config.student.layers).split(
        [graph.num_users, graph.num_items]
    )
    joint, head_users, head_items, _ = teacher()
    where = (users, candidates[:, 0], candidates[:, 1])
    margin = reference.margins(student_users, student_items, *where)
    teacher_margin = reference.margins(*joint.split([graph.num_users, graph.num_items]), *where)
    logits = [reference.list_scores(u, i, users, candidates) for u, i in zip(head_users, head_items, strict=True)]
    own = reference.list_scores(student_users, student_items, users, candidates)
    loss = reference.bpr(margin) + d.pair * reference.pair_kd(margin, teacher_margin, d.pair_tau, d.pair_kind)
    loss = loss + d.list * reference.list_kd(
        own, torch.stack(logits), d.list_alpha, d.list_beta, d.list_tau, d.list_weight, modality_weights
    )
    student = torch.cat([student_users, student_items])[nodes]
    targets = [torch.cat([u, i])[nodes] for u, i in zip(head_users, head_items, strict=True)]
    loss = loss + d.emb * reference.emb_kd(student, targets, d.emb_gamma, len(targets) * modality_weights)
    return loss + _l2(table, users, candidates, graph.num_users, config.student.l2)
