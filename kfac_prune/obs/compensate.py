"""Compensation: the exact joint optimum of all kept weights, by preconditioned conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_prune.operators import Curvature

#: Stop when the last ``WINDOW`` iterations together lowered the objective by less than this fraction of it.
TOLERANCE = 3e-4
WINDOW = 5
MAX_ITERATIONS = 100


@dataclass(frozen=True)
class Compensation:
    """The compensated weights and how good they are.

    Attributes:
        weight: X [out, in], zero off the mask.
        loss: ½⟨X − W, H(X − W)⟩, nats per token under the Fisher.
        kkt: ‖P_F[H(X − W)]‖ / ‖H(X − W)‖ in the norm weighted by 1/diag(H): the share of the gradient that is left
            on the kept weights F; 0 is optimal.
        iterations: of conjugate gradients.
    """

    weight: Tensor
    loss: float
    kkt: float
    iterations: int


def compensate(
    weight: Tensor,
    curvature: Curvature,
    mask: Tensor,
    start: Tensor | None = None,
    *,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
) -> Compensation:
    """Minimise ``½⟨X − W, H(X − W)⟩`` over X that vanish off the mask.

    Conjugate gradients with the Jacobi preconditioner on the kept entries. The *unmasked* residual H(W − X) is carried
    along, so the objective and the gradient on removed weights cost no further product.

    Args:
        weight: W [out, in].
        curvature: H, positive definite.
        mask: [out, in] bool, True = kept.
        start: [out, in], zero off the mask; None starts from the masked weights.
        tolerance: stop when five iterations lower the objective by less than this fraction.
        max_iterations: stop there in any case; the residual reached is reported.
    """
    x = weight * mask if start is None else start * mask
    gradient = curvature.apply(weight - x)  # H(W − X), the negative gradient on every weight
    diagonal = curvature.diagonal()
    residual = gradient * mask
    z = residual / diagonal
    direction = z
    rz = torch.sum(residual * z)
    loss = 0.5 * float(torch.sum((weight - x) * gradient))
    decreases: list[float] = []
    while len(decreases) < max_iterations and float(rz) > 0:
        curved = curvature.apply(direction)
        energy = torch.sum(direction * curved)
        if not float(energy) > 0:  # the direction is below the smallest number of the dtype
            break
        step = rz / energy
        x = x + step * direction
        gradient = gradient - step * curved
        residual = gradient * mask
        z = residual / diagonal
        decreases.append(0.5 * float(step * rz))
        previous, rz = rz, torch.sum(residual * z)
        direction = z + (rz / previous) * direction
        loss -= decreases[-1]
        if len(decreases) >= WINDOW and sum(decreases[-WINDOW:]) <= tolerance * loss:
            break
    total = float(torch.sum(gradient.square() / diagonal))
    return Compensation(
        weight=x,
        loss=max(0.5 * float(torch.sum((weight - x) * gradient)), 0.0),
        kkt=(float(rz) / total) ** 0.5 if total > 0 else 0.0,
        iterations=len(decreases),
    )
