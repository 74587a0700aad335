"""The eigenvalue-corrected Kronecker curvature (EK-FAC; George et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kfac_prune.operators.base import Curvature
from kfac_prune.operators.scaled import Scaled


class EigenKronecker(Curvature):
    """``H = (U_G ⊗ U_A) diag(vec(S)) (U_G ⊗ U_A)ᵀ``, so that ``H X = U_G (S * (U_Gᵀ X U_A)) U_Aᵀ``.

    With U the eigenvectors of K-FAC's factors and S = λ_G λ_Aᵀ it is K-FAC; with S the second moments of the gradients
    in that basis it is the nearest matrix to the Fisher, in Frobenius norm, among all with these eigenvectors.

    Args:
        basis_a: U_A [in, in], orthogonal, eigenvectors in columns.
        basis_g: U_G [out, out], orthogonal.
        moments: S [out, in], positive.
    """

    def __init__(self, basis_a: Tensor, basis_g: Tensor, moments: Tensor) -> None:
        for name, basis, size in (("U_A", basis_a, moments.shape[1]), ("U_G", basis_g, moments.shape[0])):
            if basis.shape != (size, size):
                raise ValueError(f"{name} is {list(basis.shape)}; moments {list(moments.shape)} need {size} squared")
        self.basis_a, self.basis_g, self.moments = basis_a, basis_g, moments

    @classmethod
    def fisher(cls, a: Tensor, g: Tensor, gradients: Tensor, damping: float) -> EigenKronecker:
        """``S_ij = λ + (1/m) Σ (U_Gᵀ g U_A)_ij²`` in the eigenbasis of the factors (George et al. 2018, eq. 11).

        Args:
            a: A [in, in], undamped.
            g: G [out, out], undamped.
            gradients: [m, out, in] of one sample each.
            damping: λ > 0, in the unit of H.
        """
        basis_a, basis_g = eigenbasis(a), eigenbasis(g)
        rotated = basis_g.T @ gradients @ basis_a
        return cls(basis_a, basis_g, rotated.square().mean(0) + damping)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight matrix."""
        return self.moments.shape[0], self.moments.shape[1]

    def apply(self, x: Tensor) -> Tensor:
        """``U_G (S * (U_Gᵀ X U_A)) U_Aᵀ``."""
        return self._through(x, self.moments)

    def _through(self, x: Tensor, eigenvalues: Tensor) -> Tensor:
        """The function of H with these eigenvalues [out, in], applied to X."""
        return self.basis_g @ (eigenvalues * (self.basis_g.T @ x @ self.basis_a)) @ self.basis_a.T

    def diagonal(self) -> Tensor:
        """``H_qq = Σ_ij U_G[r,i]² S_ij U_A[c,j]²``: [out, in]."""
        return self.basis_g.square() @ self.moments @ self.basis_a.square().T

    def inverse_diagonal(self) -> Tensor:
        """``[H⁻¹]_qq``: the same sum over 1/S."""
        return self.basis_g.square() @ self.moments.reciprocal() @ self.basis_a.square().T

    def equilibrated(self) -> tuple[Scaled, Tensor]:
        """H behind a scale per weight: the eigenvectors of the scaled matrix are no longer a Kronecker product."""
        return Scaled(self, torch.ones_like(self.moments)).equilibrated()

    def shifted_inverse(self, rho: float) -> Callable[[Tensor], Tensor]:
        """Exact: division by ``S + rho`` in the eigenbasis."""
        eigenvalues = (self.moments + rho).reciprocal()
        return lambda r: self._through(r, eigenvalues)

    def to_dense(self) -> Tensor:
        """The matrix."""
        basis = torch.kron(self.basis_g.contiguous(), self.basis_a.contiguous())
        return (basis * self.moments.reshape(-1)) @ basis.T


def eigenbasis(factor: Tensor) -> Tensor:
    """Eigenvectors [n, n], in columns, of a symmetric matrix; computed in float64, returned in its dtype."""
    vectors: Tensor = torch.linalg.eigh(factor.double()).eigenvectors
    return vectors.to(factor.dtype)
