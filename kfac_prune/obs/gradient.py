"""Networks that have not converged: the gradient as a linear term (WoodTaylor; Singh & Alistarh 2020, §5)."""

from __future__ import annotations

from torch import Tensor

from kfac_prune.operators import Curvature


def newton_point(weight: Tensor, curvature: Curvature, gradient: Tensor) -> Tensor:
    """``W − H⁻¹ g`` [out, in], from which pruning with a gradient is pruning without one.

    To minimise ``⟨g, D⟩ + ½⟨D, H D⟩`` over D with ``D = −W`` on the removed weights, complete the square: with
    X = W + D it is ``½⟨X − W', H(X − W')⟩ − ½⟨g, H⁻¹ g⟩``, W' = W − H⁻¹ g. So ``saliency``, ``select``,
    ``compensate``, ``solve`` and ``surgeon`` need no other form: they take W' for the weight. The single-weight
    saliency becomes ``(w_q − [H⁻¹g]_q)² / (2 [H⁻¹]_qq)`` and kept weights move by the Newton step as well. The step is
    a full one, so H must be damped enough for the quadratic to hold that far.

    Args:
        weight: W [out, in].
        curvature: H, positive definite.
        gradient: g [out, in] of the loss at W, in the loss' unit per unit of weight.
    """
    return weight - curvature.shifted_inverse(0.0)(gradient)


def newton_decrease(curvature: Curvature, gradient: Tensor) -> float:
    """``½⟨g, H⁻¹ g⟩``: what the step to ``newton_point`` gains; subtract it from a loss measured from there.

    Args:
        curvature: H, positive definite.
        gradient: g [out, in].
    """
    return 0.5 * float((gradient * curvature.shifted_inverse(0.0)(gradient)).sum())
