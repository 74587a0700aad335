"""The Optimal Brain Surgeon as it was written: one weight at a time, on the full inverse Hessian."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_prune.linalg import inverse_from_cholesky


@dataclass(frozen=True)
class SurgeonPath:
    """The weights along a greedy removal.

    Attributes:
        order: [k] int64, the weights removed, first one first, as positions in vec(W).
        losses: [k], ½⟨X − W, H(X − W)⟩ after each of them.
        weights: [levels, n], vec(X) at the levels asked for.
        levels: how many weights are gone in each row of ``weights``.
    """

    order: Tensor
    losses: Tensor
    weights: Tensor
    levels: tuple[int, ...]


def surgeon(weight: Tensor, h: Tensor, levels: tuple[int, ...]) -> SurgeonPath:
    """Remove the weight of least saliency, move all others, downdate the inverse, again (Hassibi & Stork 1993).

    With ``P = H⁻¹`` over the weights that are left: q = argmin w_q² / (2 P_qq), ``w −= (w_q / P_qq) P e_q`` and
    ``P −= P e_q e_qᵀ P / P_qq``, which is the inverse of H without row and column q. The saliencies paid add up to the
    loss, and the weights are at every step the joint optimum on the weights that are left (eqs. 5 and 9): greedy is
    only the choice of q.

    With a gradient, give ``newton_point`` as the weight. Costs n² per removal and one factorisation in all.

    Args:
        weight: vec(W) [n].
        h: H [n, n], symmetric positive definite.
        levels: numbers of removed weights, ascending, each from 0 to n, at which the weights are wanted.
    """
    n = weight.numel()
    if list(levels) != sorted(set(levels)) or not levels or levels[0] < 0 or levels[-1] > n:
        raise ValueError(f"levels are {list(levels)}; they must ascend from at least 0 to at most {n}")
    w, p = weight.double().reshape(-1).clone(), inverse_from_cholesky(h.double())
    alive = torch.ones(n, dtype=torch.bool, device=w.device)
    order: list[int] = []
    losses: list[float] = []
    snapshots: list[Tensor] = []
    for level in levels:
        while len(order) < level:
            costs = torch.where(alive, w.square() / (2 * p.diagonal()), torch.inf)
            q = int(costs.argmin())
            column = p[:, q] / p[q, q].sqrt()
            w -= w[q] / p[q, q] * p[:, q]
            p.addr_(column, column, alpha=-1)
            alive[q] = False
            w[q], p[q], p[:, q] = 0.0, 0.0, 0.0
            p[q, q] = 1.0
            losses.append((losses[-1] if losses else 0.0) + float(costs[q]))
            order.append(q)
        snapshots.append(w * alive)
    return SurgeonPath(
        torch.tensor(order, dtype=torch.int64),
        torch.tensor(losses, dtype=torch.float64),
        torch.stack(snapshots).to(weight.dtype),
        tuple(levels),
    )
