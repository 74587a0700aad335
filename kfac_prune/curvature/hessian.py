"""The exact Hessian of a small network by automatic differentiation: what every curvature stands in for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kfac_prune.errors import InputError

#: More weights than this need gigabytes for the matrix alone, and as many products with it.
MAX_WEIGHTS = 5000
#: Rows of the matrix that are computed at a time.
ROWS = 64


def exact_hessian(loss: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    """``∂²L/∂w ∂wᵀ`` [n, n], symmetric, by n products with it (Pearlmutter 1994), reverse over reverse mode.

    Away from a minimum it is indefinite in general, unlike the Fisher; see ``operators.make_definite``.

    Args:
        loss: from the weights [n] to a scalar, twice differentiable.
        weight: w [n].

    Raises:
        InputError: more than 5000 weights.
    """
    if weight.numel() > MAX_WEIGHTS:
        raise InputError(
            f"the exact Hessian of {weight.numel():,} weights would be a matrix of {weight.numel():,} squared; it is "
            f"for at most {MAX_WEIGHTS:,}; use the Kronecker-factored curvature"
        )
    w = weight.detach()
    product = torch.func.vjp(torch.func.grad(loss), w)[1]
    h: Tensor = torch.func.vmap(product, chunk_size=ROWS)(torch.eye(len(w), dtype=w.dtype, device=w.device))[0]
    return (h + h.T) / 2
