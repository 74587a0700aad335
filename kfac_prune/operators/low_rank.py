"""A diagonal plus a few outer products: M-FAC (Frantar, Kurtic & Alistarh 2021)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from kfac_prune.operators.base import Curvature, equilibrating


class LowRank(Curvature):
    """``H = diag(vec(d)) + Σ_k vec(u_k) vec(u_k)ᵀ``, inverted by Woodbury's identity in an [m, m] system.

    With constant d = λ and the gradients of m samples over √m this is M-FAC's ``λ I + (1/m) Σ g gᵀ`` (its eq. 2).

    Args:
        d: [out, in], positive.
        factors: u [m, out, in].
    """

    def __init__(self, d: Tensor, factors: Tensor) -> None:
        if factors.ndim != 3 or factors.shape[1:] != d.shape:
            raise ValueError(f"the factors are {list(factors.shape)}; a diagonal {list(d.shape)} needs [m, out, in]")
        self.d, self.factors = d, factors

    @classmethod
    def fisher(cls, gradients: Tensor, damping: float) -> LowRank:
        """``λ I + (1/m) Σ vec(g) vec(g)ᵀ``.

        Args:
            gradients: [m, out, in] of one sample each.
            damping: λ > 0, in the unit of H.
        """
        return cls(torch.full_like(gradients[0], damping), gradients / len(gradients) ** 0.5)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight matrix."""
        return self.d.shape[0], self.d.shape[1]

    def apply(self, x: Tensor) -> Tensor:
        """``d X + Σ_k ⟨u_k, X⟩ u_k``."""
        u = self.factors.flatten(1)  # [m, out*in]
        return self.d * x + ((u @ x.reshape(-1)) @ u).reshape(self.shape)

    def diagonal(self) -> Tensor:
        """``H_qq``: [out, in]."""
        return self.d + self.factors.square().sum(0)

    def _woodbury(self, rho: float) -> tuple[Tensor, Tensor]:
        """(d, Q) in float64 with ``(H + rho I)⁻¹ = diag(1/d) − Qᵀ Q``, d: [out*in], Q: [m, out*in].

        ``Q = L⁻¹ U diag(1/d)`` with ``L Lᵀ = I + U diag(1/d) Uᵀ``. In float64, because the two terms nearly cancel in
        the directions that the factors span.
        """
        d, u = self.d.double().reshape(-1) + rho, self.factors.double().flatten(1)
        v = u / d
        system = v @ u.T
        system.diagonal().add_(1)
        q: Tensor = torch.linalg.solve_triangular(torch.linalg.cholesky(system), v, upper=False)
        return d, q

    @cached_property
    def _inverse_diagonal(self) -> Tensor:
        d, q = self._woodbury(0.0)
        return (1 / d - q.square().sum(0)).reshape(self.shape).to(self.d.dtype)

    def inverse_diagonal(self) -> Tensor:
        """``[H⁻¹]_qq``: [out, in]."""
        return self._inverse_diagonal

    def equilibrated(self) -> tuple[LowRank, Tensor]:
        """Weights scaled by ``(H_qq / [H⁻¹]_qq)^¼``, then to mean diagonal one: again a diagonal plus low rank."""
        scale = equilibrating(self.diagonal(), self._inverse_diagonal)
        return LowRank(self.d / scale**2, self.factors / scale), scale

    def shifted_inverse(self, rho: float) -> Callable[[Tensor], Tensor]:
        """Exact, by Woodbury's identity."""
        d, q = self._woodbury(rho)

        def solve(r: Tensor) -> Tensor:
            flat = r.double().reshape(-1)
            return (flat / d - (q @ flat) @ q).reshape(self.shape).to(r.dtype)

        return solve

    def to_dense(self) -> Tensor:
        """The matrix."""
        u = self.factors.flatten(1)
        return torch.diag(self.d.reshape(-1)) + u.T @ u
