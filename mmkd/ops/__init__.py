"""The ops: one door each. A door checks its arguments, picks an implementation and carries the gradient."""

from mmkd.ops.bpr_kd import bpr_kd_from_scores, bpr_loss, bpr_pair_kd_loss, pair_kd_loss
from mmkd.ops.distill import distill_loss
from mmkd.ops.distill_frozen import distill_frozen_loss
from mmkd.ops.emb_kd import emb_kd_loss
from mmkd.ops.frozen_teacher import frozen_teacher
from mmkd.ops.list_kd import list_kd_from_scores, list_kd_loss, list_scores
from mmkd.ops.project import project
from mmkd.ops.spmm import propagate, propagate_adamw_, sddmm, spmm
from mmkd.ops.student import student_loss
from mmkd.ops.teacher import teacher_loss
from mmkd.ops.topk import topk

__all__ = [
    "bpr_kd_from_scores",
    "bpr_loss",
    "bpr_pair_kd_loss",
    "distill_frozen_loss",
    "distill_loss",
    "emb_kd_loss",
    "frozen_teacher",
    "list_kd_from_scores",
    "list_kd_loss",
    "list_scores",
    "pair_kd_loss",
    "project",
    "propagate",
    "propagate_adamw_",
    "sddmm",
    "spmm",
    "student_loss",
    "teacher_loss",
    "topk",
]
