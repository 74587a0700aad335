"""What the kernels compute, in PyTorch: the CPU path, the oracle of the tests and the definition of every argument."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
    y = _y(x, dual, rho)
    kept = y.square() > threshold
    torch.mul(y, kept, out=z)
    dual += rho * (x - z)
    churn = torch.count_nonzero(kept ^ mask)
    mask.copy_(kept)
    return churn


def admm_tail_nm(x: Tensor, dual: Tensor, mask: Tensor, z: Tensor, n: int, m: int, rho: float) -> Tensor:
    """``admm_tail`` for n:m: M keeps the n largest of Y² in every group of m consecutive inputs of a row.

    Of equal scores the earlier position is kept. A last group of fewer than m inputs keeps at most n as well. A NaN in
    Y is dropped from M, so that a group may keep fewer, and stays NaN in Z and V.

    Args:
        x: X [out, in] float32, read.
        dual: V [out, in] float32, updated in place.
        mask: [out, in] bool, True = kept; the last iteration's on entry, M on return.
        z: Z [out, in] float32, overwritten, whatever it held.
        n: kept of every group, 1 <= n < m.
        m: inputs per group.
        rho: the penalty, above 0.

    Returns:
        The churn, a scalar int64 tensor: positions where M differs from the last mask.

    Raises:
        ValueError: an argument is not as described.
    """
    check_admm_tail_nm(x, dual, mask, z, n, m, rho)
    y = _y(x, dual, rho)
    kept = largest_of_groups(y.square(), n, m)
    torch.mul(y, kept, out=z)
    dual += rho * (x - z)
    churn = torch.count_nonzero(kept ^ mask)
    mask.copy_(kept)
    return churn


def largest_of_groups(scores: Tensor, n: int, m: int) -> Tensor:
    """The mask [out, in] of the n largest of every m non-negative scores of a row; the earlier of equals, never NaN."""
    rows, columns = scores.shape
    padded = torch.nn.functional.pad(scores.nan_to_num(-1.0, math.inf), (0, -columns % m), value=-1.0)
    groups = padded.reshape(rows, padded.shape[1] // m, m)
    order = groups.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True) & (groups >= 0)
    return kept.reshape(rows, padded.shape[1])[:, :columns]


def check_admm_tail_nm(x: Tensor, dual: Tensor, mask: Tensor, z: Tensor, n: int, m: int, rho: float) -> None:
    """Raise ValueError unless the arguments are as ``admm_tail_nm`` describes them (overlap is not looked for)."""
    _check_matrices("admm_tail_nm", x=x, dual=dual, mask=mask, z=z)
    _check_groups("admm_tail_nm", n, m)
    _check_rho(rho)


def check_admm_tail(x: Tensor, dual: Tensor, mask: Tensor, z: Tensor, threshold: Tensor, rho: float) -> None:
    """Raise ValueError unless the arguments are as ``admm_tail`` describes them (overlap is not looked for)."""
    _check_matrices("admm_tail", x=x, dual=dual, mask=mask, z=z)
    _check_threshold("admm_tail", threshold, x)
    _check_rho(rho)


def kth_largest(scores: Sequence[Tensor], k: int) -> Tensor:
    """The k-th largest of the entries of all tensors together, as ``torch.kthvalue`` orders them: NaN comes first.

    Args:
        scores: float32 tensors of any shape, contiguous, on one device.
        k: from 1 to the number of entries.

    Returns:
        A scalar float32 tensor; a zero may be returned with either sign.

    Raises:
        ValueError: an argument is not as described.
    """
    check_plain(scores, k)
    flat = torch.cat([part.reshape(-1) for part in scores])
    return torch.kthvalue(flat, flat.numel() - k + 1).values


def kth_largest_dual(x: Tensor, dual: Tensor, rho: float, k: int) -> Tensor:
    """The k-th largest of ``(X + V/rho)²``, the scores that ADMM projects by.

    Args:
        x: X [out, in] float32, contiguous.
        dual: V, likewise.
        rho: the penalty, above 0.
        k: from 1 to the number of weights.

    Returns:
        A scalar float32 tensor.

    Raises:
        ValueError: an argument is not as described.
    """
    check_dual(x, dual, rho, k)
    return kth_largest([_y(x, dual, rho).square()], k)


def kth_largest_scaled(weights: Sequence[Tensor], scales: Sequence[Tensor], k: int) -> Tensor:
    """The k-th largest of ``w_rc² / s_c`` over all weights of all layers.

    Args:
        weights: of layers [out, in] float32; rows may lie apart (a block of columns), entries of a row may not.
        scales: s [in] of each layer, float32, contiguous.
        k: from 1 to the number of weights.

    Returns:
        A scalar float32 tensor.

    Raises:
        ValueError: an argument is not as described.
    """
    check_scaled(weights, scales, k)
    return kth_largest([w.square() / s for w, s in zip(weights, scales, strict=True)], k)


def check_plain(scores: Sequence[Tensor], k: int) -> None:
    """Raise ValueError unless the arguments are as ``kth_largest`` describes them."""
    if not scores:
        raise ValueError("kth_largest needs at least one tensor")
    for i, part in enumerate(scores):
        _check("kth_largest", f"scores[{i}]", part, part.shape, scores[0].device)
    _check_rank("kth_largest", k, sum(part.numel() for part in scores))


def check_dual(x: Tensor, dual: Tensor, rho: float, k: int) -> None:
    """Raise ValueError unless the arguments are as ``kth_largest_dual`` describes them."""
    _check_matrices("kth_largest_dual", x=x, dual=dual)
    _check_rho(rho)
    _check_rank("kth_largest_dual", k, x.numel())


def check_scaled(weights: Sequence[Tensor], scales: Sequence[Tensor], k: int) -> None:
    """Raise ValueError unless the arguments are as ``kth_largest_scaled`` describes them."""
    if not weights or len(weights) != len(scales):
        raise ValueError(f"kth_largest_scaled needs one scale per layer, not {len(weights)} and {len(scales)}")
    for i, (weight, scale) in enumerate(zip(weights, scales, strict=True)):
        if weight.dim() != 2:
            raise ValueError(f"weights[{i}] has shape {tuple(weight.shape)}; kth_largest_scaled needs [out, in]")
        _check("kth_largest_scaled", f"weights[{i}]", weight, weight.shape, weights[0].device, rows_apart=True)
        _check("kth_largest_scaled", f"scales[{i}]", scale, weight.shape[1:], weights[0].device)
    _check_rank("kth_largest_scaled", k, sum(weight.numel() for weight in weights))


def _y(x: Tensor, dual: Tensor, rho: float) -> Tensor:
    """``X + V/rho``, with IEEE's division: CUDA would multiply by the rounded 1/rho if rho were a number."""
    return x + dual / torch.full((), rho, dtype=x.dtype, device=x.device)


