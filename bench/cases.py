"""The graphs and batches of the benches: synthetic, of the sizes in the paper's Table 3, fixed seed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from mmkd import BipartiteGraph
from mmkd.data.synthesis import PAPER_SIZES, random_interactions

# the paper's Table 3, and Amazon-Book for scale: users, items, interactions, feature widths
SIZES = {**PAPER_SIZES, "amazon-book": (52_643, 91_599, 2_984_108, ())}
DIM, BATCH, NUM_CANDIDATES, NUM_MODALITIES = 64, 1024, 11, 2


@lru_cache(maxsize=4)
def graph(name: str, seed: int = 0) -> BipartiteGraph:
    """A graph with log-normal user degrees and Zipf-like item popularity, exactly as many distinct pairs as `SIZES` says."""
    num_users, num_items, num_edges, _ = SIZES[name]
    return random_graph(num_users, num_items, num_edges, seed)


def random_graph(num_users: int, num_items: int, num_edges: int, seed: int = 0) -> BipartiteGraph:
    """The degree law of the benches at any size."""
    return BipartiteGraph.from_edges(*random_interactions(num_users, num_items, num_edges, seed), num_users, num_items)


@dataclass
class Batch:
    """A training batch over full tables, and the same batch over the compact table of its own rows."""

    user_emb: torch.Tensor
    item_emb: torch.Tensor
    users: torch.Tensor
    candidates: torch.Tensor  # [B, K], column 0 observed, column 1 BPR's negative
    teacher_margin: torch.Tensor
    teacher_logits: torch.Tensor  # [M, B, K]

    @property
    def pos(self) -> torch.Tensor:
        return self.candidates[:, 0].contiguous()

    @property
    def neg(self) -> torch.Tensor:
        return self.candidates[:, 1].contiguous()

    def to(self, device: str) -> Batch:
        """The same batch on another device, the tables as leaves."""
        moved = {k: v.detach().to(device) for k, v in vars(self).items()}
        return Batch(moved.pop("user_emb").requires_grad_(), moved.pop("item_emb").requires_grad_(), **moved)

    def compact(self) -> Batch:
        """Only the rows the batch touches, with local indices: what `propagate(rows=...)` hands to the losses."""
        rows_u, users = self.users.unique(return_inverse=True)
        rows_i, candidates = self.candidates.unique(return_inverse=True)
        user_emb, item_emb = self.user_emb.detach()[rows_u], self.item_emb.detach()[rows_i]
        return Batch(
            user_emb.requires_grad_(),
            item_emb.requires_grad_(),
            users,
            candidates,
            self.teacher_margin,
            self.teacher_logits,
        )


def batch(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, size: int = BATCH) -> Batch:
    """B users with one observed item and K - 1 uniform ones each, tables of width 64, teacher scores of two modalities."""
    g = graph(name)
    rng = np.random.default_rng(seed)
    degree = g.user_rowptr.diff().numpy()
    users = rng.choice(np.flatnonzero(degree), size)
    pos = g.user_col.numpy()[g.user_rowptr.numpy()[users] + rng.integers(0, degree[users])]
    candidates = rng.integers(0, g.num_items, (size, NUM_CANDIDATES))
    candidates[:, 0] = pos
    torch.manual_seed(seed)
    return Batch(
        (torch.randn(g.num_users, DIM) * 0.3).to(dtype).requires_grad_(),
        (torch.randn(g.num_items, DIM) * 0.3).to(dtype).requires_grad_(),
        torch.from_numpy(users), torch.from_numpy(candidates),
        torch.randn(size), torch.randn(NUM_MODALITIES, size, NUM_CANDIDATES),
    )  # fmt: skip
