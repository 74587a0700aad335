"""Tikhonov damping of curvature factors: stated, reported, and never replaced by something else."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_prune.errors import InputError
from kfac_prune.linalg import is_definite, shifted

#: A factor that stays indefinite is damped ten times more at a time, up to this multiple of its mean diagonal.
MAX_RELATIVE = 1.0


@dataclass(frozen=True)
class DampingRecord:
    """What was added to one factor.

    Attributes:
        factor: its name, "A" or "G" or "H".
        relative: the damping used, as a fraction of the mean diagonal.
        raised: the damping asked for did not make the factor positive definite and was raised to ``relative``.
        smallest_eigenvalue: of the undamped factor; measured only when the damping was raised.
    """

    factor: str
    relative: float
    raised: bool = False
    smallest_eigenvalue: float | None = None


@dataclass(frozen=True)
class Damping:
    """``F + relative · mean(diag F) · I`` (DESIGN §5; results hardly change between 0.01 and 0.3).

    Attributes:
        relative: fraction of the mean diagonal, > 0 and at most 1.
    """

    relative: float = 0.03

    def __post_init__(self) -> None:
        if not 0 < self.relative <= MAX_RELATIVE:
            raise ValueError(f"damping is {self.relative}; it must be above 0 and at most {MAX_RELATIVE}")

    def __call__(
        self,
        factor: Tensor,
        *,
        name: str,
        where: str,
        entries: int | None = None,
        known: DampingRecord | None = None,
    ) -> tuple[Tensor, DampingRecord]:
        """Damp a symmetric factor [n, n], or the blocks [k, n, n] of one, and make sure that it is positive definite.

        Args:
            factor: [n, n] or [k, n, n], symmetric positive semi-definite up to rounding.
            name: "A", "G" or "H", for messages.
            where: the layer's name, for messages.
            entries: of the diagonal, over which its mean is taken; None = all (blocks may be filled up with zeros).
            known: the record that damping this very factor gave before, which is not checked again.

        Returns:
            The damped factor and the record of what was added.

        Raises:
            InputError: the factor is zero, holds NaN or infinity, or is indefinite even at the largest damping.
        """
        diagonal = factor.diagonal(dim1=-2, dim2=-1)
        mean = float(diagonal.mean()) if entries is None else float(diagonal.sum()) / entries
        if known is not None:
            return shifted(factor, known.relative * mean), known
        self.of_mean(mean if torch.isfinite(factor).all() else math.nan, name=name, where=where)
        relative = self.relative
        while True:
            damped = shifted(factor, relative * mean)
            if is_definite(damped):
                break
            if relative >= MAX_RELATIVE:
                raise InputError(
                    f"layer {where}: its curvature factor {name} is not positive definite (smallest eigenvalue "
                    f"{_smallest_eigenvalue(factor):.3g}, mean diagonal {mean:.3g}) even with damping {relative}"
                )
            relative = min(10 * relative, MAX_RELATIVE)
        raised = relative != self.relative
        return damped, DampingRecord(name, relative, raised, _smallest_eigenvalue(factor) if raised else None)

    def of_mean(self, mean: float, *, name: str, where: str) -> tuple[float, DampingRecord]:
        """What is added to a factor that is positive semi-definite by its form, from the mean of its diagonal.

        Raises:
            InputError: the mean is zero or not finite.
        """
        if not math.isfinite(mean):
            raise InputError(
                f"layer {where}: its curvature factor {name} holds NaN or infinity; the activations or gradients "
                "overflow (try --dtype float32 or bfloat16) or the calibration text triggers a fault of the model"
            )
        if mean <= 0:
            raise InputError(
                f"layer {where}: its curvature factor {name} is zero on the calibration data, so no loss can be "
                "predicted for it; leave the layer out with --ignore"
            )
        return self.relative * mean, DampingRecord(name, self.relative)


def _smallest_eigenvalue(factor: Tensor) -> float:
    return float(torch.linalg.eigvalsh(factor.double()).min())
