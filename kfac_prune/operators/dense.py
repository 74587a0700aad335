"""The full curvature matrix: exact Optimal Brain Surgeon on small layers, and the oracle of the tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from einops import rearrange
from torch import Tensor

from kfac_prune.linalg import inverse_from_cholesky, shifted
from kfac_prune.operators.base import Curvature, equilibrating


class Dense(Curvature):
    """Any symmetric positive definite ``H: [out*in, out*in]`` (Hassibi & Stork 1993).

    Args:
        h: the matrix; rows of W are stacked.
        shape: (out, in) of the weight matrix.
    """

    def __init__(self, h: Tensor, shape: tuple[int, int]) -> None:
        if h.shape != (shape[0] * shape[1],) * 2:
            raise ValueError(f"H is {list(h.shape)}; a weight matrix {list(shape)} needs {shape[0] * shape[1]} squared")
        self.h, self._shape = h, shape

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight matrix."""
        return self._shape

    def _matrix(self, vector: Tensor) -> Tensor:
        """[out*in] as [out, in]."""
        return rearrange(vector, "(o i) -> o i", o=self._shape[0])

    def apply(self, x: Tensor) -> Tensor:
        """``H vec(X)``, as [out, in]."""
        return self._matrix(self.h @ x.reshape(-1))

    def diagonal(self) -> Tensor:
        """``H_qq``: [out, in]."""
        return self._matrix(self.h.diagonal())

    @cached_property
    def _inverse(self) -> Tensor:
        """``H⁻¹`` [out*in, out*in]."""
        return inverse_from_cholesky(self.h)

    def inverse_diagonal(self) -> Tensor:
        """``[H⁻¹]_qq``: [out, in]."""
        return self._matrix(self._inverse.diagonal())

    def equilibrated(self) -> tuple[Dense, Tensor]:
        """Rows and columns scaled by ``(H_qq / [H⁻¹]_qq)^¼``, then to mean diagonal one."""
        scale = equilibrating(self.h.diagonal(), self._inverse.diagonal())
        return Dense(self.h / (scale[:, None] * scale), self._shape), self._matrix(scale)

    def shifted_inverse(self, rho: float) -> Callable[[Tensor], Tensor]:
        """Exact: one Cholesky factorisation of H + rho I."""
        inverse = inverse_from_cholesky(shifted(self.h, rho))
        return lambda r: self._matrix(inverse @ r.reshape(-1))

    def to_dense(self) -> Tensor:
        """H itself."""
        return self.h
