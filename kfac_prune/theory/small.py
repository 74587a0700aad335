"""Two problems that can be checked by hand."""

from __future__ import annotations

from typing import Any

import torch

from kfac_prune.obs import Unstructured, saliency, solve
from kfac_prune.operators import Dense, Diagonal, ScaledIdentity, quadratic_loss


def four_weights() -> dict[str, Any]:
    """One of four weights must go, and the smallest is not the cheapest.

    ``w = (0.2, 0.3, −1, 2)``, ``H = diag(5, 1, 1, ½)``: magnitude removes w_1 at ½ · 5 · 0.2² = 0.10, Optimal Brain
    Damage w_2 at ½ · 1 · 0.3² = 0.045.
    """
    w = torch.tensor([[0.2, 0.3], [-1.0, 2.0]], dtype=torch.float64)
    h = Diagonal(torch.tensor([[5.0, 1.0], [1.0, 0.5]], dtype=torch.float64))
    pattern = Unstructured(0.25)
    magnitude = solve(w, ScaledIdentity(w.new_ones(()), (2, 2)), pattern)
    damage = solve(w, h, pattern)
    return {
        "weights": w.reshape(-1).tolist(),
        "curvature": h.h.reshape(-1).tolist(),
        "saliency_obd": saliency(w, h).reshape(-1).tolist(),
        "removed_by_magnitude": int((~magnitude.mask).reshape(-1).nonzero()) + 1,
        "removed_by_obd": int((~damage.mask).reshape(-1).nonzero()) + 1,
        "loss_magnitude": quadratic_loss(h, magnitude.weight - w),
        "loss_obd": damage.loss,
    }


def two_weights() -> dict[str, Any]:
    """One of two coupled weights must go, and the other can make up for it.

    ``w = (1, 1.2)``, ``H = [[1, 0.9], [0.9, 1]]``: w_1 goes. Without a move that costs ½ · 1² = 0.5; with
    ``w_2 += 0.9 · w_1 = 2.1`` it costs ½ (1 − 0.9²) = 0.095.
    """
    h = Dense(torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64), (1, 2))
    w = torch.tensor([[1.0, 1.2]], dtype=torch.float64)
    surgeon = solve(w, h, Unstructured(0.5))
    return {
        "weights": w[0].tolist(),
        "curvature": h.h.tolist(),
        "saliency_obs": saliency(w, h)[0].tolist(),
        "compensated": surgeon.weight[0].tolist(),
        "loss_without_move": quadratic_loss(h, surgeon.mask * w - w),
        "loss_compensated": surgeon.loss,
    }
