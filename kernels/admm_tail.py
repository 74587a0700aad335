"""The tail of an ADMM iteration in one pass over memory: 18 bytes a weight, where single PyTorch calls move 78.

The twins and oracles are ``kfac_prune.reference.admm_tail`` and ``admm_tail_nm``. Both sides round after every
operation: the division is IEEE's and no product is fused into a sum, so that a weight near the threshold falls on the
same side in both.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kfac_prune.reference import check_admm_tail, check_admm_tail_nm


class Config(NamedTuple):
    """How a launch is cut.

    Attributes:
        block: weights per program, a power of two.
        num_warps: per program.
    """

    block: int
    num_warps: int


#: (fewest weights, configuration), largest first. Four weights a thread are one 16-byte access of float32 and one word
#: of mask; with eight, the compiler carries them through shared memory between the two layouts. Below 2^19 weights the
#: large block would make fewer than four programs per multiprocessor.
CONFIGS = ((1 << 19, Config(block=1024, num_warps=8)), (0, Config(block=256, num_warps=2)))


@triton.jit
def admm_tail_kernel(
    x_ptr,
    dual_ptr,
    mask_ptr,
    z_ptr,
    churn_ptr,
    threshold_ptr,
    rho,
    n_weights,
    BLOCK: tl.constexpr,
):
    """One block of ``reference.admm_tail``; churn [programs] int32 receives the block's exchanged positions."""
    program = tl.program_id(0)
    offsets = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n_weights
    threshold = tl.load(threshold_ptr)
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0)
    dual = tl.load(dual_ptr + offsets, mask=inside, other=0.0)
    before = tl.load(mask_ptr + offsets, mask=inside, other=0) != 0
    y = x + tl.div_rn(dual, rho)
    kept = y * y > threshold
    z = y * kept.to(tl.float32)  # a product, not a choice: NaN stays visible
    tl.store(z_ptr + offsets, z, mask=inside)
    tl.store(dual_ptr + offsets, dual + rho * (x - z), mask=inside)
    tl.store(mask_ptr + offsets, kept.to(tl.uint8), mask=inside)
    tl.store(churn_ptr + program, tl.sum(((kept != before) & inside).to(tl.int32), axis=0))


def admm_tail(x: Tensor, dual: Tensor, mask: Tensor, z: Tensor, threshold: Tensor, rho: float) -> Tensor:
    """Arguments, effects and result as ``kfac_prune.reference.admm_tail``, on a GPU."""
    check_admm_tail(x, dual, mask, z, threshold, rho)
    n_weights = x.numel()
    config = next(config for fewest, config in CONFIGS if n_weights >= fewest)
    programs = triton.cdiv(n_weights, config.block)
    churn = torch.empty(programs, dtype=torch.int32, device=x.device)
    if programs:
        with torch.cuda.device_of(x):
            admm_tail_kernel[(programs,)](
                x,
                dual,
                mask.view(torch.uint8),
                z,
                churn,
                threshold,
                rho,
                n_weights,
                BLOCK=config.block,
                num_warps=config.num_warps,
                enable_fp_fusion=False,
            )
    return churn.sum()


@triton.jit
def admm_tail_nm_kernel(
    x_ptr,
    dual_ptr,
    mask_ptr,
    z_ptr,
    churn_ptr,
    rho,
    n_groups,
    n_cols,
    groups_per_row,
    M: tl.constexpr,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK / WIDTH groups of ``reference.admm_tail_nm``, each in WIDTH >= M lanes, a power of two.

    WHOLE: M divides n_cols.
    """
    program = tl.program_id(0).to(tl.int64)
    group = program * (BLOCK // WIDTH) + tl.arange(0, BLOCK // WIDTH)
    lane = tl.arange(0, WIDTH)[None, :]
    inside = (group < n_groups)[:, None] & (lane < M)
    if WHOLE:  # no group is cut short, so rows follow one another without a division to find them
        offsets = (group * M)[:, None] + lane
    else:
        row = group // groups_per_row
        column = ((group - row * groups_per_row) * M)[:, None] + lane
        inside = inside & (column < n_cols)
        offsets = (row * n_cols)[:, None] + column
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0)
    dual = tl.load(dual_ptr + offsets, mask=inside, other=0.0)
    before = tl.load(mask_ptr + offsets, mask=inside, other=0) != 0
    y = x + tl.div_rn(dual, rho)
    score = y * y
    left = tl.where(inside & (score == score), score, -1.0)  # scores not chosen yet; -1 where there is none
    kept = left < -1.0
    for _ in range(N):  # the largest that is left, at its first position
        largest = tl.max(left, axis=1, keep_dims=True)
        first = tl.min(tl.where(left == largest, lane, WIDTH), axis=1, keep_dims=True)
        chosen = (lane == first) & (left >= 0.0)
        kept = kept | chosen
        left = tl.where(chosen, -1.0, left)
    z = y * kept.to(tl.float32)  # a product, not a choice: NaN stays visible
    tl.store(z_ptr + offsets, z, mask=inside)
    tl.store(dual_ptr + offsets, dual + rho * (x - z), mask=inside)
    tl.store(mask_ptr + offsets, kept.to(tl.uint8), mask=inside)
    changed = ((kept != before) & inside).to(tl.int32)
    tl.store(churn_ptr + program, tl.sum(tl.sum(changed, axis=1), axis=0))


def admm_tail_nm(x: Tensor, dual: Tensor, mask: Tensor, z: Tensor, n: int, m: int, rho: float) -> Tensor:
    """Arguments, effects and result as ``kfac_prune.reference.admm_tail_nm``, on a GPU."""
    check_admm_tail_nm(x, dual, mask, z, n, m, rho)
    rows, columns = x.shape
    groups_per_row = triton.cdiv(columns, m)
    width = triton.next_power_of_2(m)
    config = next(config for fewest, config in CONFIGS if x.numel() >= fewest)
    block = max(config.block, width)
    programs = triton.cdiv(rows * groups_per_row * width, block)
    churn = torch.empty(programs, dtype=torch.int32, device=x.device)
    if programs:
        with torch.cuda.device_of(x):
            admm_tail_nm_kernel[(programs,)](
                x,
                dual,
                mask.view(torch.uint8),
                z,
                churn,
                rho,
                rows * groups_per_row,
                columns,
                groups_per_row,
                M=m,
                N=n,
                WIDTH=width,
                WHOLE=columns % m == 0,
                BLOCK=block,
                num_warps=config.num_warps,
                enable_fp_fusion=False,
            )
    return churn.sum()
