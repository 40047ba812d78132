"""Ranking metrics and the all-ranking evaluator (spec section 5)."""

from mmkd.evaluation.evaluator import (
    PerUser,
    evaluate,
    evaluate_per_user,
    evaluate_scores,
    evaluate_scores_per_user,
    rank_scores,
)

__all__ = [
    "PerUser",
    "evaluate",
    "evaluate_per_user",
    "evaluate_scores",
    "evaluate_scores_per_user",
    "rank_scores",
]
