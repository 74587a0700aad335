"""A curvature in other coordinates: every weight has a scale of its own."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kfac_prune.operators.base import Curvature, equilibrating


class Scaled(Curvature):
    """``S⁻¹ H S⁻¹`` with S = diag(vec(scale)), for curvatures that are no longer of their own class when scaled.

    Args:
        inner: H.
        scale: [out, in], positive.
    """

    def __init__(self, inner: Curvature, scale: Tensor) -> None:
        if scale.shape != inner.shape:
            raise ValueError(f"the scale is {list(scale.shape)}; the weight matrix is {list(inner.shape)}")
        self.inner, self.scale = inner, scale

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight matrix."""
        return self.inner.shape

    def apply(self, x: Tensor) -> Tensor:
        """``S⁻¹ H S⁻¹ X``."""
        return self.inner.apply(x / self.scale) / self.scale

    def diagonal(self) -> Tensor:
        """``H_qq / s_q²``: [out, in]."""
        return self.inner.diagonal() / self.scale**2

    def inverse_diagonal(self) -> Tensor:
        """``s_q² [H⁻¹]_qq``: [out, in]."""
        return self.inner.inverse_diagonal() * self.scale**2

    def equilibrated(self) -> tuple[Scaled, Tensor]:
        """The same H with another scale."""
        scale = equilibrating(self.diagonal(), self.inverse_diagonal())
        return Scaled(self.inner, self.scale * scale), scale

    def shifted_inverse(self, rho: float) -> Callable[[Tensor], Tensor]:
        """``S (H + rho s̄² I)⁻¹ S`` with s̄² the mean of scale²; exact for a constant scale, and for rho = 0.

        ``(S⁻¹ H S⁻¹ + rho I)⁻¹ = S (H + rho S²)⁻¹ S``, whose inverse H's structure does not give.
        """
        inverse = self.inner.shifted_inverse(rho * float(self.scale.square().mean()))
        return lambda r: self.scale * inverse(self.scale * r)

    def to_dense(self) -> Tensor:
        """The matrix."""
        s = self.scale.reshape(-1)
        return self.inner.to_dense() / (s[:, None] * s)
