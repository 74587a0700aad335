"""Dispatch of the fused kernels: Triton on a GPU, the PyTorch twin anywhere else.

Every function is an operator ``torch.ops.kfac_prune.*`` of the same name, signature and result as in
``kfac_prune.reference``, opaque to torch.compile. Triton is imported by the first call on a GPU.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from kfac_prune import reference


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
    if find_spec("triton") is None:  # it is a dependency on Linux alone; the twin gives the same bits
        return reference.admm_tail(x, dual, mask, z, threshold, rho)
    from kfac_prune_kernels.admm_tail import admm_tail as kernel

    churn: Tensor = kernel(x, dual, mask, z, threshold, rho)
    return churn


@admm_tail.register_fake
def _(x: Tensor, dual: Tensor, mask: Tensor, z: Tensor, threshold: Tensor, rho: float) -> Tensor:
    return x.new_empty((), dtype=torch.int64)
