"""The exact k-th largest score by a radix histogram over the bit pattern: three passes over memory, nothing stored.

A float32 maps to an unsigned key of the same order; the passes find its upper 11, middle 11 and lower 10 bits. Scores
that are functions of weights are formed on the fly in every pass. Counts are sums of integers, so the order of the
atomic additions does not matter. The twins are of the same names in ``kfac_prune.reference``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kfac_prune.reference import check_dual, check_plain, check_scaled


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


#: (fewest scores, configuration), largest first. A tile of 4096 spreads the clearing of 2048 bins in shared memory over
#: two scores a bin; 528 programs are four per multiprocessor of an H100.
CONFIGS = ((1 << 19, Config(4096, 528, 8)), (0, Config(1024, 528, 8)))
#: (lowest bit, number of bits) of the digit that each pass counts.
PASSES = ((21, 11), (10, 11), (0, 10))
BINS = 2048
#: Columns of a tile where every column has a scale.
COLUMNS = 128


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
    other_ptr,
    counts_ptr,
    state_ptr,
    rho,
    n_scores,
    n_cols,
    row_stride,
    tiles,
    FORM: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLS: tl.constexpr,
):
    """Add to counts [2**BITS] int64 the digits of the scores whose higher bits are those found so far (state[0])."""
    BINS: tl.constexpr = 1 << BITS
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    if FORM == "scaled":
        column = tl.program_id(1).to(tl.int64) * COLS + lane % COLS
        scale = tl.load(other_ptr + column, mask=column < n_cols, other=1.0)
    if SHIFT + BITS < 32:
        prefix = tl.load(state_ptr).to(tl.uint32)
    total = tl.zeros([BINS], tl.int32)
    for tile in range(tiles):
        if FORM == "scaled":  # n_scores counts rows
            row = (program * tiles + tile) * (BLOCK // COLS) + lane // COLS
            inside = (row < n_scores) & (column < n_cols)
            x = tl.load(x_ptr + row * row_stride + column, mask=inside, other=0.0)
            score = tl.div_rn(x * x, scale)
        else:
            offsets = (program * tiles + tile) * BLOCK + lane
            inside = offsets < n_scores
            score = tl.load(x_ptr + offsets, mask=inside, other=0.0)
            if FORM == "dual":
                y = score + tl.div_rn(tl.load(other_ptr + offsets, mask=inside, other=0.0), rho)
                score = y * y
        key = sort_key(score)
        if SHIFT + BITS < 32:
            inside = inside & ((key >> (SHIFT + BITS)) == prefix)
        digit = ((key >> SHIFT) & (BINS - 1)).to(tl.int32)
        total += tl.histogram(digit, BINS, mask=inside)
    tl.atomic_add(counts_ptr + tl.arange(0, BINS), total.to(tl.int64), mask=total > 0, sem="relaxed")


@triton.jit(do_not_specialize=["k"])
def choose_kernel(counts_ptr, state_ptr, result_ptr, k, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """The bin that holds the k-th largest, by one program: its digit joins state[0], its rank in the bin is state[1].

    Clears the counts for the next pass; the last pass writes the score.
    """
    BINS: tl.constexpr = 1 << BITS
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


class _Source(NamedTuple):
    """Scores of one tensor: plain, dual or scaled; what they are made of; rows, columns and row stride if scaled."""

    form: str
    x: Tensor
    other: Tensor
    rho: float = 1.0
    rows: int = 0
    columns: int = 0
    row_stride: int = 0


def _find(sources: Sequence[_Source], k: int) -> Tensor:
    device = sources[0].x.device
    counts = torch.zeros(BINS, dtype=torch.int64, device=device)
    state = torch.empty(2, dtype=torch.int64, device=device)
    result = torch.empty((), dtype=torch.float32, device=device)
    with torch.cuda.device_of(counts):
        for shift, bits in PASSES:
            for source in sources:
                if source.x.numel():
                    _count(source, counts, state, shift, bits)
            choose_kernel[(1,)](counts, state, result, k, SHIFT=shift, BITS=bits, num_warps=8, enable_fp_fusion=False)
    return result


def _count(source: _Source, counts: Tensor, state: Tensor, shift: int, bits: int) -> None:
    config = next(config for fewest, config in CONFIGS if source.x.numel() >= fewest)
    scaled = source.form == "scaled"
    length, step = (source.rows, config.block // COLUMNS) if scaled else (source.x.numel(), config.block)
    strips = triton.cdiv(source.columns, COLUMNS) if scaled else 1
    tiles = triton.cdiv(triton.cdiv(length, step), max(config.programs // strips, 1))
    histogram_kernel[(triton.cdiv(triton.cdiv(length, step), tiles), strips)](
        source.x,
        source.other,
        counts,
        state,
        source.rho,
        length,
        source.columns,
        source.row_stride,
        tiles,
        FORM=source.form,
        SHIFT=shift,
        BITS=bits,
        BLOCK=config.block,
        COLS=COLUMNS,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )


def kth_largest(scores: Sequence[Tensor], k: int) -> Tensor:
    """Arguments and result as ``kfac_prune.reference.kth_largest``, on a GPU."""
    check_plain(scores, k)
    return _find([_Source("plain", part, part) for part in scores], k)


def kth_largest_dual(x: Tensor, dual: Tensor, rho: float, k: int) -> Tensor:
    """Arguments and result as ``kfac_prune.reference.kth_largest_dual``, on a GPU."""
    check_dual(x, dual, rho, k)
    return _find([_Source("dual", x, dual, rho)], k)


def kth_largest_scaled(weights: Sequence[Tensor], scales: Sequence[Tensor], k: int) -> Tensor:
    """Arguments and result as ``kfac_prune.reference.kth_largest_scaled``, on a GPU."""
    check_scaled(weights, scales, k)
    parts = zip(weights, scales, strict=True)
    return _find([_Source("scaled", w, s, 1.0, w.shape[0], w.shape[1], w.stride(0)) for w, s in parts], k)
