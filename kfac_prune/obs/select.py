"""Selection: which weights to keep, by ADMM on the joint problem of mask and weights.

Minimise ``½⟨X − W, H(X − W)⟩`` subject to X having a feasible mask. The splitting ``X = Z`` with Z sparse (Boyd et al.
2011, §9.1; used for G = I by Boža 2024 and ALPS, Meng et al. 2024) is solved here for any curvature with a
preconditioned X step and an exact line search, so that no eigendecomposition is needed (DESIGN §5).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_prune.linalg import approximate_products
from kfac_prune.obs.compensate import TOLERANCE
from kfac_prune.obs.patterns import Pattern
from kfac_prune.obs.project import z_step
from kfac_prune.obs.saliency import saliency
from kfac_prune.operators import Curvature

RHO_START = 0.03
RHO_STOP = 50.0
#: The preconditioner is factorised anew where the penalty has grown so much. At 8 the iterations are as many and the
#: losses as good as at 4 (2 % more iterations, 0.1 % less loss), with a quarter fewer factorisations.
REFACTOR = 8


@dataclass(frozen=True)
class AdmmSchedule:
    """How the penalty grows.

    Attributes:
        iterations: at most this many.
        growth: fixed factor per iteration; None lets the churn of the mask decide.
        tolerance: of the compensation that follows (see ``compensate``).
    """

    iterations: int = 60
    growth: float | None = None
    tolerance: float = TOLERANCE

    def factor(self, churn: float) -> float:
        """The factor for the penalty after an iteration that exchanged this fraction of the kept weights."""
        if self.growth is not None:
            return self.growth
        if churn >= 0.2:
            return 1.2
        if churn >= 0.02:
            return 1.05
        return 1.1 if churn >= 0.002 else 1.5


#: The best mask that we know how to find in reasonable time.
THOROUGH = AdmmSchedule()
#: A third of the cost, 6-10 % worse in the objective, of which the compensation's tolerance is about a tenth; right for
#: loss curves. 0.03 to 1.5 in 20 steps.
FAST = AdmmSchedule(iterations=20, growth=(1.5 / RHO_START) ** (1 / 20), tolerance=3e-3)


@dataclass(frozen=True)
class Selection:
    """A mask and the point that the search ended at.

    Attributes:
        mask: [out, in] bool, True = kept.
        start: [out, in], weights for compensation to start from, zero off the mask.
        iterations: of ADMM; 0 where the optimum needed no search.
    """

    mask: Tensor
    start: Tensor
    iterations: int


def select(weight: Tensor, curvature: Curvature, pattern: Pattern, schedule: AdmmSchedule = THOROUGH) -> Selection:
    """Choose the weights to keep.

    For a separable curvature the smallest saliencies are the exact optimum; otherwise ADMM.

    Args:
        weight: W [out, in].
        curvature: H, positive definite, in the same dtype and on the same device.
        pattern: feasible masks.
        schedule: of the penalty.
    """
    if curvature.separable:
        return one_shot(weight, curvature, pattern)
    return admm(weight, curvature, pattern, schedule)


def one_shot(weight: Tensor, curvature: Curvature, pattern: Pattern) -> Selection:
    """Keep the largest single-weight saliencies; exact for a separable H, a heuristic otherwise."""
    mask = pattern.project(saliency(weight, curvature))
    return Selection(mask, weight * mask, 0)


def admm(weight: Tensor, curvature: Curvature, pattern: Pattern, schedule: AdmmSchedule = THOROUGH) -> Selection:
    """Kronecker ADMM: three matrix products and one projection per iteration, two or three factorisations in all.

    Works in coordinates scaled so that H and H⁻¹ have equal diagonals. Args and result as ``select``.
    """
    h, scale = curvature.equilibrated()
    w = (weight * scale).contiguous()  # row by row, as the kernels read it
    x, gradient, dual = w.clone(), torch.zeros_like(w), torch.zeros_like(w)
    mask = pattern.project(w.square()).contiguous()
    kept = int(mask.sum())
    if kept == mask.numel():
        return Selection(mask, weight.clone(), 0)
    z = w * mask
    step_z = z_step(pattern, w)
    rho, factored_at, unchanged, iteration = RHO_START, 0.0, 0, 0
    for iteration in range(1, schedule.iterations + 1):  # noqa: B007  (its last value is reported)
        if rho >= REFACTOR * factored_at:
            precondition, factored_at = h.preconditioned(2 * rho), rho
        # X step: one preconditioned descent step with exact line search on the augmented Lagrangian
        residual = torch.sub(x, z).mul_(-rho).sub_(gradient).sub_(dual)
        with approximate_products():  # what they get wrong, a later step puts right
            direction, curved = precondition(residual)
        denominator = _inner(direction, curved) + rho * _inner(direction, direction)
        step = _inner(residual, direction) / denominator.clamp_min(torch.finfo(w.dtype).tiny)
        x += step * direction
        gradient += step * curved
        churn = int(step_z(x, dual, mask, z, rho)) / (2 * kept)
        unchanged = unchanged + 1 if churn == 0 else 0
        if unchanged == 3:
            break
        rho = min(rho * schedule.factor(churn), RHO_STOP)
    mask = step_z.finished(mask, x)
    return Selection(mask, x * mask / scale, iteration)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩, a scalar on their device."""
    return torch.dot(a.reshape(-1), b.reshape(-1))
