"""All-ranking top-50 with the train items left out, against chunked matmul + topk and faiss."""

from __future__ import annotations

import pytest
import torch
from cases import DIM, graph

from mmkd import ops


def _faiss(items, users, k):
    try:
        import faiss
    except ImportError:
        return None
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(items.shape[1])
    index.add(items.numpy())
    return lambda: index.search(users.numpy(), k)


@pytest.mark.parametrize("name", ["netflix", "amazon-book"])
def bench_topk(compare, name):
    g, k = graph(name), 50
    torch.manual_seed(0)
    users, items = torch.randn(g.num_users, DIM), torch.randn(g.num_items, DIM)
    some = torch.randperm(g.num_users)[: 8192 if name == "netflix" else 2048]
    exclude = (g.user_rowptr, g.user_col)
    rows = [g.user_col[g.user_rowptr[u] : g.user_rowptr[u + 1]].long() for u in some.tolist()]

    def chunked():
        best = []
        for start in range(0, len(some), 1024):
            scores = users[some[start : start + 1024]] @ items.T
            mine = rows[start : start + 1024]
            which = torch.repeat_interleave(torch.arange(len(mine)), torch.tensor([len(r) for r in mine]))
            scores[which, torch.cat(mine)] = -torch.inf
            best.append(scores.topk(k).values)
        return torch.cat(best)

    torch.testing.assert_close(ops.topk(users, items, k, some, exclude)[0], chunked(), atol=1e-3, rtol=1e-4)
    flops = 2 * len(some) * g.num_items * DIM
    compare("topk", f"{name} {len(some)} users, train excluded", lambda: ops.topk(users, items, k, some, exclude),
            {"matmul+mask+topk": chunked}, targets={"matmul+mask+topk": 3}, flops=flops, rounds=5)  # fmt: skip
    compare("topk", f"{name} {len(some)} users, no exclusion", lambda: ops.topk(users, items, k, some),
            {"faiss IndexFlatIP": _faiss(items, users[some], k)}, targets={"faiss IndexFlatIP": 1.2}, flops=flops, rounds=5)  # fmt: skip
