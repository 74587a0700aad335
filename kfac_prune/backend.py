"""Dispatch of the fused kernels: Triton on a GPU, the PyTorch twin anywhere else.

Every function is an operator ``torch.ops.kfac_prune.*`` of the same name, signature and result as in
``kfac_prune.reference`` and ``reference_pcg``, opaque to torch.compile. Triton is imported by the first call on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from kfac_prune import reference, reference_pcg

#: Triton is a dependency on Linux alone; elsewhere the twins run on a GPU too.
HAS_TRITON = find_spec("triton") is not None


@torch.library.custom_op("kfac_prune::admm_tail", mutates_args=("dual", "mask", "z"))
def admm_tail(x: Tensor, dual: Tensor, mask: Tensor, z: Tensor, threshold: Tensor, rho: float) -> Tensor:
    """Z step and dual ascent of ADMM for a threshold on the scores, as ``reference.admm_tail``.

    ``Y = X + V/rho``, ``M = Y² > threshold``, ``Z = Y∘M``, ``V ← V + rho (X − Z)``.

    Args:
        x: X [out, in] float32, read.
        dual: V [out, in] float32, updated in place.
        mask: [out, in] bool, True = kept; the last iteration's on entry, M on return.
        z: Z [out, in] float32, overwritten.
        threshold: scalar tensor, float32, on the device of x.
        rho: the penalty, above 0.

    Returns:
        The churn, a scalar int64 tensor: positions where M differs from the last mask.
    """
    return reference.admm_tail(x, dual, mask, z, threshold, rho)


@admm_tail.register_kernel("cuda")
def _(x: Tensor, dual: Tensor, mask: Tensor, z: Tensor, threshold: Tensor, rho: float) -> Tensor:
    if not HAS_TRITON:
        return reference.admm_tail(x, dual, mask, z, threshold, rho)
    from kfac_prune_kernels.admm_tail import admm_tail as kernel

    churn: Tensor = kernel(x, dual, mask, z, threshold, rho)
    return churn


@admm_tail.register_fake
def _(x: Tensor, dual: Tensor, mask: Tensor, z: Tensor, threshold: Tensor, rho: float) -> Tensor:
    return x.new_empty((), dtype=torch.int64)


@torch.library.custom_op("kfac_prune::admm_tail_nm", mutates_args=("dual", "mask", "z"))
def admm_tail_nm(x: Tensor, dual: Tensor, mask: Tensor, z: Tensor, n: int, m: int, rho: float) -> Tensor:
    """Z step and dual ascent of ADMM for the n largest scores of every m, as ``reference.admm_tail_nm``."""
    return reference.admm_tail_nm(x, dual, mask, z, n, m, rho)


@admm_tail_nm.register_kernel("cuda")
def _(x: Tensor, dual: Tensor, mask: Tensor, z: Tensor, n: int, m: int, rho: float) -> Tensor:
    if not HAS_TRITON:
        return reference.admm_tail_nm(x, dual, mask, z, n, m, rho)
    from kfac_prune_kernels.admm_tail import admm_tail_nm as kernel

    churn: Tensor = kernel(x, dual, mask, z, n, m, rho)
    return churn


@admm_tail_nm.register_fake
def _(x: Tensor, dual: Tensor, mask: Tensor, z: Tensor, n: int, m: int, rho: float) -> Tensor:
    return x.new_empty((), dtype=torch.int64)


@torch.library.custom_op("kfac_prune::kth_largest", mutates_args=())
def kth_largest(scores: Sequence[Tensor], k: int) -> Tensor:
    """The k-th largest entry of several float32 tensors, as ``reference.kth_largest``; nothing is read by the host."""
    return reference.kth_largest(scores, k)


@kth_largest.register_kernel("cuda")
def _(scores: Sequence[Tensor], k: int) -> Tensor:
    if not HAS_TRITON:
        return reference.kth_largest(scores, k)
    from kfac_prune_kernels.kth_largest import kth_largest as kernel

    score: Tensor = kernel(scores, k)
    return score


@kth_largest.register_fake
def _(scores: Sequence[Tensor], k: int) -> Tensor:
    return scores[0].new_empty(())


@torch.library.custom_op("kfac_prune::kth_largest_dual", mutates_args=())
def kth_largest_dual(x: Tensor, dual: Tensor, rho: float, k: int) -> Tensor:
    """The k-th largest of ``(X + V/rho)²``, as ``reference.kth_largest_dual``; the scores are never stored."""
    return reference.kth_largest_dual(x, dual, rho, k)


@kth_largest_dual.register_kernel("cuda")
def _(x: Tensor, dual: Tensor, rho: float, k: int) -> Tensor:
    if not HAS_TRITON:
        return reference.kth_largest_dual(x, dual, rho, k)
    from kfac_prune_kernels.kth_largest import kth_largest_dual as kernel

    score: Tensor = kernel(x, dual, rho, k)
    return score


@kth_largest_dual.register_fake
def _(x: Tensor, dual: Tensor, rho: float, k: int) -> Tensor:
    return x.new_empty(())


@torch.library.custom_op("kfac_prune::block_sweep", mutates_args=("weight", "error", "kept"))
def block_sweep(
    weight: Tensor,
    u: Tensor,
    error: Tensor,
    kept: Tensor,
    start: int,
    bits: Tensor | None = None,
    n: int = 0,
    m: int = 0,
) -> None:
    """Mask and compensate a block of columns, as ``reference.block_sweep``."""
    reference.block_sweep(weight, u, error, kept, start, bits, n, m)


@block_sweep.register_kernel("cuda")
def _(
    weight: Tensor,
    u: Tensor,
    error: Tensor,
    kept: Tensor,
    start: int,
    bits: Tensor | None = None,
    n: int = 0,
    m: int = 0,
) -> None:
    if not HAS_TRITON:
        return reference.block_sweep(weight, u, error, kept, start, bits, n, m)
    from kfac_prune_kernels.block_sweep import block_sweep as kernel

    kernel(weight, u, error, kept, start, bits, n, m)
    return None


@block_sweep.register_fake
def _(
    weight: Tensor,
    u: Tensor,
    error: Tensor,
    kept: Tensor,
    start: int,
    bits: Tensor | None = None,
    n: int = 0,
    m: int = 0,
) -> None:
    return None


@torch.library.custom_op("kfac_prune::pcg_step", mutates_args=("x", "gradient", "direction", "z", "log"))
def pcg_step(
    x: Tensor,
    gradient: Tensor,
    direction: Tensor,
    z: Tensor,
    curved: Tensor,
    inverse: Tensor,
    log: Tensor,
    iteration: int,
    tolerance: float,
) -> None:
    """One step of conjugate gradients after the product with H, as ``reference_pcg.pcg_step``; float64 by the twin."""
    reference_pcg.pcg_step(x, gradient, direction, z, curved, inverse, log, iteration, tolerance)


@pcg_step.register_kernel("cuda")
def _(
    x: Tensor,
    gradient: Tensor,
    direction: Tensor,
    z: Tensor,
    curved: Tensor,
    inverse: Tensor,
    log: Tensor,
    iteration: int,
    tolerance: float,
) -> None:
    if not HAS_TRITON or x.dtype != torch.float32:
        return reference_pcg.pcg_step(x, gradient, direction, z, curved, inverse, log, iteration, tolerance)
    from kfac_prune_kernels.pcg import pcg_step as kernel

    kernel(x, gradient, direction, z, curved, inverse, log, iteration, tolerance)
    return None


@pcg_step.register_fake
def _(
    x: Tensor,
    gradient: Tensor,
    direction: Tensor,
    z: Tensor,
    curved: Tensor,
    inverse: Tensor,
    log: Tensor,
    iteration: int,
    tolerance: float,
) -> None:
    return None
