"""SparseGPT (Frantar & Alistarh 2023): one sweep over the columns, the error of each passed on to those after it."""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_prune import backend
from kfac_prune.linalg import inverse_upper_cholesky
from kfac_prune.obs import NM, Pattern, Unstructured
from kfac_prune.operators import Damping, DampingRecord
from kfac_prune.reference import SPAN, pack_bits

#: The authors' damping, and the columns whose mask is chosen at once and whose error is passed on by one product.
DAMPING, BLOCK = 0.01, 128
#: Columns swept one by one before one product brings the rest of the block up to date: what is fast on a CPU.
LEAF = 16


def sparsegpt(weight: Tensor, a: Tensor, pattern: Pattern, *, where: str = "W") -> tuple[Tensor, Tensor, DampingRecord]:
    """Prune one layer as algorithm 1 of the paper does.

    With ``H = A + 0.01 mean(diag A) I`` and ``H⁻¹ = Uᵀ U``, U upper triangular, column j loses the weights off the mask
    and every column k > j receives ``−(w_j / U_jj) U_jk``. Scores are ``w² / U_jj²`` of the weights as they have become
    by then: an unstructured mask is chosen at the start of every block of 128 columns over all rows, an n:m mask at the
    start of every group. A dead input (A_jj = 0) loses all its weights.

    Args:
        weight: W [out, in].
        a: A [in, in], uncentred second moment of the inputs.
        pattern: feasible masks.
        where: the layer's name, for messages.

    Returns:
        X [out, in], zero off the mask; the mask [out, in], True = kept; what was added to A.

    Raises:
        InputError: A is zero or not finite.
    """
    h, record = Damping(DAMPING)(a.double(), name="A", where=where)
    u = inverse_upper_cholesky(h).to(weight.dtype)
    alive = a.diagonal() > 0
    x = weight * alive
    sweep = sweep_fused if x.is_cuda and x.dtype == torch.float32 and has_kernel(pattern) else sweep_by_leaves
    x, kept = sweep(x, u, pattern)
    return x, (kept & alive.unsqueeze(1)).T.contiguous(), record


def has_kernel(pattern: Pattern) -> bool:
    """Whether ``sweep_fused`` knows a pattern."""
    return type(pattern) is Unstructured or (type(pattern) is NM and pattern.m <= SPAN)


def sweep_fused(x: Tensor, u: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """The sweep by the kernel for blocks of columns; for n:m nothing waits for the host.

    Args:
        x: W [out, in] float32, overwritten.
        u: U [in, in].
        pattern: one with a kernel.

    Returns:
        X [out, in], and the mask transposed, [in, out].
    """
    x, u = x.contiguous(), u.contiguous()
    rows, columns = x.shape
    kept = torch.empty(columns, rows, dtype=torch.bool, device=x.device)
    block = BLOCK // pattern.m * pattern.m if isinstance(pattern, NM) else BLOCK
    pivots = u.diagonal().square()
    bits = torch.empty(rows, -(-columns // SPAN), dtype=torch.int32, device=x.device)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        error = torch.empty(stop - start, rows, dtype=x.dtype, device=x.device)
        if isinstance(pattern, NM):
            backend.block_sweep(x, u, error, kept[start:stop], start, n=pattern.n, m=pattern.m)
        else:
            mask = pattern.project(x[:, start:stop].square() / pivots[start:stop])
            bits[:, start // SPAN : -(-stop // SPAN)] = pack_bits(mask)
            backend.block_sweep(x, u, error, kept[start:stop], start, bits)
        x[:, stop:].addmm_(error.T, u[start:stop, stop:], alpha=-1)
    return x, kept


def sweep_by_leaves(x: Tensor, u: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """The sweep by PyTorch's operations, for any pattern. Args and result as ``sweep_fused``."""
    x = x.T.contiguous()  # [in, out]: a column of W is contiguous
    error, kept = torch.zeros_like(x), torch.ones_like(x, dtype=torch.bool)
    if isinstance(pattern, NM):  # leaves and blocks of whole groups
        group = step = pattern.m
        leaf = max(LEAF // group, 1) * group
        block = max(BLOCK // leaf, 1) * leaf
    else:
        group, step, leaf, block = BLOCK, LEAF, LEAF, BLOCK
    pivots, columns, errors = u.diagonal(), x.unbind(0), error.unbind(0)
    squares, divisors, u = pivots.square().unsqueeze(1), pivots.tolist(), u.T.contiguous()

    def spread(begin: int, end: int, stop: int) -> None:
        """Take the errors of columns begin to end out of those from there to stop."""
        if end < stop:
            x[end:stop].addmm_(u[end:stop, begin:end], error[begin:end], alpha=-1)

    for first in range(0, len(x), block):
        last = min(first + block, len(x))
        for begin in range(first, last, leaf):
            end = min(begin + leaf, last)
            for at in range(begin, end, step):  # within these the mask does not change
                if at % group == 0:
                    chosen = slice(at, at + group)
                    kept[chosen] = pattern.project((x[chosen].square() / squares[chosen]).T).T
                until = min(at + step, end)
                removed = (~kept[at:until]).to(x.dtype)
                for j, rate in zip(range(at, until), removed.unbind(0), strict=True):
                    torch.mul(columns[j], rate, out=errors[j]).div_(divisors[j])
                    x[j + 1 : end].addr_(u[j + 1 : end, j], errors[j], alpha=-1)
            x[begin:end].mul_(kept[begin:end])
            spread(begin, end, last)
        spread(first, last, len(x))
    return x.T.contiguous(), kept
