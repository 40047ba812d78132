"""SpMM and LightGCN propagation against what people use today, one interleaved run."""

from __future__ import annotations

import floor
import pytest
import torch
from cases import DIM, graph

from mmkd import ops, reference


def _torch_csr(g, dtype=torch.float32):
    """`Â` as torch's CSR with 32-bit indices, which MKL multiplies 6 % faster than 64-bit ones."""
    value = (g.scale[torch.repeat_interleave(torch.arange(g.num_nodes), g.degree)] * g.scale[g.col.long()]).to(dtype)
    return torch.sparse_csr_tensor(g.rowptr.int(), g.col.int(), value, (g.num_nodes, g.num_nodes))


def _pyg(csr):
    try:
        from torch_geometric.nn import LGConv
    except ImportError:
        return None
    conv = LGConv(normalize=False)
    return lambda x: conv(x, csr)


def _moved(g, element: int) -> float:
    # every non-zero gathers a row; column ids once; the result is written once
    return 2 * g.num_edges * (DIM * element + 4) + g.num_nodes * (DIM * element + 8)


@pytest.mark.parametrize("name", ["tiktok", "netflix", "electronics", "amazon-book"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def bench_spmm_forward(compare, name, dtype):
    g = graph(name)
    torch.manual_seed(0)
    x32 = torch.randn(g.num_nodes, DIM)
    x, csr = x32.to(dtype), _torch_csr(g)

    def ours():
        return ops.spmm(g.rowptr, g.col, x, row_scale=g.scale, col_scale=g.scale)

    rivals = {"torch csr fp32": lambda: csr @ x32}
    if dtype == torch.float32:
        coo, pyg = csr.to_sparse_coo().coalesce(), _pyg(csr)
        torch.testing.assert_close(ours(), csr @ x32, atol=1e-4, rtol=1e-4)
        rivals |= {"torch coo": lambda: coo @ x32, "pyg LGConv csr": pyg and (lambda: pyg(x32))}
    else:
        torch.testing.assert_close(ours().float(), csr @ x32, atol=5e-2, rtol=5e-2)
    rivals["floor: rows read"] = floor.rows_read([(x, g.col)])
    targets = {"torch csr fp32": 5 if dtype == torch.float32 else 9}
    compare("spmm", f"{name} forward {dtype}".replace("torch.", ""), ours, rivals, targets=targets,
            moved_bytes=_moved(g, x.element_size()), flops=4 * g.num_edges * DIM)  # fmt: skip


class _SymmetricCsr(torch.autograd.Function):
    """A hand-written layer: the adjacency is symmetric, so its backward is one more product."""

    @staticmethod
    def forward(ctx, csr, x):
        ctx.csr = csr
        return csr @ x

    @staticmethod
    def backward(ctx, grad):
        return None, ctx.csr @ grad


def _eager(layer, x, num_layers):
    out = h = x
    for _ in range(num_layers):
        h = layer(h)
        out = out + h
    return out / (num_layers + 1)


@pytest.mark.parametrize("name", ["tiktok", "netflix", "electronics", "amazon-book"])
@pytest.mark.parametrize("restricted", [False, True], ids=["all", "rows"])
def bench_propagate(compare, name, restricted):
    g = graph(name)
    torch.manual_seed(0)
    x = torch.randn(g.num_nodes, DIM, requires_grad=True)
    csr = _torch_csr(g)
    rows = torch.randperm(g.num_nodes)[:3072] if restricted else None

    def pick(out):
        return out if rows is None else out[rows]

    ones = torch.ones(g.num_nodes if rows is None else len(rows), DIM)  # once: fresh pages are part of no op

    def run(fn):
        fn().backward(ones)
        x.grad = None

    def ours():
        return ops.propagate(g, x, 2, rows)

    def plain():
        return pick(_eager(lambda h: csr @ h, x, 2))

    def symmetric():
        return pick(_eager(lambda h: _SymmetricCsr.apply(csr, h), x, 2))

    truth = pick(_eager(lambda h: _torch_csr(g, torch.float64) @ h, x.detach().double(), 2))
    torch.testing.assert_close(ours().double(), truth, atol=1e-5, rtol=1e-5)
    targets = {"csr autograd": 15, "csr symmetric": 7} if restricted else {"csr autograd": 10, "csr symmetric": 5}
    label = "rows=3072" if restricted else "all rows"
    compare("propagate", f"{name} L=2 {label} fwd+bwd", lambda: run(ours),
            {"csr autograd": lambda: run(plain), "csr symmetric": lambda: run(symmetric),
             "floor: rows read": floor.rows_read(floor.propagation(g, rows, DIM))},
            targets=targets, memory=True, rounds=5 if name == "amazon-book" else 10)  # fmt: skip


@pytest.mark.parametrize("name", ["tiktok", "netflix", "electronics", "amazon-book"])
@pytest.mark.parametrize("restricted", [False, True], ids=["all", "rows"])
def bench_propagate_mixed(compare, name, restricted):
    """Layers gathered in bfloat16, beside the same in float32."""
    g = graph(name)
    torch.manual_seed(0)
    x = torch.randn(g.num_nodes, DIM, requires_grad=True)
    rows = torch.randperm(g.num_nodes)[:3072] if restricted else None
    ones = torch.ones(g.num_nodes if rows is None else len(rows), DIM)

    def run(gather):
        ops.propagate(g, x, 2, rows, gather=gather).backward(ones)
        x.grad = None

    label = "rows=3072" if restricted else "all rows"
    compare("propagate", f"{name} L=2 {label} fwd+bwd, gather bfloat16", lambda: run(torch.bfloat16),
            {"our float32": lambda: run(None)}, memory=True, rounds=5 if name == "amazon-book" else 10)  # fmt: skip


def bench_spmm_reference(compare):
    """The plain reference, for scale."""
    g = graph("tiktok")
    x = torch.randn(g.num_nodes, DIM)
    compare("spmm", "tiktok forward, against our own reference",
            lambda: ops.spmm(g.rowptr, g.col, x, row_scale=g.scale, col_scale=g.scale),
            {"reference": lambda: reference.spmm(g.rowptr, g.col, x, row_scale=g.scale, col_scale=g.scale)}, rounds=5)  # fmt: skip
