"""Factors from few tokens: shrunk towards a multiple of the identity, as far as their number makes them uncertain.

An expert of a mixture sees only its share of the calibration text, often fewer tokens than its factors have rows. The
eigenvalues of a sample covariance S [n, n] then spread: the small ones are far too small, and the Optimal Brain Surgeon
trusts them. Ledoit & Wolf (2004) take ``(1 − ρ) S + ρ μ I`` with μ = tr S / n, and ρ that minimises the expected
squared error. For Gaussian tokens it follows from S and their number N alone, by the fixed point that Chen, Wiesel,
Eldar & Hero (2010, "Shrinkage algorithms for MMSE covariance estimation", eq. 23) give:

    ρ = min(1, ((1 − 2/n) tr S² + tr² S) / ((N + 1 − 2/n) (tr S² − tr² S / n)))

The fourth moments that the distribution-free form takes instead are not used: a single token of enormous activation,
which language models have, makes them call everything uncertain. The trace, and with it the size of predicted losses,
stays. Damping is added afterwards as ever.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FewTokens:
    """How much an expert saw, and what was made of it.

    Attributes:
        tokens: of the text that were routed to it.
        share: of all tokens, in (0, 1].
        shrinkage_a: ρ of A, in [0, 1].
        shrinkage_g: ρ of G, in [0, 1].
    """

    tokens: int
    share: float
    shrinkage_a: float
    shrinkage_g: float


def intensity(second: Tensor, count: int) -> float:
    """ρ in [0, 1] for a second moment S [n, n] that is the mean of ``count`` outer products."""
    n, trace = len(second), second.trace()
    square = float((second / trace).square().sum(dtype=torch.float64))  # ρ is free of scale, and squares may underflow
    spread = square - 1 / n  # of the eigenvalues: ‖S − μ I‖² / tr² S
    if not spread > 0:  # a multiple of the identity already, or zero
        return 1.0
    return min(1.0, ((1 - 2 / n) * square + 1) / ((count + 1 - 2 / n) * spread))


def shrink_(second: Tensor, count: int) -> float:
    """Make S [n, n] ``(1 − ρ) S + ρ μ I`` in place; returns ρ, see ``intensity``."""
    rho, mean = intensity(second, count), second.diagonal().mean()
    second.mul_(1 - rho).diagonal().add_(rho * mean)
    return rho
