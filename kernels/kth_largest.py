"""The exact k-th largest score by a radix histogram over the bit pattern: four passes over memory, nothing stored.

A float32 maps to an unsigned key of the same order; every pass finds eight of its bits, from the top. Scores of ADMM
are formed on the fly in every pass. Counts are sums of integers, so the order of the
atomic additions does not matter. The twins are of the same names in ``kfac_prune.reference``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kfac_prune.reference import check_dual, check_plain


class Config(NamedTuple):
    """How a launch is cut.

    Attributes:
        block: scores per tile, a power of two.
        programs: at most this many; each counts several tiles before it adds to the common histogram.
        num_warps: per program.
    """

    block: int
    programs: int
    num_warps: int


#: (fewest scores, configuration), largest first. 528 programs are four per multiprocessor of an H100.
CONFIGS = ((1 << 19, Config(4096, 528, 8)), (0, Config(1024, 528, 8)))
#: Bits of the digit that a pass counts, and the lowest of them in each pass. Three passes of 11 bits read a quarter
#: less, but triton 3.6 unrolls a histogram of 2048 bins into three times the instructions and twice the registers.
BITS = tl.constexpr(8)
BINS = tl.constexpr(1 << 8)
SHIFTS = (24, 16, 8, 0)


@triton.jit
def sort_key(score):
    """The uint32 in the order of the float32: -0 equals +0, and every NaN comes above infinity."""
    bits = score.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, ~bits, bits ^ -2147483648)
    key = tl.where(score == 0.0, -2147483648, key)
    return tl.where(score != score, -1, key).to(tl.uint32, bitcast=True)


@triton.jit
def histogram_kernel(
    x_ptr,
    dual_ptr,
    counts_ptr,
    state_ptr,
    rho,
    n_scores,
    tiles,
    DUAL: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add to counts [BINS] int64 the digits of the scores whose higher bits are those found so far (state[0])."""
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    if SHIFT + BITS < 32:
        prefix = tl.load(state_ptr).to(tl.uint32)
    total = tl.zeros([BINS], tl.int32)
    for tile in range(tiles):
        offsets = (program * tiles + tile) * BLOCK + lane
        inside = offsets < n_scores
        score = tl.load(x_ptr + offsets, mask=inside, other=0.0)
        if DUAL:
            y = score + tl.div_rn(tl.load(dual_ptr + offsets, mask=inside, other=0.0), rho)
            score = y * y
        key = sort_key(score)
        if SHIFT + BITS < 32:
            inside = inside & ((key >> (SHIFT + BITS)) == prefix)
        digit = ((key >> SHIFT) & (BINS - 1)).to(tl.int32)
        total += tl.histogram(digit, BINS, mask=inside)
    tl.atomic_add(counts_ptr + tl.arange(0, BINS), total.to(tl.int64), mask=total > 0, sem="relaxed")


@triton.jit(do_not_specialize=["k"])
def choose_kernel(counts_ptr, state_ptr, result_ptr, k, SHIFT: tl.constexpr):
    """The bin that holds the k-th largest, by one program: its digit joins state[0], its rank in the bin is state[1].

    Clears the counts for the next pass; the last pass writes the score.
    """
    bins = tl.arange(0, BINS)
    counts = tl.load(counts_ptr + bins)
    if SHIFT + BITS < 32:
        prefix = tl.load(state_ptr)
        rank = tl.load(state_ptr + 1)
    else:
        prefix = tl.zeros([], tl.int64)
        rank = prefix + k
    from_top = tl.cumsum(counts, axis=0, reverse=True)
    chosen = tl.sum((from_top >= rank).to(tl.int32), axis=0) - 1
    rank -= tl.sum(tl.where(bins > chosen, counts, 0), axis=0)
    prefix = (prefix << BITS) | chosen
    if SHIFT == 0:
        key = prefix.to(tl.uint32).to(tl.int32, bitcast=True)
        bits = tl.where(key < 0, key ^ -2147483648, ~key)
        tl.store(result_ptr, bits.to(tl.float32, bitcast=True))
    else:
        tl.store(state_ptr, prefix)
        tl.store(state_ptr + 1, rank)
        tl.store(counts_ptr + bins, tl.zeros([BINS], tl.int64))


def _find(sources: Sequence[Tensor], k: int, dual: Tensor | None = None, rho: float = 1.0) -> Tensor:
    """The k-th largest entry, or with a dual of the one source the k-th largest of ``(x + dual / rho)²``."""
    device = sources[0].device
    counts = torch.zeros(BINS.value, dtype=torch.int64, device=device)
    state = torch.empty(2, dtype=torch.int64, device=device)
    result = torch.empty((), dtype=torch.float32, device=device)
    with torch.cuda.device_of(counts):
        for shift in SHIFTS:
            for x in sources:
                if x.numel():
                    _count(x, dual, rho, counts, state, shift)
            choose_kernel[(1,)](counts, state, result, k, SHIFT=shift, num_warps=8, enable_fp_fusion=False)
    return result


def _count(x: Tensor, dual: Tensor | None, rho: float, counts: Tensor, state: Tensor, shift: int) -> None:
    config = next(config for fewest, config in CONFIGS if x.numel() >= fewest)
    tiles = triton.cdiv(triton.cdiv(x.numel(), config.block), config.programs)
    histogram_kernel[(triton.cdiv(x.numel(), config.block * tiles),)](
        x,
        x if dual is None else dual,
        counts,
        state,
        rho,
        x.numel(),
        tiles,
        DUAL=dual is not None,
        SHIFT=shift,
        BLOCK=config.block,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )


def kth_largest(scores: Sequence[Tensor], k: int) -> Tensor:
    """Arguments and result as ``kfac_prune.reference.kth_largest``, on a GPU."""
    check_plain(scores, k)
    return _find(scores, k)


def kth_largest_dual(x: Tensor, dual: Tensor, rho: float, k: int) -> Tensor:
    """Arguments and result as ``kfac_prune.reference.kth_largest_dual``, on a GPU."""
    check_dual(x, dual, rho, k)
    return _find([x], k, dual, rho)
