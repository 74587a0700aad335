"""Sparsity patterns: which sets of weights may be kept. Everything else sees a pattern only through ``project``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch
from einops import rearrange
from torch import Tensor

from kfac_prune.linalg import kth_largest

#: In groups of at most so many, all pairs are compared, which is faster than sorting.
COMPARED = 8


class Pattern(ABC):
    """The feasible masks of one layer."""

    @abstractmethod
    def project(self, scores: Tensor) -> Tensor:
        """The feasible mask [out, in] (True = kept) with the largest sum of scores.

        Args:
            scores: [out, in], non-negative: what keeping each weight is worth.
        """


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Any ``numel − round(sparsity · numel)`` weights of the layer.

    Attributes:
        sparsity: fraction of weights removed, in [0, 1).
    """

    sparsity: float

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity is {self.sparsity}; it must be at least 0 and below 1")

    def kept_of(self, weights: int) -> int:
        """How many of so many weights are kept: at least one."""
        return max(weights - round(self.sparsity * weights), 1)

    def project(self, scores: Tensor) -> Tensor:
        """The largest scores; ties go to the earlier position, so that the count is exact."""
        keep = self.kept_of(scores.numel())
        threshold = kth_largest(scores, keep)
        mask = scores >= threshold
        surplus = int(mask.sum()) - keep
        if surplus:
            ties = (scores == threshold).reshape(-1).nonzero().squeeze(-1)[-surplus:]
            mask[torch.unravel_index(ties, mask.shape)] = False
        return mask


@dataclass(frozen=True)
class NM(Pattern):
    """At most n weights kept in every group of m consecutive inputs of a row ("n:m", e.g. 2:4).

    A last group of fewer than m inputs is treated as if zero columns completed it: it too keeps at most n.

    Attributes:
        n: weights kept per group, 1 <= n < m.
        m: inputs per group.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m:
            raise ValueError(f"pattern {self.n}:{self.m} keeps {self.n} of every {self.m}; needs 1 <= n < m")

    @property
    def sparsity(self) -> Fraction:
        """Fraction of weights removed where the width is a multiple of m."""
        return Fraction(self.m - self.n, self.m)

    def kept_of(self, width: int) -> int:
        """How many weights a row of some width keeps."""
        groups, rest = divmod(width, self.m)
        return groups * self.n + min(rest, self.n)

    def project(self, scores: Tensor) -> Tensor:
        """The n largest scores of every group; ties go to one of the equal positions."""
        width = scores.shape[1]
        padding = -width % self.m
        padded = torch.nn.functional.pad(scores, (0, padding), value=-1.0) if padding else scores
        if self.m <= COMPARED:
            members = rearrange(padded, "o (g m) -> m o g", m=self.m).contiguous()
            beaten = torch.zeros_like(members, dtype=torch.int8)  # by how many others of the group
            for i in range(self.m):
                beaten[i] += self.m - 1 - i  # by all that come later, less those that it beats
                for j in range(i + 1, self.m):
                    first = (members[i] >= members[j]).view(torch.int8)
                    beaten[j] += first
                    beaten[i] -= first
            return rearrange(beaten < self.n, "m o g -> o (g m)")[:, :width]
        groups = rearrange(padded, "o (g m) -> o g m", m=self.m)
        kept = torch.zeros_like(groups, dtype=torch.bool)
        kept.scatter_(-1, groups.topk(self.n, dim=-1, sorted=False).indices, True)
        return rearrange(kept, "o g m -> o (g m)")[:, :width]

    def is_valid(self, mask: Tensor) -> bool:
        """Whether a mask [out, in] keeps at most n of every m."""
        padded = torch.nn.functional.pad(mask, (0, -mask.shape[1] % self.m))
        return bool((rearrange(padded, "o (g m) -> o g m", m=self.m).sum(-1) <= self.n).all())


def project_together(pattern: Pattern, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks of several tensors, of any shape, that compete as if they were one row; by name.

    Args:
        pattern: feasible masks of that row.
        scores: at least 0, or below it for what must go first.
    """
    everything = torch.cat([score.flatten() for score in scores.values()])
    parts = pattern.project(everything[None])[0].split([score.numel() for score in scores.values()])
    return {name: part.view_as(score) for (name, score), part in zip(scores.items(), parts, strict=True)}
