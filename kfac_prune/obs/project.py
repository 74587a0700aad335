"""The Z step of ADMM: project onto the pattern, then ascend in the dual; fused on a GPU for the patterns known there.

Everywhere else the pattern's own ``project`` decides, one PyTorch operation after another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_prune import backend
from kfac_prune.obs.patterns import NM, Pattern, Unstructured


class ZStep(ABC):
    """``Y = X + V/rho``, ``M = project(Y²)``, ``Z = Y∘M``, ``V ← V + rho (X − Z)``."""

    @abstractmethod
    def __call__(self, x: Tensor, dual: Tensor, mask: Tensor, z: Tensor, rho: float) -> Tensor:
        """Update V, M and Z [out, in] in place.

        Returns:
            The churn, a scalar integer tensor: positions where M differs from the last mask.
        """

    def finished(self, mask: Tensor, x: Tensor) -> Tensor:
        """The mask to return for the last M, given the last X."""
        return mask


@dataclass(frozen=True)
class ByPattern(ZStep):
    """For any pattern, on any device.

    Attributes:
        pattern: feasible masks.
    """

    pattern: Pattern

    def __call__(self, x: Tensor, dual: Tensor, mask: Tensor, z: Tensor, rho: float) -> Tensor:
        """As ``ZStep``."""
        y = x + dual / rho
        kept = self.pattern.project(y.square())
        torch.mul(y, kept, out=z)
        dual += rho * (x - z)
        churn = (kept ^ mask).sum()
        mask.copy_(kept)
        return churn


@dataclass(frozen=True)
class FusedThreshold(ZStep):
    """For an unstructured pattern: two operators; only who reads the churn waits for the device.

    Scores that tie with the first one dropped are dropped too; ``finished`` fills up what that leaves free.

    Attributes:
        pattern: that removes at least one weight.
        keep: weights that it keeps.
    """

    pattern: Unstructured
    keep: int

    def __call__(self, x: Tensor, dual: Tensor, mask: Tensor, z: Tensor, rho: float) -> Tensor:
        """As ``ZStep``."""
        threshold = backend.kth_largest_dual(x, dual, rho, self.keep + 1)
        churn: Tensor = backend.admm_tail(x, dual, mask, z, threshold, rho)
        return churn

    def finished(self, mask: Tensor, x: Tensor) -> Tensor:
        """The last M and, where it keeps too few, the largest of X besides."""
        if int(mask.sum()) == self.keep:
            return mask
        return self.pattern.project(x.square().masked_fill(mask, torch.inf))


@dataclass(frozen=True)
class FusedNM(ZStep):
    """For n:m: one operator.

    Attributes:
        pattern: n of every m.
    """

    pattern: NM

    def __call__(self, x: Tensor, dual: Tensor, mask: Tensor, z: Tensor, rho: float) -> Tensor:
        """As ``ZStep``."""
        churn: Tensor = backend.admm_tail_nm(x, dual, mask, z, self.pattern.n, self.pattern.m, rho)
        return churn


def z_step(pattern: Pattern, weight: Tensor) -> ZStep:
    """The fastest Z step for a pattern and weights [out, in], of which the pattern removes at least one."""
    if weight.is_cuda and weight.dtype == torch.float32:
        return fused_z_step(pattern, weight)
    return ByPattern(pattern)


def fused_z_step(pattern: Pattern, weight: Tensor) -> ZStep:
    """A fused Z step where there is one for the pattern: exactly ``Unstructured`` or ``NM``, no subclass of them."""
    if type(pattern) is Unstructured:
        return FusedThreshold(pattern, pattern.kept_of(weight.numel()))
    return FusedNM(pattern) if type(pattern) is NM else ByPattern(pattern)
