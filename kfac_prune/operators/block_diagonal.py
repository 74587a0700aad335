"""The block-diagonal curvature of WoodFisher (Singh & Alistarh 2020) and oBERT (Kurtic et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from kfac_prune.linalg import inverse_from_cholesky
from kfac_prune.operators.base import Curvature, equilibrating

#: What is cut into blocks: every row of W by itself, or vec(W), whose blocks run on from one row into the next.
Along = Literal["rows", "vec"]


class BlockDiagonal(Curvature):
    """``H = diag(B_1, …, B_k)``: consecutive weights interact within a block and not between blocks.

    Args:
        blocks: [k, size, size], symmetric positive definite, line by line. Where a line's length is no multiple of the
            size, its last block has fewer weights, and the entries of ``blocks`` beyond them are ignored.
        shape: (out, in) of the weight matrix.
        along: a line is a row of W, or all of vec(W).
    """

    def __init__(self, blocks: Tensor, shape: tuple[int, int], along: Along = "rows") -> None:
        self._shape, self.along = shape, along
        self._lines, self._length = _lines(shape, along)
        size = blocks.shape[-1]
        per_line = math.ceil(self._length / size)
        if blocks.shape != (self._lines * per_line, size, size):
            raise ValueError(
                f"blocks are {list(blocks.shape)}; {self._lines} lines of {self._length} weights need "
                f"{self._lines * per_line} blocks of {size} x {size}"
            )
        rest = self._length % size
        if rest:
            blocks = blocks.clone()
            last = blocks.view(self._lines, per_line, size, size)[:, -1]
            last[:, rest:] = 0
            last[:, :, rest:] = 0
            last[:, rest:, rest:] = torch.eye(size - rest, dtype=blocks.dtype, device=blocks.device)
        self.blocks = blocks

    @classmethod
    def fisher(cls, gradients: Tensor, size: int, damping: float, along: Along = "rows") -> BlockDiagonal:
        """``λ I`` plus the blocks of ``(1/m) Σ vec(g) vec(g)ᵀ`` (WoodFisher, eq. 6, without the chain of updates).

        Args:
            gradients: [m, out, in] of one sample each; labels sampled from the model give the true Fisher, the data's
                the empirical one.
            size: weights per block, at least 1.
            damping: λ > 0, in the unit of H.
            along: as for the class.
        """
        shape = (gradients.shape[1], gradients.shape[2])
        _, length = _lines(shape, along)
        pieces = _cut(gradients.reshape(-1, length), size).reshape(len(gradients), -1, size).transpose(0, 1)  # [k,m,b]
        blocks = pieces.transpose(1, 2) @ pieces / len(gradients)
        blocks.diagonal(dim1=1, dim2=2).add_(damping)
        return cls(blocks, shape, along)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight matrix."""
        return self._shape

    def _split(self, x: Tensor) -> Tensor:
        """[out, in] as [k, size], zero beyond the end of a line."""
        return _cut(x.reshape(self._shape).reshape(self._lines, self._length), self.blocks.shape[-1])

    def _join(self, pieces: Tensor) -> Tensor:
        """[k, size] as [out, in]."""
        return pieces.reshape(self._lines, -1)[:, : self._length].reshape(self._shape)

    def apply(self, x: Tensor) -> Tensor:
        """Every block times its weights: [out, in]."""
        return self._join((self.blocks @ self._split(x).unsqueeze(2)).squeeze(2))

    def diagonal(self) -> Tensor:
        """``H_qq``: [out, in]."""
        return self._join(self.blocks.diagonal(dim1=1, dim2=2))

    @cached_property
    def _inverses(self) -> Tensor:
        """[k, size, size]."""
        return inverse_from_cholesky(self.blocks)

    def inverse_diagonal(self) -> Tensor:
        """``[H⁻¹]_qq``: [out, in]."""
        return self._join(self._inverses.diagonal(dim1=1, dim2=2))

    def equilibrated(self) -> tuple[BlockDiagonal, Tensor]:
        """Rows and columns scaled by ``(H_qq / [H⁻¹]_qq)^¼``, then to mean diagonal one."""
        scale = equilibrating(self.diagonal(), self.inverse_diagonal())
        pieces = self._split(scale)
        pieces = torch.where(pieces > 0, pieces, torch.ones_like(pieces))  # beyond the end of a line
        return BlockDiagonal(self.blocks / (pieces[:, :, None] * pieces[:, None]), self._shape, self.along), scale

    def shifted_inverse(self, rho: float) -> Callable[[Tensor], Tensor]:
        """Exact: one Cholesky factorisation per block."""
        blocks = self.blocks.clone()
        blocks.diagonal(dim1=1, dim2=2).add_(rho)
        inverses = inverse_from_cholesky(blocks)
        return lambda r: self._join((inverses @ self._split(r).unsqueeze(2)).squeeze(2))

    def to_dense(self) -> Tensor:
        """The block-diagonal matrix."""
        size, length = self.blocks.shape[-1], self._length
        lines = self.blocks.reshape(self._lines, -1, size, size)
        matrix: Tensor = torch.block_diag(*(torch.block_diag(*line)[:length, :length] for line in lines))
        return matrix


def _lines(shape: tuple[int, int], along: Along) -> tuple[int, int]:
    """(number of lines, weights per line)."""
    return shape if along == "rows" else (1, shape[0] * shape[1])


def _cut(lines: Tensor, size: int) -> Tensor:
    """[lines, length] as [lines * blocks per line, size], the last of a line filled up with zeros."""
    return torch.nn.functional.pad(lines, (0, -lines.shape[1] % size)).reshape(-1, size)
