"""The Kronecker-factored curvature ``H = G ⊗ A`` (K-FAC; Martens & Grosse 2015)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from kfac_prune.linalg import inverse_from_cholesky, inverse_of_shifted, product
from kfac_prune.operators.base import Curvature, equilibrating


class Kronecker(Curvature):
    """``H = G ⊗ A``, so that ``H X = G X A``.

    With A the covariance of a layer's inputs and G that of its output gradients this is the K-FAC Fisher; with
    ``G = None`` (the identity) it is the layer-wise least-squares objective of OBC, SparseGPT and ALPS.

    Args:
        a: [in, in], symmetric positive definite.
        g: [out, out], symmetric positive definite, or None for the identity.
        out_features: number of rows of W, needed only when g is None.
        inverse_diagonals: what ``inverse_diagonals`` gave for the same factors before; None computes it when needed.
    """

    def __init__(
        self,
        a: Tensor,
        g: Tensor | None,
        *,
        out_features: int | None = None,
        inverse_diagonals: tuple[Tensor | None, Tensor] | None = None,
    ) -> None:
        rows = out_features if g is None else g.shape[0]
        if rows is None:
            raise ValueError("without G, out_features must say how many rows the weight matrix has")
        for name, factor in (("A", a), ("G", g)):
            if factor is not None and (factor.ndim != 2 or factor.shape[0] != factor.shape[1]):
                raise ValueError(f"{name} must be a square matrix, not {list(factor.shape)}")
        self.a, self.g, self._rows = a, g, rows
        if inverse_diagonals is not None:
            self.inverse_diagonals = inverse_diagonals

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight matrix."""
        return self._rows, self.a.shape[0]

    def apply(self, x: Tensor) -> Tensor:
        """``G X A`` for X: [out, in]."""
        x = product(x, self.a)
        return x if self.g is None else product(self.g, x)

    def _outer(self, out_vector: Tensor | None, in_vector: Tensor) -> Tensor:
        """Outer product [out, in] of a vector over rows (None: ones) and one over columns."""
        if out_vector is None:
            return in_vector.expand(self.shape)
        return torch.outer(out_vector, in_vector)

    def diagonal(self) -> Tensor:
        """``G_rr A_cc``: [out, in]."""
        return self._outer(None if self.g is None else self.g.diagonal(), self.a.diagonal())

    @cached_property
    def inverse_diagonals(self) -> tuple[Tensor | None, Tensor]:
        """Diagonals of G⁻¹ [out] (None with G = I) and A⁻¹ [in], by one Cholesky factorisation each."""
        diagonals = [None if f is None else inverse_from_cholesky(f).diagonal().clone() for f in (self.g, self.a)]
        assert diagonals[1] is not None
        return diagonals[0], diagonals[1]

    def inverse_diagonal(self) -> Tensor:
        """``[G⁻¹]_rr [A⁻¹]_cc``: [out, in]."""
        return self._outer(*self.inverse_diagonals)

    def equilibrated(self) -> tuple[Kronecker, Tensor]:
        """Both factors scaled to mean diagonal one by ``s = (diag F / diag F⁻¹)^¼``; scale = outer product."""
        inverse_g, inverse_a = self.inverse_diagonals
        a, scale_a = _equilibrate(self.a, inverse_a)
        if self.g is None or inverse_g is None:
            return Kronecker(a, None, out_features=self._rows), self._outer(None, scale_a)
        g, scale_g = _equilibrate(self.g, inverse_g)
        return Kronecker(a, g), self._outer(scale_g, scale_a)

    def shifted_inverse(self, rho: float) -> Callable[[Tensor], Tensor]:
        """``R ↦ (G + √rho I)⁻¹ R (A + √rho I)⁻¹`` (exact with G = I: ``R (A + rho I)⁻¹``).

        The product of the shifted factors is not H + rho I, but an excellent preconditioner of it, and needs two
        Cholesky factorisations instead of two eigendecompositions.
        """
        left, right, _ = self._shifted_inverses(rho)
        return lambda r: r @ right if left is None else left @ (r @ right)

    def preconditioned(self, rho: float) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """``R ↦ (P, H P)`` by three products (with G = I: one), where P and then H P would take four.

        With ``L = (G + sI)⁻¹`` is ``G L = I − s L``, the same on the right with M, so that ``H P = G L R M A``
        is ``R − s L R − s R M + s² P``.
        """
        left, right, shift = self._shifted_inverses(rho)

        def both(r: Tensor) -> tuple[Tensor, Tensor]:
            if left is None:
                p = product(r, right)
                return p, torch.add(r, p, alpha=-shift)
            rows, columns = r.shape
            if rows <= columns:  # the cheaper side twice
                after = product(r, right)
                before, p = product(left, r), product(left, after)
            else:
                before = product(left, r)
                after, p = product(r, right), product(before, right)
            return p, after.add_(before).sub_(p, alpha=shift).mul_(-shift).add_(r)

        return both

    def _shifted_inverses(self, rho: float) -> tuple[Tensor | None, Tensor, float]:
        """``(G + sI)⁻¹`` or None, ``(A + sI)⁻¹`` and s; the product of the factors' shifts is rho."""
        if rho == 0:
            return None if self.g is None else inverse_from_cholesky(self.g), inverse_from_cholesky(self.a), 0.0
        if self.g is None:
            return None, inverse_of_shifted(self.a, rho), rho
        root = rho**0.5
        return inverse_of_shifted(self.g, root), inverse_of_shifted(self.a, root), root

    def restricted(self, rows: Tensor, columns: Tensor) -> Kronecker:
        """H for changes to some rows and columns alone, given by their numbers: ``G_rr ⊗ A_cc``."""
        g = None if self.g is None else self.g[rows][:, rows].contiguous()
        return Kronecker(self.a[columns][:, columns].contiguous(), g, out_features=len(rows))

    def to_dense(self) -> Tensor:
        """``kron(G, A)``."""
        g = torch.eye(self._rows, dtype=self.a.dtype, device=self.a.device) if self.g is None else self.g
        return torch.kron(g.contiguous(), self.a.contiguous())


def _equilibrate(factor: Tensor, inverse_diagonal: Tensor) -> tuple[Tensor, Tensor]:
    """``(F / (s sᵀ), s)`` with s as of ``equilibrating``."""
    scale = equilibrating(factor.diagonal(), inverse_diagonal)
    return factor / torch.outer(scale, scale), scale
