"""The frozen teacher as a function of W_P and b_P alone (spec section 3).

With X, W, b and the id table frozen and dropout off, everything ``d_m`` wide and, for ``norm="mean"``, every SpMM of the
teacher is a constant. What is left costs one product ``[rows, d+1] x [d+1, M d]`` a step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmkd import ops
from mmkd.graph import BipartiteGraph
from mmkd.models.prompt import Prompt
from mmkd.models.teacher import Teacher, TeacherOutput, combine, prompt_parts, spread
from mmkd.ops.student import prompt_state


class FrozenTeacher(nn.Module):
    """A trained teacher whose only parameters are the prompt's; equal to it to rounding, in values and gradients.

    With ``V = [W_P; b_P^T]`` and ``S^m = [H 1]^T X^m W^m``, at any node ``F^m = C^m + lambda_1 c K (V V^T S^m)`` with the
    constants ``C = spread(X W + 1 b^T)`` and ``K = spread([H 1])``.

    For ``norm="row"`` the rows of ``p^m`` are scaled by ``1 / ||p_i (p^T X^m)||``, a function of the prompt that differs
    from item to item, so ``spread`` no longer commutes with it: that mode keeps one SpMM ``M d`` wide over the graph and,
    for the asked items, a second one (the two-hop matrix that would replace both has 23 times the interactions at Netflix size). It
    stays free of anything ``d_m`` wide.

    The features are read once, block by block, and may be released afterwards. The prompt module is shared with the
    teacher it was built from: training one changes the other.

    Args:
        teacher: trained; its parameters other than the prompt's are read, never changed.
        learn_prompt: False folds the prompt as it stands into the constants; then a step only gathers, in both norms.
    """

    def __init__(self, teacher: Teacher, learn_prompt: bool = True) -> None:
        super().__init__()
        self.graph: BipartiteGraph = teacher.graph
        self.prompt: Prompt = teacher.prompt
        self.modalities = len(teacher.features)
        self.feature_layers = teacher.feature_layers
        self.strength, self.norm = teacher.strength, teacher.norm
        with torch.no_grad():
            self._constant("ids", teacher.id_embeddings())  # [N, d]
            self._constant("omega", teacher.omega.detach().clone())  # [M]
            if learn_prompt and self.strength:
                self._build(teacher)
            else:
                self._constant("content", self._everywhere(teacher.project()))
                self.strength = 0.0

    def _constant(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value, persistent=False)

    def _build(self, teacher: Teacher) -> None:
        self._constant("content", self._everywhere(teacher.project(prompt=False)))  # C, [M, N, d]
        if self.norm == "mean":
            share = self.strength / max(self.graph.num_items, 1)
            self._constant("mixed", share * torch.cat(teacher.mixed(), 1))  # lambda_1 c S^m side by side, [d+1, M d]
            users, items = spread(self.graph, self.prompt.design, self.feature_layers)
            self._constant("design", torch.cat([users, items]))  # K, [N, d+1]
        else:
            self._constant("mixed", torch.stack(teacher.mixed()))  # S, [M, d+1, d]
            self._constant("grams", torch.stack(teacher.grams()))  # [M, d+1, d+1]

    def _everywhere(self, features: Tensor) -> Tensor:
        """``spread`` of ``[I, M d]`` at all nodes, ``[M, N, d]``."""
        users, items = spread(self.graph, features, self.feature_layers)
        return torch.cat([self._by_modality(users), self._by_modality(items)], 1)

    def _by_modality(self, x: Tensor) -> Tensor:
        return torch.stack(x.chunk(self.modalities, 1))

    def state(self) -> Tensor | None:
        """What one step needs of the prompt, computed once and handed to :func:`at` and :func:`logits`.

        ``norm="mean"``: ``lambda_1 c V V^T S``, ``[M, d+1, d]``. ``norm="row"``: ``F`` at all nodes, ``[M, N, d]``. None
        where the prompt is part of the constants.
        """
        if not self.strength:
            return None
        stacked = self.prompt.stacked()
        if self.norm == "mean":
            return prompt_state(stacked, self.mixed, self.modalities)
        parts = prompt_parts(self.prompt.design, stacked, list(self.mixed), list(self.grams))  # [I, M d]
        return self.content + self.strength * self._everywhere(parts)

    def at(self, nodes: Tensor, state: Tensor | None) -> Tensor:
        """``F^m`` at node ids ``[n]``, ``[M, n, d]``."""
        if self.norm == "row" and state is not None:
            return state.index_select(1, nodes)
        constant = self.content.index_select(1, nodes)
        if state is None:
            return constant
        return torch.baddbmm(constant, self.design.index_select(0, nodes).expand(self.modalities, -1, -1), state)

    def constants(self, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """``C, K, ids, omega`` of :func:`mmkd.ops.frozen_teacher`; None where there is more or less to it than those:
        ``norm="row"``, or a prompt that is part of the constants."""
        return None if self.norm != "mean" or state is None else (self.content, self.design, self.ids, self.omega)

    def asked(
        self, nodes: Tensor, candidates: Tensor, state: Tensor | None, lists: bool = True
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """What a step of the student takes from the teacher.

        Args:
            nodes: int64 ``[3B + n]``: users, observed items, negatives, then nodes whose features are wanted.
            candidates: int64 ``[B, K]``, item ids.
            state: of :func:`state`.
            lists: whether logits are wanted.

        Returns:
            ``E^T_u . (E^T_pos - E^T_neg)``, ``[B]``; logits ``[M, B, K]`` or None; ``F`` of the last n nodes, ``[M, n, d]``.
        """
        constants = self.constants(state)
        if constants is not None:
            listed = candidates if lists else candidates[:, :0]
            margin, logits, targets = ops.frozen_teacher(*constants, state, nodes, listed, self.graph.num_users)
            return margin, logits if lists else None, targets
        count = 3 * len(candidates)
        heads = self.at(nodes, state)
        user, pos, neg = self.combine(nodes[:count], heads[:, :count]).chunk(3)
        logits = self.logits(heads[:, : len(candidates)], candidates, state) if lists else None
        return (user * (pos - neg)).sum(1), logits, heads[:, count:]

    def logits(self, heads: Tensor, candidates: Tensor, state: Tensor | None) -> Tensor:
        """``F_u^m . F_i^m``, ``[M, B, K]``, of users given by ``F_u^m`` ``[M, B, d]`` and item ids ``[B, K]``, where ``F``
        is there at all nodes: the prompt is part of the constants, or ``norm="row"``."""
        own, first = torch.arange(heads.shape[1], device=heads.device), self.graph.num_users
        scores = [
            ops.list_scores(head, table[first:], own, candidates)
            for head, table in zip(heads.unbind(), (self.content if state is None else state).unbind(), strict=True)
        ]
        return torch.stack(scores)

    def combine(self, nodes: Tensor, features: Tensor) -> Tensor:
        """``E^T`` at node ids ``[n]`` from ``F^m`` at them: ``[n, d]`` from ``[M, n, d]``."""
        return combine(self.ids.index_select(0, nodes), features, self.omega)

    def forward(self, rows: Tensor | None = None, num_users: int | None = None) -> TeacherOutput:
        """Teacher outputs at node ids ``rows`` (users first, ``num_users`` of them), or at all nodes."""
        if rows is None:
            rows, num_users = torch.arange(self.graph.num_nodes, device=self.ids.device), self.graph.num_users
        features = self.at(rows, self.state())
        joint, ids = self.combine(rows, features), self.ids.index_select(0, rows)
        return TeacherOutput(joint, ids, features[:, :num_users], features[:, num_users:])
