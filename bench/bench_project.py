"""Projected features of every modality with the prompt's term, bias and dropout, forward and backward, as a teacher's step asks
for them, against eager, torch.compile, library products in place, and the bare products nobody can leave out."""

from __future__ import annotations

import pytest
import torch
from cases import DIM, SIZES
from harness import compiled

from mmkd import ops


def problem(name: str, stored: torch.dtype):
    """Tables of standard normal features, weights, `[H 1]`, what is added and a mask of dropout."""
    torch.manual_seed(0)
    items, widths = SIZES[name][1], SIZES[name][3]
    tables = [torch.randn(items, k).to(stored) for k in widths]
    weights = [(torch.randn(k, DIM) / k**0.5).requires_grad_() for k in widths]
    design, total = torch.randn(items, DIM + 1), len(widths) * DIM
    added = torch.randn(DIM + 1, total).requires_grad_()
    mask = 1.25 * (torch.rand(items, total) > 0.2).float()
    return tables, weights, design, added, mask


def in_place(tables, weights, design, added, mask, upstream):
    """Every product by the library into its columns, then what is added and the mask in place; its way back by hand."""

    def run() -> list[torch.Tensor]:
        with torch.no_grad():
            out = torch.empty_like(mask)
            for x, w, columns in zip(tables, weights, out.split(DIM, 1), strict=True):
                torch.mm(x, w, out=columns)
            out.addmm_(design, added).mul_(mask)
            grad = upstream * mask
            back = [(g.T @ x).T for x, g in zip(tables, grad.split(DIM, 1), strict=True)]
            return [out, *back, design.T @ grad]

    return run


def bare(tables, weights, upstream):
    """`X W` and `X^T G` alone, in the order of factors that MKL is quickest in."""

    def run() -> None:
        with torch.no_grad():
            for x, w, g in zip(tables, weights, upstream.split(DIM, 1), strict=True):
                _, _ = x @ w, g.T @ x

    return run


@pytest.mark.parametrize("name", ["tiktok", "netflix", "electronics"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def bench_project(compare, name, stored):
    tables, weights, design, added, mask = problem(name, stored)
    leaves, upstream = [*weights, added], torch.randn_like(mask)

    def ours():
        return ops.project(tables, weights, design=design, added=added, mask=mask)

    def eager():
        parts = [x.to(w.dtype) @ w for x, w in zip(tables, weights, strict=True)]
        return (torch.cat(parts, 1) + design @ added) * mask

    def with_gradient(fn):
        return lambda: torch.autograd.grad(fn(), leaves, upstream)

    mine, theirs = (torch.autograd.grad(f(), leaves, upstream) for f in (ours, eager))
    for a, b in zip((ours().detach(), *mine), (eager().detach(), *theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
    fused = compiled(eager)
    rivals = {"eager": with_gradient(eager), "torch.compile": fused and with_gradient(fused)}
    if stored == torch.float32:
        rivals["products in place"] = in_place(tables, weights, design, added, mask, upstream)
        rivals["bare products"] = bare(tables, weights, upstream)
    compare(
        "project", f"{name} {str(stored).removeprefix('torch.')} M={len(tables)} fwd+bwd", with_gradient(ours), rivals,
        memory=True, flops=4 * DIM * len(design) * (sum(x.shape[1] for x in tables) + len(tables) * (DIM + 1)),
    )  # fmt: skip
