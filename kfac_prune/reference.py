"""What the kernels compute, in PyTorch: the CPU path, the oracle of the tests and the definition of every argument."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

#: Columns that the block sweep takes at most, and that one word of mask bits stands for.
BLOCK_COLUMNS, SPAN = 128, 32


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
    """Prune a block of columns one by one, each passing its error on to the rest of the block (SparseGPT, OBC).

    Column j loses the weights off its mask, and every column k > j of the block receives ``−(w_j / U_jj) U_jk``; the
    columns after the block await ``W[:, stop:] −= errorᵀ U[start:stop, stop:]``. The mask is given by one of:

    - bits: chosen beforehand;
    - n, m: the n largest ``w_j² / U_jj²`` of every m columns, of the weights as they have become by then; of equals the
      earlier. A last group may be shorter.

    A NaN is removed by n:m and may spread over its row.

    Args:
        weight: W [out, in] float32, updated in place; rows may lie apart.
        u: U [in, in] float32, upper triangular with H⁻¹ = Uᵀ U; rows may lie apart. Its lower triangle is not read.
        error: [width of the block, out] float32, contiguous, overwritten: w_j / U_jj where removed, 0 where kept.
        kept: [width of the block, out] bool, contiguous, overwritten: the mask transposed.
        start: first column of the block, which is at most 128 wide.
        bits: the mask as ``pack_bits`` packs it; start must then be a multiple of 32.
        n: kept of every group.
        m: columns per group, at most 32.

    Raises:
        ValueError: an argument is not as described.
    """
    check_block_sweep(weight, u, error, kept, start, bits, n, m)
    width = len(error)
    x, u = weight[:, start : start + width], u[start : start + width, start : start + width]
    pivots = u.diagonal().square()
    if bits is not None:
        columns = torch.arange(start, start + width, device=x.device)
        kept.copy_(((bits[:, columns // SPAN] >> (columns % SPAN)) & 1).T)
    for j in range(width):
        if n and j % m == 0:
            kept[j : j + m] = largest_of_groups(x[:, j : j + m].square() / pivots[j : j + m], n, m).T
        error[j] = x[:, j].masked_fill(kept[j], 0.0) * u[j, j].reciprocal()
        x[:, j + 1 :] -= error[j].unsqueeze(1) * u[j, j + 1 :]
        x[:, j].masked_fill_(~kept[j], 0.0)


def pack_bits(mask: Tensor) -> Tensor:
    """A mask [out, in] bool as words [out, in / 32 rounded up] int32: bit b of word i is column 32 i + b."""
    rows, columns = mask.shape
    padded = torch.nn.functional.pad(mask, (0, -columns % SPAN)).reshape(rows, -(-columns // SPAN), SPAN)
    words = padded.to(torch.int64) << torch.arange(SPAN, device=mask.device)
    return words.sum(-1).to(torch.int32)


def check_block_sweep(
    weight: Tensor,
    u: Tensor,
    error: Tensor,
    kept: Tensor,
    start: int,
    bits: Tensor | None,
    n: int,
    m: int,
) -> None:
    """Raise ValueError unless the arguments are as ``block_sweep`` describes them."""
    name = "block_sweep"
    if weight.dim() != 2 or error.dim() != 2:
        raise ValueError(f"weight and error have {weight.dim()} and {error.dim()} dimensions; {name} needs 2 and 2")
    (rows, columns), width, device = weight.shape, len(error), weight.device
    check_tensor(name, "weight", weight, (rows, columns), device, rows_apart=True)
    check_tensor(name, "u", u, (columns, columns), device, rows_apart=True)
    check_tensor(name, "error", error, (width, rows), device)
    check_tensor(name, "kept", kept, (width, rows), device, dtype=torch.bool)
    if width > BLOCK_COLUMNS or not 0 <= start <= columns - width:
        raise ValueError(
            f"the block is columns {start} to {start + width}; {name} takes at most {BLOCK_COLUMNS} of the {columns}"
        )
    if (bits is None) == (n == 0):
        raise ValueError(f"{name} needs either bits or n:m")
    if bits is not None:
        check_tensor(name, "bits", bits, (rows, -(-columns // SPAN)), device, dtype=torch.int32)
        if start % SPAN:
            raise ValueError(f"the block starts at column {start}; with bits it must start at a multiple of {SPAN}")
    if n:
        _check_groups(name, n, m)
        if m > SPAN:
            raise ValueError(f"pattern is {n}:{m}; {name} takes groups of at most {SPAN}")


def check_plain(scores: Sequence[Tensor], k: int) -> None:
    """Raise ValueError unless the arguments are as ``kth_largest`` describes them."""
    if not scores:
        raise ValueError("kth_largest needs at least one tensor")
    for i, part in enumerate(scores):
        check_tensor("kth_largest", f"scores[{i}]", part, part.shape, scores[0].device)
    _check_rank("kth_largest", k, sum(part.numel() for part in scores))


def check_dual(x: Tensor, dual: Tensor, rho: float, k: int) -> None:
    """Raise ValueError unless the arguments are as ``kth_largest_dual`` describes them."""
    _check_matrices("kth_largest_dual", x=x, dual=dual)
    _check_rho(rho)
    _check_rank("kth_largest_dual", k, x.numel())


def _y(x: Tensor, dual: Tensor, rho: float) -> Tensor:
    """``X + V/rho``, with IEEE's division: CUDA would multiply by the rounded 1/rho if rho were a number."""
    return x + dual / torch.full((), rho, dtype=x.dtype, device=x.device)


def check_tensor(
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
        check_tensor(name, argument, tensor, like.shape, like.device, dtype=dtype)


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
