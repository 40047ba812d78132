"""Plain PyTorch that reads like the specification: the truth for tests, the baseline for benches."""

from mmkd.reference.bpr_kd import bpr, margins, pair_kd
from mmkd.reference.distill import distill
from mmkd.reference.distill_frozen import distill_frozen
from mmkd.reference.emb_kd import emb_kd
from mmkd.reference.frozen_teacher import frozen_teacher
from mmkd.reference.list_kd import list_kd, list_scores
from mmkd.reference.project import project
from mmkd.reference.spmm import (
    propagate,
    propagate_adamw_,
    propagate_backward,
    propagate_mixed,
    propagate_mixed_backward,
    sddmm,
    spmm,
)
from mmkd.reference.student import prompt_state, student
from mmkd.reference.teacher import teacher
from mmkd.reference.topk import topk

__all__ = [
    "bpr",
    "distill",
    "distill_frozen",
    "emb_kd",
    "frozen_teacher",
    "list_kd",
    "list_scores",
    "margins",
    "pair_kd",
    "project",
    "prompt_state",
    "propagate",
    "propagate_adamw_",
    "propagate_backward",
    "propagate_mixed",
    "propagate_mixed_backward",
    "sddmm",
    "spmm",
    "student",
    "teacher",
    "topk",
]
