"""BPR-MF: matrix factorisation trained on pairs (Rendle et al., UAI 2009)."""

from __future__ import annotations

from torch import Tensor

from mmkd.models.baselines.base import Baseline


class BPRMF(Baseline):
    """`x_ui = <w_u, h_i>` (section 4.3.1), `BPR-OPT = sum ln σ(x_ui - x_uj) - λ ||Θ||^2` (section 4.1)."""

    def encode(self, generator=None) -> tuple[Tensor, Tensor]:
        return self.split(self.table)
