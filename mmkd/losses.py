"""Drop-in loss modules over scores: they replace a RecBole, MMRec or hand-written loss line for line."""

from __future__ import annotations

from torch import Tensor, nn

from mmkd import ops


class BPRLoss(nn.Module):
    """`-mean log sigmoid(pos_score - neg_score)` (paper, Eq. 13).

    Shapes: `pos_score` and `neg_score` `[B]` -> scalar.
    """

    def forward(self, pos_score: Tensor, neg_score: Tensor) -> Tensor:
        return ops.bpr_kd_from_scores(pos_score - neg_score)[0]


class PairKDLoss(nn.Module):
    """Pairwise ranking KD (paper, Eq. 5; spec section 4): see `mmkd.ops.pair_kd_loss` for the formula.

    Shapes: `student_margin` and `teacher_margin` `[B]` (score of the observed item minus the negative's) -> scalar.
    """

    def __init__(self, tau: float = 1.0, kind: str = "bernoulli") -> None:
        super().__init__()
        self.tau, self.kind = tau, kind

    def forward(self, student_margin: Tensor, teacher_margin: Tensor) -> Tensor:
        return ops.bpr_kd_from_scores(student_margin, teacher_margin, tau=self.tau, kind=self.kind)[1]

    def extra_repr(self) -> str:
        return f"tau={self.tau}, kind={self.kind!r}"


class ListKDLoss(nn.Module):
    """Disentangled list-wise KD (paper, Eq. 10): see `mmkd.ops.list_kd_loss` for the formula.

    Shapes: `student_logits` `[B, K]`, `teacher_logits` `[B, K]` or `[M, B, K]`, index 0 the observed item -> scalar.
    """

    def __init__(self, alpha: float = 1.0, beta: float = 1.0, tau: float = 1.0, weight: str = "coupled") -> None:
        super().__init__()
        self.alpha, self.beta, self.tau, self.weight = alpha, beta, tau, weight

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, modality_weights: Tensor | None = None) -> Tensor:
        return ops.list_kd_from_scores(
            student_logits, teacher_logits, alpha=self.alpha, beta=self.beta, tau=self.tau, weight=self.weight,
            modality_weights=modality_weights,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, tau={self.tau}, weight={self.weight!r}"


class EmbKDLoss(nn.Module):
    """`sum_m v_m mean_i (1 - cos(e_i, f_i^m))^gamma` (paper, Eq. 11).

    Shapes: `student` `[n, d]`, `teacher` `[n, d]` or `[M, n, d]`, `modality_weights` `[M]`, 1 each if not given -> scalar.
    """

    def __init__(self, gamma: float = 2.0) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, student: Tensor, teacher: Tensor, modality_weights: Tensor | None = None) -> Tensor:
        return ops.emb_kd_loss(student, teacher, gamma=self.gamma, modality_weights=modality_weights)

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}"
