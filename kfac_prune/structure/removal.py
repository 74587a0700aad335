"""Removing input columns of a layer, exactly, under ``H = G ⊗ A``: cost, order, and what the rest becomes.

With P = A⁻¹ and M = Wᵀ G W, removing the columns S and moving all others to their joint optimum (Hassibi & Stork 1993,
solved for whole columns) costs ``½ tr(P_SS⁻¹ M_SS)`` and leaves ``X_K = (W A)_{:,K} A_KK⁻¹``, whatever G is. A greedy
removal downdates P and M, so that its single costs add up exactly to the cost of the whole set.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_prune.operators import Curvature, Kronecker

#: Cost of a unit of squared norm where no token has been, in nats per token: so little that it decides nothing else.
UNSEEN = 1e-30


@dataclass(frozen=True)
class ColumnProblem:
    """What the removal of columns depends on, in float64.

    Attributes:
        p: P = A⁻¹ [n, n]; the identity under a curvature without coupling.
        m: M = Wᵀ G W [n, n].
    """

    p: Tensor
    m: Tensor

    @classmethod
    def unseen(cls, weight: Tensor) -> ColumnProblem:
        """Of a layer W [out, n] that no token reached: columns go by their norm, at next to no cost."""
        own = UNSEEN * weight.double().square().sum(0)
        return cls(torch.eye(len(own), dtype=own.dtype, device=own.device), own.diag())

    @classmethod
    def of(cls, weight: Tensor, curvature: Curvature) -> ColumnProblem:
        """From W [out, n] and its curvature; one that couples no weights (OBD, magnitude) gives a diagonal problem."""
        weight = weight.double()
        if isinstance(curvature, Kronecker):
            p = torch.cholesky_inverse(torch.linalg.cholesky(curvature.a.double()))
            gw = weight if curvature.g is None else curvature.g.double() @ weight
            return cls(p, weight.T @ gw)
        own = (curvature.diagonal().double() * weight**2).sum(0)
        return cls(torch.eye(len(own), dtype=own.dtype, device=own.device), own.diag())

    def cost(self, columns: Tensor) -> float:
        """``½ tr(P_SS⁻¹ M_SS)`` for the columns S, nats per token under the Fisher."""
        p, m = self.p[columns][:, columns], self.m[columns][:, columns]
        return 0.5 * float(torch.linalg.solve(p, m).diagonal().sum()) if len(columns) else 0.0

    def without(self, columns: Tensor) -> ColumnProblem:
        """The problem after the columns S are gone; their own rows and columns are left without meaning."""
        p, m = self.p[:, columns], self.m[:, columns]
        k = torch.linalg.solve(p[columns], p.T)  # P_SS⁻¹ P_S: [S, n]
        mk = m @ k
        return ColumnProblem(self.p - p @ k, self.m - mk - mk.T + k.T @ m[columns] @ k)


def removal_order(problem: ColumnProblem, block: int = 64) -> tuple[Tensor, Tensor]:
    """Greedy removal of all columns, one at a time, the one with the least ``M_jj / P_jj`` first.

    Every removal is a rank-one downdate of P and a rank-two downdate of M. They are kept as vectors and applied as one
    product per ``block`` removals; meanwhile only the two diagonals and the columns in question are brought up to date.
    The order is the same as without blocks.

    Args:
        problem: of n columns.
        block: removals per product.

    Returns:
        order [n] int64 and cost [n]: ``cost[i]`` = nats per token lost with the columns ``order[:i + 1]``.
    """
    p, m = problem.p.clone(), problem.m.clone()
    n = len(p)
    order = torch.empty(n, dtype=torch.int64)
    costs = torch.empty(n, dtype=p.dtype)
    alive = torch.ones(n, dtype=torch.bool, device=p.device)
    for start in range(0, n, block):
        count = min(block, n - start)
        u, a = p.new_zeros(n, count), p.new_zeros(n, count)  # P loses Σ u uᵀ, M loses Σ (a uᵀ + u aᵀ)
        diagonal_p, diagonal_m = p.diagonal().clone(), m.diagonal().clone()
        for k in range(count):
            j = int(torch.where(alive, diagonal_m / diagonal_p, torch.inf).argmin())
            order[start + k], costs[start + k] = j, 0.5 * diagonal_m[j] / diagonal_p[j]
            alive[j] = False
            root = diagonal_p[j].sqrt()
            new_u = (p[:, j] - u @ u[j]) / root
            new_a = (m[:, j] - a @ u[j] - u @ a[j]) / root - 0.5 * diagonal_m[j] / diagonal_p[j] * new_u
            u[:, k], a[:, k] = new_u, new_a
            diagonal_p -= new_u**2
            diagonal_m -= 2 * new_a * new_u
        p -= u @ u.T
        au = a @ u.T
        m -= au + au.T
    return order, costs.cumsum(0)


def cheapest(problem: ColumnProblem, units: Sequence[Tensor], choices: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """The choice of units whose joint removal costs least.

    Args:
        problem: of all columns.
        units: the columns of every unit.
        choices: sets of unit numbers to compare.
    """
    return tuple(min(choices, key=lambda choice: problem.cost(torch.cat([units[i] for i in choice]))))


def cheapest_each(
    problem: ColumnProblem, units: Sequence[Tensor], classes: Sequence[Sequence[int]]
) -> tuple[ColumnProblem, tuple[int, ...]]:
    """One unit of every class, greedily: class after class, the unit that costs least given those gone before.

    Returns:
        The problem without them, and the units.
    """
    gone = []
    for members in classes:
        best = min(members, key=lambda i: problem.cost(units[i]))
        problem = problem.without(units[best])
        gone.append(best)
    return problem, tuple(gone)


def compensated(weight: Tensor, curvature: Curvature, kept: Tensor) -> Tensor:
    """``X_K = (W A)_{:,K} A_KK⁻¹`` [out, len(kept)], the joint optimum of the columns that stay.

    Args:
        weight: W [out, n].
        curvature: one that couples no weights leaves ``W_K`` as it is.
        kept: column numbers K.
    """
    if not isinstance(curvature, Kronecker):
        return weight[:, kept]
    a = curvature.a.double()
    factor = torch.linalg.cholesky(a[kept][:, kept])
    x = torch.cholesky_solve((weight.double() @ a[:, kept]).T, factor).T
    return x.to(weight.dtype)
