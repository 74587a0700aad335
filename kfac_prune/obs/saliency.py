"""The saliency of a single weight: what removing it costs when all others move to compensate."""

from __future__ import annotations

from torch import Tensor

from kfac_prune.operators import Curvature


def saliency(weight: Tensor, curvature: Curvature) -> Tensor:
    """``w_q² / (2 [H⁻¹]_qq)`` per weight, [out, in] (Optimal Brain Surgeon, Hassibi & Stork 1993, eq. 5).

    With H = I it orders weights by magnitude, with H diagonal it is Optimal Brain Damage's ``½ h_qq w_q²``.

    Args:
        weight: [out, in].
        curvature: of the same shape.
    """
    return weight.square() / (2 * curvature.inverse_diagonal())
