"""BPR-MF: matrix factorisation trained on pairs (Rendle et al., UAI 2009)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from mmkd.models.baselines.base import Baseline, BaselineConfig, take


class BPRMFConfig(BaselineConfig):
    """Settings of BPR-MF."""

    l2: float = Field(0.1, ge=0, description="λ: a factorisation of sparse data needs much")


class BPRMF(Baseline):
    """`x_ui = <w_u, h_i>` (section 4.3.1), `BPR-OPT = sum ln σ(x_ui - x_uj) - λ ||Θ||^2` (section 4.1)."""

    Settings = BPRMFConfig

    def vectors(self, generator=None, nodes=None) -> Tensor:
        return take(self.table, nodes)
