"""Diagonal curvatures: magnitude pruning (H = I) and Optimal Brain Damage (H = diag)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kfac_prune.operators.base import Curvature


class Diagonal(Curvature):
    """``H = diag(vec(h))``: Optimal Brain Damage (LeCun, Denker & Solla 1989).

    Args:
        h: [out, in], positive second derivatives, one per weight.
    """

    separable = True

    def __init__(self, h: Tensor) -> None:
        if h.ndim != 2:
            raise ValueError(f"the diagonal has {h.ndim} dimensions; give it the shape of the weight matrix [out, in]")
        self.h = h

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight matrix."""
        return self.h.shape[0], self.h.shape[1]

    def apply(self, x: Tensor) -> Tensor:
        """``h * X``."""
        return self.h * x

    def diagonal(self) -> Tensor:
        """``h``: [out, in]."""
        return self.h

    def inverse_diagonal(self) -> Tensor:
        """``1 / h``: [out, in]."""
        return self.h.reciprocal()

    def equilibrated(self) -> tuple[Curvature, Tensor]:
        """The identity, with scale ``h^½``."""
        return ScaledIdentity(self.h.new_ones(()), self.shape), self.h.sqrt()

    def shifted_inverse(self, rho: float) -> Callable[[Tensor], Tensor]:
        """Exact: division by ``h + rho``."""
        shifted = self.h + rho
        return lambda r: r / shifted

    def to_dense(self) -> Tensor:
        """``diag(vec(h))``."""
        return torch.diag(self.h.reshape(-1))


class ScaledIdentity(Diagonal):
    """``H = c·I``: magnitude pruning. With c = 1 the quadratic is ``½‖D‖²`` and has no unit of loss.

    Args:
        value: c > 0, a scalar tensor, whose dtype and device the operator takes.
        shape: (out, in) of the weight matrix.
    """

    def __init__(self, value: Tensor, shape: tuple[int, int]) -> None:
        super().__init__(value.expand(shape))
