"""What the kernels compute, in PyTorch: the CPU path, the oracle of the tests and the definition of every argument."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def admm_tail(x: Tensor, dual: Tensor, mask: Tensor, z: Tensor, threshold: Tensor, rho: float) -> Tensor:
    """Z step and dual ascent of ADMM (DESIGN §5) for a threshold on the scores.

    ``Y = X + V/rho``, ``M = Y² > threshold``, ``Z = Y∘M``, ``V ← V + rho (X − Z)``.

    Scores equal to the threshold are dropped: with the (k+1)-th largest of Y² as threshold, k weights are kept, or
    fewer where the k-th ties with it. A NaN in Y is dropped from M and stays NaN in Z and V.

    Args:
        x: X [out, in] float32, read.
        dual: V [out, in] float32, updated in place.
        mask: [out, in] bool, True = kept; the last iteration's on entry, M on return.
        z: Z [out, in] float32, overwritten, whatever it held.
        threshold: scalar tensor, float32, on the device of x: it is never read by the host.
        rho: the penalty, above 0.

    All [out, in] are contiguous, on one device, and none overlaps another.

    Returns:
        The churn, a scalar int64 tensor: positions where M differs from the last mask.

    Raises:
        ValueError: an argument is not as described.
    """
    check_admm_tail(x, dual, mask, z, threshold, rho)
    y = x + dual / torch.full_like(threshold, rho)  # CUDA would multiply by the rounded 1/rho if this were a number
    kept = y.square() > threshold
    torch.mul(y, kept, out=z)
    dual += rho * (x - z)
    churn = torch.count_nonzero(kept ^ mask)
    mask.copy_(kept)
    return churn


def check_admm_tail(x: Tensor, dual: Tensor, mask: Tensor, z: Tensor, threshold: Tensor, rho: float) -> None:
    """Raise ValueError unless the arguments are as ``admm_tail`` describes them (overlap is not looked for)."""
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; admm_tail needs [out, in]")
    wanted = {"x": torch.float32, "dual": torch.float32, "mask": torch.bool, "z": torch.float32}
    for (name, dtype), tensor in zip(wanted.items(), (x, dual, mask, z), strict=True):
        if tensor.dtype != dtype or tensor.shape != x.shape or tensor.device != x.device:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; "
                f"admm_tail needs {dtype} {tuple(x.shape)} on {x.device}, where x is"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; admm_tail needs it contiguous, row by row")
    if threshold.dtype != torch.float32 or threshold.dim() != 0 or threshold.device != x.device:
        raise ValueError(
            f"threshold is {threshold.dtype} {tuple(threshold.shape)} on {threshold.device}; "
            f"admm_tail needs a float32 scalar tensor on {x.device}"
        )
    if not 0 < rho < math.inf:
        raise ValueError(f"rho is {rho}; it must be above 0 and finite")
