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
        gram = _centred_product(features, np.eye(features.width), mean)
        loadings = np.linalg.eigh((gram + gram.T) / 2)[1][:, ::-1][:, :dim]
    else:
        loadings = _subspace(features, mean, dim, seed)
    loadings = loadings.copy()
    peak = np.abs(loadings).argmax(axis=0)
    loadings[:, loadings[peak, np.arange(dim)] < 0] *= -1
    scores = [b.cpu().numpy() @ loadings - mean @ loadings for b in features.blocks(dtype=torch.float64)]
    return torch.from_numpy(np.concatenate(scores)).float()


def _centred_product(features: FeatureTable, right: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """``(X - mean)^T (X - mean) right``, streamed over items in float64."""
    total = np.zeros((features.width, right.shape[1]))
    exact = right.shape[0] == right.shape[1]
    for block in features.blocks(dtype=torch.float64):
        centred = block.cpu().numpy() - mean
        total += centred.T @ centred if exact else centred.T @ (centred @ right)
    return total


def _subspace(features: FeatureTable, mean: np.ndarray, dim: int, seed: int) -> np.ndarray:
    width = min(dim + _OVERSAMPLING, features.width)
    basis = np.linalg.qr(np.random.Generator(np.random.Philox(seed)).standard_normal((features.width, width)))[0]
    for _ in range(_POWER_STEPS):
        basis = np.linalg.qr(_centred_product(features, basis, mean))[0]
    small = basis.T @ _centred_product(features, basis, mean)
    return basis @ np.linalg.eigh((small + small.T) / 2)[1][:, ::-1][:, :dim]


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
