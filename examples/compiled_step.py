"""`torch.compile(fullgraph=True)` over a whole loss with mmkd's ops inside: nothing falls out of the graph.

python examples/compiled_step.py        at Netflix size: same losses and gradients as eager, times of both
"""

from __future__ import annotations

import torch
from common import NETFLIX, in_turn, random_graph, report
from own_loop import batches
from torch import Tensor

from mmkd import BipartiteGraph, ops


def make_loss(graph: BipartiteGraph, layers: int, teacher_logits: Tensor):
    """BPR + PairKD + ListKD + L2 of a LightGCN student; all of it traceable."""

    def loss(table: Tensor, users: Tensor, candidates: Tensor) -> Tensor:
        user_emb, item_emb = ops.propagate(graph, table, layers).split([graph.num_users, graph.num_items])
        pos, neg = candidates[:, 0].contiguous(), candidates[:, 1].contiguous()
        margin = teacher_logits[:, 0] - teacher_logits[:, 1]
        bpr, pair = ops.bpr_pair_kd_loss(user_emb, item_emb, users, pos, neg, margin)
        lists = ops.list_kd_loss(user_emb, item_emb, users, candidates, teacher_logits)
        return bpr + 0.1 * pair + 0.1 * lists + 1e-4 * table[users].square().sum() / len(users)

    return loss


def main(
    users: int, items: int, interactions: int, dim: int = 64, layers: int = 3, batch: int = 1024, rounds: int = 5
) -> dict[str, float]:
    """Differences of loss and gradient between eager and compiled, and seconds of forward + backward of both."""
    graph = random_graph(users, items, interactions)
    generator = torch.Generator().manual_seed(0)
    table = (torch.randn(graph.num_nodes, dim, generator=generator) * 0.1).requires_grad_()
    who, pos, _ = batches(graph, batch, 1)[0]
    rest = torch.randint(0, graph.num_items, (batch, 10), generator=generator)
    candidates = torch.cat([pos[:, None], rest], dim=1)
    eager = make_loss(graph, layers, torch.randn(batch, 11, generator=generator))
    compiled = torch.compile(eager, fullgraph=True)

    def step(loss) -> tuple[Tensor, Tensor]:
        value = loss(table, who, candidates)
        return value.detach(), torch.autograd.grad(value, table)[0]

    (first, grad), (second, other) = step(eager), step(compiled)
    result = {"loss": float((first - second).abs()), "gradient": float((grad - other).abs().max())}
    result["theirs"], result["ours"] = in_turn(lambda: step(eager), lambda: step(compiled), rounds)
    report("loss, forward + backward", "eager", result["theirs"], result["ours"], result["loss"], "compiled")
    return result


if __name__ == "__main__":
    main(*NETFLIX)
