"""Indefinite Hessians: what shift makes them positive definite, and when to refuse."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_prune.errors import InputError
from kfac_prune.linalg import shifted


@dataclass(frozen=True)
class DefiniteRecord:
    """The spectrum of a symmetric matrix and the shift that was added to it.

    Attributes:
        smallest: eigenvalue, before the shift.
        largest: eigenvalue, before the shift.
        negative: number of negative eigenvalues, beyond rounding.
        added: λ of H + λI, in the unit of H.
    """

    smallest: float
    largest: float
    negative: int
    added: float


def make_definite(
    h: Tensor, *, relative: float = 1e-3, limit: float = 0.5, where: str = "H"
) -> tuple[Tensor, DefiniteRecord]:
    """``H + λ I`` with the smallest λ >= 0 that lifts every eigenvalue to at least ``relative`` times the largest.

    So ``λ = max(0, relative · μ_max − μ_min)``, and the condition number is at most about ``1 / relative``. On an
    indefinite H the quadratic has no minimum over the kept weights: the Optimal Brain Surgeon's stationary point is a
    saddle and saliencies can be negative. A shift trusts directions of negative curvature less than any other; where
    these are as steep as the positive ones, the shift would be the answer, and the matrix is refused.

    Args:
        h: [n, n], symmetric.
        relative: in (0, 1): how far from zero the smallest eigenvalue must be, as a fraction of the largest.
        limit: refused if ``−μ_min`` is more than this fraction of ``μ_max``.
        where: what the matrix belongs to, for the message.

    Raises:
        InputError: H is not finite, has no positive eigenvalue, or one below ``−limit · μ_max``.
    """
    if not 0 < relative < 1:
        raise ValueError(f"relative is {relative}; it must be above 0 and below 1")
    if not torch.isfinite(h).all():
        raise InputError(f"{where}: the Hessian holds NaN or infinity; the loss overflows at these weights")
    eigenvalues = torch.linalg.eigvalsh(h.double())
    smallest, largest = float(eigenvalues[0]), float(eigenvalues[-1])
    if largest <= 0 or -smallest > limit * largest:
        raise InputError(
            f"{where}: the Hessian's eigenvalues run from {smallest:.3g} to {largest:.3g}, so that damping would "
            f"decide more than curvature (the limit is -{limit:g} of the largest); train on until the negative ones "
            "are small, or use the Fisher, which has none"
        )
    rounding = len(h) * torch.finfo(torch.float64).eps * largest
    added = max(0.0, relative * largest - smallest)
    negative = int((eigenvalues < -rounding).sum())
    return shifted(h, added), DefiniteRecord(smallest, largest, negative, added)
