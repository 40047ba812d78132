"""The frozen teacher as a function of W_P and b_P alone (spec section 3).

With X, W, b and the id table frozen and dropout off, everything ``d_m`` wide and every SpMM of the teacher is a
constant. What is left costs ``O(|rows| d^2)`` a step (``norm="mean"``), plus d-wide SpMMs for ``norm="row"``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmkd.graph import BipartiteGraph
from mmkd.models.prompt import Prompt
from mmkd.models.teacher import Teacher, TeacherOutput, combine, prompt_row_scale, spread


class FrozenTeacher(nn.Module):
    """A trained teacher whose only parameters are the prompt's; equal to it to rounding, in values and gradients.

    ``T^m = W_P^T S^m + b_P s^m^T``, ``F[rows] = C^m[rows] + lambda_1 c (K[rows] W_P + o[rows] b_P^T) T^m`` with
    ``C = spread(X W + 1 b^T)``, ``K = spread(H)``, ``o = spread(1)``, ``S^m = H^T X^m W^m``, ``s^m = (X^m W^m)^T 1``.
    For ``norm="row"`` the rows of ``p`` are first scaled by ``1 / ||p_i (p^T X^m)||`` and spread over the graph anew.

    The features are read once, block by block, and may be released afterwards. The prompt module is shared with the
    teacher it was built from: training one changes the other.

    Args:
        teacher: trained; its parameters other than the prompt's are read, never changed.
    """

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.graph: BipartiteGraph = teacher.graph
        self.prompt: Prompt = teacher.prompt
        self.modalities = len(teacher.features)
        self.feature_layers, self.feature_weight = teacher.feature_layers, teacher.feature_weight
        self.strength, self.norm = teacher.strength, teacher.norm
        with torch.no_grad():
            self._build(teacher)

    def _constant(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value, persistent=False)

    def _build(self, teacher: Teacher) -> None:
        basis = self.prompt.basis
        projected, mixed, sums, reduced, totals = [], [], [], [], []
        for table, weight in zip(teacher.features, teacher.weights, strict=True):
            product = table.project(weight)  # [I, d]
            projected.append(product)
            mixed.append(_accurate_product(basis, product))
            sums.append(product.sum(0, dtype=torch.float64).to(product.dtype))
            if self.norm == "row":
                reduced.append(_accurate_product(basis, table.values))
                totals.append(torch.as_tensor(table.column_sum()).to(basis))
        users, items = self._spread(torch.cat(projected, 1) + torch.cat(list(teacher.biases)))
        self._constant("user_features", users)  # C_u, [U, M d]
        self._constant("item_features", items)
        self._constant("mixed", torch.cat(mixed, 1))  # S, [d, M d]
        self._constant("sums", torch.cat(sums))  # s, [M d]
        self._constant("joint", teacher.id_embeddings())  # [N, d]
        self.reduced, self.totals = reduced, totals
        if self.norm == "mean":
            users, items = self._spread(basis)
            self._constant("user_basis", users)  # K_u, [U, d]
            self._constant("item_basis", items)
            users, items = self._spread(torch.ones_like(basis[:, :1]))
            self._constant("user_ones", users)  # o_u, [U, 1]
            self._constant("item_ones", items)

    def _spread(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return spread(self.graph, features, self.feature_layers)

    def _prompt_parts(self, users: Tensor, items: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """``spread(c p)`` at the asked users and items, one per modality (the same one for ``norm="mean"``)."""
        weight, bias = self.prompt.weight, self.prompt.bias
        if self.norm == "mean":
            scale = 1.0 / max(self.graph.num_items, 1)
            of_users = scale * (self.user_basis[users] @ weight + self.user_ones[users] * bias)
            of_items = scale * (self.item_basis[items] @ weight + self.item_ones[items] * bias)
            return [of_users] * self.modalities, [of_items] * self.modalities
        prompt = self.prompt()
        scaled = []
        for reduced, total in zip(self.reduced, self.totals, strict=True):
            product = weight.T @ reduced + bias[:, None] * total  # p^T X, [d, d_m]
            scaled.append(prompt * prompt_row_scale(prompt, product))
        all_users, all_items = self._spread(torch.cat(scaled, 1))
        return (
            list(all_users.index_select(0, users).chunk(self.modalities, 1)),
            list(all_items.index_select(0, items).chunk(self.modalities, 1)),
        )

    def forward(self, rows: Tensor | None = None, num_users: int | None = None) -> TeacherOutput:
        """Teacher outputs at node ids ``rows`` (users first, ``num_users`` of them), or at all nodes."""
        if rows is None:
            rows = torch.arange(self.graph.num_nodes, device=self.joint.device)
            num_users = self.graph.num_users
        users, items = rows[:num_users], rows[num_users:] - self.graph.num_users
        of_users, of_items = self.user_features[users], self.item_features[items]
        if self.strength:
            transfer = self.prompt.weight.T @ self.mixed + self.prompt.bias[:, None] * self.sums  # [d, M d]
            parts = self._prompt_parts(users, items)
            blocks = transfer.chunk(self.modalities, 1)
            added = [torch.cat([p @ t for p, t in zip(part, blocks, strict=True)], 1) for part in parts]
            of_users = of_users + self.strength * added[0]
            of_items = of_items + self.strength * added[1]
        return combine(self.joint[rows], of_users, of_items, self.feature_weight, self.modalities)


def _accurate_product(left: Tensor, right: Tensor, rows: int = 4096) -> Tensor:
    """``left^T right`` summed over blocks of items in float64, in the dtype of ``left``."""
    total = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64, device=left.device)
    for a, b in zip(left.split(rows), right.split(rows), strict=True):
        total += a.double().T @ b.double()
    return total.to(left.dtype)
