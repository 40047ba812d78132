"""The soft prompt p = H W_P + b_P and its constant H, the mean of the modalities' principal components (Eq. 3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mmkd.models.features import FeatureTable, with_ones

EXACT_WIDTH = 1024
_OVERSAMPLING = 16
_POWER_STEPS = 8


def principal_components(features: FeatureTable, dim: int, seed: int = 0) -> Tensor:
    """First ``dim`` principal component scores of centred features.

    Up to 1024 columns by the exact eigenvectors of the covariance, beyond that by seeded subspace iteration.
    The largest-magnitude loading of every component is positive, so the result does not depend on the solver's signs.

    Args:
        features: ``[I, d_m]``.
        dim: number of components ``d``.
        seed: of the start subspace (wide features only).

    Returns:
        ``[I, dim]`` float32.

    Raises:
        ValueError: ``d_m < dim``, naming the modality.
    """
    if features.width < dim:
        raise ValueError(
            f"modality '{features.name}' has {features.width} columns, fewer than dim={dim}: the prompt needs "
            f"d_m >= d; lower dim to at most {features.width} or leave the modality out"
        )
    mean = features.column_sum() / max(features.num_items, 1)  # [d_m] float64
    if features.width <= EXACT_WIDTH:
        loadings = _leading(_centred_product(features, None, mean), dim)
    else:
        loadings = _subspace(features, mean, dim, seed)
    peak = loadings.gather(0, loadings.abs().argmax(0, keepdim=True))  # [1, dim]
    loadings = torch.where(peak < 0, -loadings, loadings)
    scores = [b.cpu() @ loadings - mean @ loadings for b in features.blocks(dtype=torch.float64)]
    return torch.cat(scores).float()


def _centred_product(features: FeatureTable, right: Tensor | None, mean: Tensor) -> Tensor:
    """``(X - mean)^T (X - mean) right``, streamed over items in float64; no ``right``: the identity."""
    total = mean.new_zeros(features.width, features.width if right is None else right.shape[1])
    for block in features.blocks(dtype=torch.float64):
        centred = block.cpu() - mean
        total += centred.T @ (centred if right is None else centred @ right)
    return total


def _leading(symmetric: Tensor, dim: int) -> Tensor:
    """The eigenvectors of the ``dim`` largest eigenvalues, as columns, largest first."""
    return torch.linalg.eigh((symmetric + symmetric.T) / 2)[1].flip(1)[:, :dim]


def _subspace(features: FeatureTable, mean: Tensor, dim: int, seed: int) -> Tensor:
    width = min(dim + _OVERSAMPLING, features.width)
    start = np.random.Generator(np.random.Philox(seed)).standard_normal((features.width, width))
    basis = torch.linalg.qr(torch.from_numpy(start))[0]
    for _ in range(_POWER_STEPS):
        basis = torch.linalg.qr(_centred_product(features, basis, mean))[0]
    small = basis.T @ _centred_product(features, basis, mean)
    return basis @ _leading(small, dim)


def prompt_basis(features: Sequence[FeatureTable], dim: int, seed: int = 0) -> Tensor:
    """``H = 1/|M| sum_m PCA(X^m)``, ``[I, dim]`` float32: the constant input of the prompt module (Eq. 3)."""
    if not features:
        raise ValueError("features: at least one modality is needed to build the prompt, got none")
    return mean_components([principal_components(table, dim, seed) for table in features])


def mean_components(components: Sequence[Tensor]) -> Tensor:
    """:func:`prompt_basis` of components that are already there."""
    total = torch.zeros_like(components[0])
    for part in components:
        total += part
    return total / len(components)


class Prompt(nn.Module):
    """``p = H W_P + b_P = [H 1] V``: a linear layer over the constant ``H``; trained in both stages.

    Args:
        basis: ``H``, ``[I, d]``.
        generator: of the Xavier start of ``W_P``.

    Shape:
        output ``[I, d]``.
    """

    def __init__(self, basis: Tensor, generator: torch.Generator | None = None) -> None:
        super().__init__()
        dim = basis.shape[1]
        self.register_buffer("design", with_ones(basis), persistent=False)  # [H 1], [I, d+1]
        self.weight = nn.Parameter(torch.empty(dim, dim, dtype=basis.dtype))
        self.bias = nn.Parameter(torch.zeros(dim, dtype=basis.dtype))
        nn.init.xavier_uniform_(self.weight, generator=generator)

    @property
    def basis(self) -> Tensor:
        """``H``, ``[I, d]``."""
        return self.design[:, :-1]

    def stacked(self) -> Tensor:
        """``V = [W_P; b_P^T]``, ``[d+1, d]``: whatever is linear in ``p`` is linear in it."""
        return torch.cat([self.weight, self.bias[None]])

    def forward(self) -> Tensor:
        return self.design @ self.stacked()
