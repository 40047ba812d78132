"""torch.compile(fullgraph=True) down to the kernel launches. No GPU runs them here: each graph is captured, checked and
answered with zeros."""

from __future__ import annotations

import os

import pytest
import torch
import triton
from torch._functorch.aot_autograd import aot_module_simplified
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._inductor.utils import output_node
from triton.backends.compiler import GPUTarget

import mmkd.kernels.register  # noqa: F401  compiled kernels, not interpreted ones
from mmkd import BipartiteGraph, ops

UE, IE = (torch.randn(n, 16, requires_grad=True) for n in (20, 30))
U, C, T = torch.zeros(8, dtype=torch.int64), torch.zeros(8, 5, dtype=torch.int64), torch.randn(8)
GRAPH = BipartiteGraph.from_edges([0, 1, 2], [3, 4, 5], 20, 30)


class NoGpu:
    """Tracing asks the driver what it would compile for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 86, 32)


def launches(step) -> list[tuple[str, set[str]]]:
    """(kernel, arguments it writes to) of every launch in the compiled forward and backward of `step`."""
    graphs = []

    def stand_in(module, example):
        graphs.append(module)
        outputs = [o.meta["val"] if isinstance(o, torch.fx.Node) else o for o in output_node(module).args[0]]

        def run(args):
            args.clear()
            return [torch.zeros(v.shape, dtype=v.dtype) if isinstance(v, torch.Tensor) else v for v in outputs]

        run._boxed_call = True
        return run

    def backend(module, example):
        return aot_module_simplified(module, example, fw_compiler=stand_in, bw_compiler=stand_in)

    torch._dynamo.reset()
    torch.compile(step, fullgraph=True, backend=backend)(UE, IE).sum().backward()
    assert len(graphs) == 2
    nodes = [n for g in graphs for n in g.graph.nodes if "triton_kernel_wrapper" in str(n.target)]
    return [
        (kernel_side_table.get_kernel(n.kwargs["kernel_idx"]).base_fn.__name__, set(n.kwargs["tensors_to_clone"]))
        for n in nodes
    ]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    triton.runtime.driver.set_active(NoGpu())
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "1")  # only so that the door lets CPU tensors through


CASES = {
    "bpr_kd": (
        lambda u, i: sum(ops.bpr_pair_kd_loss(u, i, U, U, U, T, tau=0.7, impl="triton")),
        [("_bpr_kd", {"bpr", "pair", "margin"}), ("_bpr_kd_scatter", {"grad_user", "grad_item"})],
    ),
    "list_kd": (
        lambda u, i: ops.list_kd_loss(u, i, U, C, torch.ones(2, 8, 5), impl="triton"),
        [("_list_kd", {"logits", "loss"}), ("_list_kd_scatter", {"grad_user", "grad_item"})],
    ),
    "list_scores": (
        lambda u, i: ops.list_scores(u, i, U, C, impl="triton"),
        [("_list_scores", {"logits"}), ("_list_scores_scatter", {"grad_user", "grad_item"})],
    ),
    "emb_kd": (
        lambda u, i: ops.emb_kd_loss(u, torch.ones(2, 20, 16), gamma=1.5, impl="triton"),
        [("_emb_kd", {"stats", "loss"}), ("_emb_kd_backward", {"grad_student"})],
    ),
    "propagate": (
        lambda u, i: ops.propagate(GRAPH, torch.cat([u, i]), 2, U, impl="triton"),
        [("_mark_neighbours", {"flags"})] + [("_spmm_rows", {"out"})] * 4,
    ),
    "spmm": (lambda u, i: GRAPH.users_from_items(i, impl="triton"), [("_spmm_rows", {"out"})] * 2),
}


@pytest.mark.parametrize("op", CASES)
def case_the_graph_holds_the_kernels_and_knows_what_they_write(op):
    step, expected = CASES[op]
    assert launches(step) == expected


def case_deterministic_gradients_trace_too():
    torch.use_deterministic_algorithms(True)
    names = [name for name, _ in launches(CASES["bpr_kd"][0])]
    torch.use_deterministic_algorithms(False)
    assert names == ["_bpr_kd", "_bpr_kd_slopes", "_scatter_segments", "_scatter_segments"]
