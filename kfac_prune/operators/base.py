"""What every curvature can do: the protocol that selection, compensation and allocation are written against."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from kfac_prune.linalg import exact_products


class Curvature(ABC):
    """A symmetric positive definite operator H on the weight matrix of one layer.

    A weight matrix is ``W: [out, in]`` and ``vec`` stacks its rows, so H is ``[out*in, out*in]``. In every class
    ``½⟨D, H D⟩`` is the predicted cost of the change D; with the Kronecker-factored Fisher its unit is nats per token.
    """

    #: H is diagonal: taking the smallest saliencies is the exact optimum, and there is nothing to compensate.
    separable: bool = False

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight matrix."""

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """``H X`` for X: [out, in]."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """``H_qq`` for every weight q: [out, in]."""

    @abstractmethod
    def inverse_diagonal(self) -> Tensor:
        """``[H⁻¹]_qq`` for every weight q: [out, in]."""

    @abstractmethod
    def equilibrated(self) -> tuple[Curvature, Tensor]:
        """``(S⁻¹ H S⁻¹, scale)`` with S = diag(vec(scale)), scale: [out, in].

        ``scale_q ∝ (H_qq / [H⁻¹]_qq)^¼``, so that H and its inverse weigh every coordinate alike, and the constant
        makes the mean of the new diagonal one. ``W * scale`` are the weights in the new coordinates.
        """

    @abstractmethod
    def shifted_inverse(self, rho: float) -> Callable[[Tensor], Tensor]:
        """Factor once and return ``R ↦ P`` with P ≈ (H + rho·I)⁻¹ R, itself symmetric positive definite.

        With rho = 0 it is the inverse itself, in every class.
        """

    def preconditioned(self, rho: float) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Factor once and return ``R ↦ (P, H P)``, P as from ``shifted_inverse``."""
        inverse = self.shifted_inverse(rho)

        def both(r: Tensor) -> tuple[Tensor, Tensor]:
            p = inverse(r)
            return p, self.apply(p)

        return both

    @abstractmethod
    def to_dense(self) -> Tensor:
        """H as a matrix [out*in, out*in]: the oracle of the tests, never used by library code."""


def equilibrating(diagonal: Tensor, inverse_diagonal: Tensor) -> Tensor:
    """The scale of ``equilibrated`` from the diagonals of H and H⁻¹, in their shape.

    H is first brought near one by a power of four, which rounds nothing and which the constant undoes: the quotient of
    tiny curvature (below 1e-23 in float32) by its inverse underflows.
    """
    mean = diagonal.mean()
    unit = torch.ldexp(torch.ones_like(mean), mean.frexp().exponent // 2 * 2)
    scale = ((diagonal / unit) / (inverse_diagonal * unit)) ** 0.25
    return scale * (diagonal / scale**2).mean().sqrt()


@exact_products()
def quadratic_loss(curvature: Curvature, change: Tensor) -> float:
    """``½⟨D, H D⟩`` for D: [out, in]: the predicted increase of the loss (nats per token for the Fisher)."""
    return 0.5 * float((change * curvature.apply(change)).sum())
