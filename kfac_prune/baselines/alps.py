"""ALPS (Meng et al. 2024): ADMM on the layer-wise problem with exact X steps, then conjugate gradients on its mask."""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_prune.obs import Pattern, compensate
from kfac_prune.operators import Damping, DampingRecord, Kronecker

#: The authors' damping, first penalty, iterations between two changes of it, and conjugate-gradient iterations.
DAMPING, RHO, EVERY, CG = 0.01, 0.1, 3, 10
#: The authors stop only when the mask stands still, which ties can prevent.
MAX_ITERATIONS = 300


def alps(weight: Tensor, a: Tensor, pattern: Pattern, *, where: str = "W") -> tuple[Tensor, Tensor, DampingRecord]:
    """Prune one layer as algorithm 1 of the paper does.

    With ``H = A + 0.01 mean(diag A) I`` scaled to a unit diagonal (appendix on preprocessing), one eigendecomposition
    ``H = U M Uᵀ`` makes every X step exact (eq. 4, in rows instead of columns)::

        X = (W H − V + ρ D) U (M + ρ)⁻¹ Uᵀ,   D = project(X + V / ρ),   V = V + ρ (X − D)

    Every third iteration ρ grows by 1.3, 1.2 or 1.1 where at least 10 %, 0.5 % or any of the kept weights have changed
    since the last time; where none have, the mask is final and ten iterations of conjugate gradients, with the diagonal
    of H as preconditioner, refine the weights on it. It differs from method ``layerwise`` in the exact step, the
    schedule, the scaling and the number of refining iterations, not in the objective.

    Args:
        weight: W [out, in].
        a: A [in, in], uncentred second moment of the inputs.
        pattern: feasible masks.
        where: the layer's name, for messages.

    Returns:
        X [out, in], zero off the mask; the mask [out, in], True = kept; what was added to A.

    Raises:
        InputError: A is zero or not finite.
    """
    h, record = Damping(DAMPING)(a.double(), name="A", where=where)
    if bool(pattern.project(weight.abs()).all()):
        return weight.clone(), torch.ones_like(weight, dtype=torch.bool), record
    scale = h.diagonal().sqrt()
    unit = h / torch.outer(scale, scale)
    eigenvalues, vectors = (t.to(weight.dtype) for t in torch.linalg.eigh(unit))
    w = weight * scale.to(weight.dtype)
    pulled = w @ unit.to(weight.dtype)
    sparse, dual, rho = w, torch.zeros_like(w), RHO
    mask = before = torch.ones_like(w, dtype=torch.bool)
    for iteration in range(1, MAX_ITERATIONS + 1):
        x = ((pulled - dual + rho * sparse) @ vectors / (eigenvalues + rho)) @ vectors.T
        y = x + dual / rho
        mask = pattern.project(y.square())
        sparse = y * mask
        dual = dual + rho * (x - sparse)
        if iteration % EVERY == 0:
            changed, kept = int((mask ^ before).sum()), int(mask.sum())
            if changed == 0:
                break
            rho *= 1.3 if changed >= 0.1 * kept else 1.2 if changed >= 0.005 * kept else 1.1
            before = mask
    operator = Kronecker(h.to(weight.dtype), None, out_features=len(weight))
    best = compensate(weight, operator, mask, sparse / scale.to(weight.dtype), max_iterations=CG)
    return best.weight, mask, record
