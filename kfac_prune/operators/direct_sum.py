"""Several layers as one problem: curvatures side by side, nothing between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kfac_prune.operators.base import Curvature, equilibrating
from kfac_prune.operators.scaled import Scaled


class DirectSum(Curvature):
    """``H = H_1 ⊕ … ⊕ H_k`` on the weights of k layers, each flattened row by row, one after the other: [1, n].

    Args:
        parts: the curvature of every layer, at least one.
    """

    def __init__(self, parts: Sequence[Curvature]) -> None:
        if not parts:
            raise ValueError("a direct sum needs at least one curvature")
        self.parts = tuple(parts)
        self._sizes = [part.shape[0] * part.shape[1] for part in self.parts]
        self.separable = all(part.separable for part in self.parts)

    @property
    def shape(self) -> tuple[int, int]:
        """(1, number of weights of all layers)."""
        return 1, sum(self._sizes)

    def _split(self, x: Tensor) -> list[Tensor]:
        """[1, n] as one matrix [out, in] per part."""
        pieces = x.reshape(self.shape)[0].split(self._sizes)
        return [piece.reshape(part.shape) for piece, part in zip(pieces, self.parts, strict=True)]

    def apply(self, x: Tensor) -> Tensor:
        """Every part on its own weights: [1, n]."""
        return join([part.apply(piece) for part, piece in zip(self.parts, self._split(x), strict=True)])

    def diagonal(self) -> Tensor:
        """``H_qq``: [1, n]."""
        return join([part.diagonal() for part in self.parts])

    def inverse_diagonal(self) -> Tensor:
        """``[H⁻¹]_qq``: [1, n]."""
        return join([part.inverse_diagonal() for part in self.parts])

    def equilibrated(self) -> tuple[DirectSum, Tensor]:
        """Every part equilibrated in its own way, then by one number each so that all have the same constant."""
        scale = equilibrating(self.diagonal(), self.inverse_diagonal())
        parts: list[Curvature] = []
        for part, wanted in zip(self.parts, self._split(scale), strict=True):
            equilibrated, own = part.equilibrated()
            parts.append(Scaled(equilibrated, wanted / own))
        return DirectSum(parts), scale

    def shifted_inverse(self, rho: float) -> Callable[[Tensor], Tensor]:
        """That of every part."""
        solvers = [part.shifted_inverse(rho) for part in self.parts]
        return lambda r: join([solve(piece) for solve, piece in zip(solvers, self._split(r), strict=True)])

    def to_dense(self) -> Tensor:
        """The block-diagonal matrix of the parts."""
        matrix: Tensor = torch.block_diag(*(part.to_dense() for part in self.parts))
        return matrix


def join(matrices: Sequence[Tensor]) -> Tensor:
    """Weight matrices [out, in] of several layers as one row [1, n]."""
    return torch.cat([matrix.reshape(-1) for matrix in matrices]).unsqueeze(0)