def _check(
    name: str,
    argument: str,
    tensor: Tensor,
    shape: Sequence[int],
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    rows_apart: bool = False,
) -> None:
    """Refuse a tensor of another dtype, shape, device or memory layout."""
    if tensor.dtype != dtype or tensor.shape != torch.Size(shape) or tensor.device != device:
        raise ValueError(
            f"{argument} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; "
            f"{name} needs {dtype} {tuple(shape)} on {device}"
        )
    if rows_apart and tensor.dim() == 2 and (tensor.stride(1) == 1 or tensor.shape[1] < 2):
        return
    if not tensor.is_contiguous():
        raise ValueError(f"{argument} has strides {tensor.stride()}; {name} needs it contiguous, row by row")


def _check_matrices(name: str, **matrices: Tensor) -> None:
    """Refuse matrices [out, in] unless all are like the first: float32, or bool if called mask; contiguous."""
    first, like = next(iter(matrices.items()))
    if like.dim() != 2:
        raise ValueError(f"{first} has shape {tuple(like.shape)}; {name} needs [out, in]")
    for argument, tensor in matrices.items():
        dtype = torch.bool if argument == "mask" else torch.float32
        _check(name, argument, tensor, like.shape, like.device, dtype=dtype)


def _check_threshold(name: str, threshold: Tensor, like: Tensor) -> None:
    if threshold.dtype != torch.float32 or threshold.dim() != 0 or threshold.device != like.device:
        raise ValueError(
            f"threshold is {threshold.dtype} {tuple(threshold.shape)} on {threshold.device}; "
            f"{name} needs a float32 scalar tensor on {like.device}"
        )


def _check_groups(name: str, n: int, m: int) -> None:
    if not 1 <= n < m:
        raise ValueError(f"pattern is {n}:{m}; {name} needs 1 <= n < m")


def _check_rho(rho: float) -> None:
    if not 0 < rho < math.inf:
        raise ValueError(f"rho is {rho}; it must be above 0 and finite")


def _check_rank(name: str, k: int, entries: int) -> None:
    if not 1 <= k <= entries:
        raise ValueError(f"k is {k}; {name} has {entries} entries, so it must be from 1 to {entries}")
