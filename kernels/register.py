"""Defines the `mmkd_triton::` ops, with the schemas of csrc/library.cpp, from the functions of this package.

Imported by `mmkd.ops._registry.namespace("triton")`, which then adds the fakes and the gradients.
"""

import functools
from collections.abc import Callable

import torch
from torch.library import custom_op, triton_op

from mmkd.kernels import bpr_kd, emb_kd, list_kd, spmm, topk

OPS = {
    "spmm": spmm.spmm,
    "sddmm": spmm.sddmm,
    "csr_transpose": spmm.csr_transpose,
    "spmm_plan": spmm.spmm_plan,
    "propagate": spmm.propagate,
    "propagate_backward": spmm.propagate_backward,
    "bpr_kd": bpr_kd.bpr_kd,
    "bpr_kd_backward": bpr_kd.bpr_kd_backward,
    "bpr_kd_scores": bpr_kd.bpr_kd_scores,
    "bpr_kd_scores_backward": bpr_kd.bpr_kd_scores_backward,
    "list_scores": list_kd.list_scores,
    "list_scores_backward": list_kd.list_scores_backward,
    "list_kd": list_kd.list_kd,
    "list_kd_backward": list_kd.list_kd_backward,
    "list_kd_scores": list_kd.list_kd_scores,
    "list_kd_scores_backward": list_kd.list_kd_scores_backward,
    "emb_kd": emb_kd.emb_kd,
    "emb_kd_backward": emb_kd.emb_kd_backward,
}


def _on_its_device(op: Callable) -> Callable:
    """`op` with the device of its first argument made current: Triton launches on the current one."""

    @functools.wraps(op)
    def run(first, *args, **kwargs):
        with torch.cuda.device_of(first):
            return op(first, *args, **kwargs)

    return run


for _name, _fn in OPS.items():
    # torch.compile sees through these to the kernels
    triton_op(f"mmkd_triton::{_name}", _on_its_device(_fn), mutates_args=())

# Serving only: opaque, so that the loop over chunks of users stays out of the graph.
custom_op("mmkd_triton::topk", _on_its_device(topk.topk), mutates_args=())
