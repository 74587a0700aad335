"""One layer from weights and curvature to pruned weights: select, then compensate."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kfac_prune.obs.compensate import compensate
from kfac_prune.obs.patterns import Pattern
from kfac_prune.obs.select import THOROUGH, AdmmSchedule, select
from kfac_prune.operators import Curvature


@dataclass(frozen=True)
class Solution:
    """A pruned weight matrix and the figures of its optimality.

    Attributes:
        weight: X [out, in], zero off the mask.
        mask: [out, in] bool, True = kept.
        loss: ½⟨X − W, H(X − W)⟩.
        kkt: relative KKT residual (see ``Compensation.kkt``).
        admm_iterations: spent on the mask.
        cg_iterations: spent on the weights.
    """

    weight: Tensor
    mask: Tensor
    loss: float
    kkt: float
    admm_iterations: int
    cg_iterations: int

    @property
    def sparsity(self) -> float:
        """Fraction of weights removed."""
        return 1 - float(self.mask.float().mean())


def solve(weight: Tensor, curvature: Curvature, pattern: Pattern, schedule: AdmmSchedule = THOROUGH) -> Solution:
    """Prune one layer under any curvature: H = I gives magnitude, H diagonal OBD, a coupled H OBS.

    Args:
        weight: W [out, in], in the curvature's dtype.
        curvature: H, positive definite.
        pattern: feasible masks.
        schedule: how thoroughly to search for mask and weights.
    """
    selection = select(weight, curvature, pattern, schedule)
    best = compensate(weight, curvature, selection.mask, selection.start, tolerance=schedule.tolerance)
    return Solution(best.weight, selection.mask, best.loss, best.kkt, selection.iterations, best.iterations)
