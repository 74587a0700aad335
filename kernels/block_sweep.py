"""The column sweep of SparseGPT and OBC over one block of columns that stays in registers.

The twin is ``kfac_prune.reference.block_sweep``. A warp owns whole rows of the tile, so a column is taken out of it by
shuffles; the loop over columns is rolled; the error is written transposed, which is what the product that brings the
later columns up to date reads fastest. Multiply and subtract are fused, so that a GPU's weights differ from the twin's
by rounding; in the interpreter they are equal.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kfac_prune.reference import BLOCK_COLUMNS, SPAN, check_block_sweep


class Config(NamedTuple):
    """How a launch is cut.

    Attributes:
        rows: of W per program, a power of two.
        num_warps: per program.
    """

    rows: int
    num_warps: int


#: (fewest rows of W, configuration), largest first. Rows are independent and columns wait for one another, so short
#: tiles that give a multiprocessor many warps hide the waiting. Tiles of 32 rows on 4 warps took up to 156 registers a
#: thread, and 16 rows on 4 warps spilled where 16 bytes do not divide the row stride.
CONFIGS = ((0, Config(rows=16, num_warps=8)),)


@triton.jit
def block_sweep_kernel(
    w_ptr,
    u_ptr,
    inverse_ptr,
    error_ptr,
    kept_ptr,
    bits_ptr,
    n_rows,
    width,
    w_row_stride,
    u_row_stride,
    bits_row_stride,
    N: tl.constexpr,
    SPAN: tl.constexpr,
    LANES: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """ROWS rows of ``reference.block_sweep``; which of SPAN columns stay is decided at once, as bits of a word.

    N = 0: the bits are given. inverse [width]: 1 / U_jj. LANES >= SPAN is a power of two. WIDE: the rows of a tile lie
    further apart than 32 bits count.
    """
    top = tl.program_id(0).to(tl.int64) * ROWS  # what all rows share stays a number; a row adds 32 bits if they suffice
    row = tl.arange(0, ROWS)[:, None]
    real = row < n_rows - top
    cols = tl.arange(0, COLS)[None, :]
    lane = tl.arange(0, LANES)[None, :]
    rows_ptr = w_ptr + top * w_row_stride + (row.to(tl.int64) if WIDE else row) * w_row_stride
    tile = tl.load(rows_ptr + cols, mask=real & (cols < width), other=0.0)
    stride = tl.zeros([], tl.int64) + u_row_stride
    height = tl.zeros([], tl.int64) + n_rows
    for start in range(0, width, SPAN):
        begin = tl.zeros([], tl.int32) + start  # a number to the compiler, a tensor to the interpreter
        column = begin + lane
        if N == 0:
            word = tl.load(bits_ptr + (top + row) * bits_row_stride + start // SPAN, mask=real, other=0)
        else:
            inside = (lane < SPAN) & (column < width)
            w = tl.gather(tile, tl.broadcast_to(tl.minimum(column, COLS - 1), (ROWS, LANES)), axis=1)
            diagonal = tl.load(u_ptr + column * (stride + 1), mask=inside, other=1.0)
            score = tl.div_rn(w * w, diagonal * diagonal)
            left = tl.where(inside & (score == score), score, -1.0)
            word = tl.zeros([ROWS, 1], tl.int32)
            for _ in range(N):  # the largest that is left, at its first position
                largest = tl.max(left, axis=1, keep_dims=True)
                first = tl.min(tl.where(left == largest, lane, LANES), axis=1, keep_dims=True)
                word = word | tl.where(largest >= 0.0, 1 << first, 0)
                left = tl.where(lane == first, -1.0, left)
        for i in range(SPAN):
            j = begin + i
            kept = ((word >> i) & 1) != 0
            u_row = u_ptr + stride * j
            factor = tl.load(inverse_ptr + j, mask=j < width, other=1.0)
            later = tl.load(u_row + cols, mask=(cols > j) & (cols < width), other=0.0)
            at = tl.zeros([ROWS, 1], tl.int32) + j
            value = tl.gather(tile, tl.minimum(at, COLS - 1), axis=1)
            error = tl.where(kept, 0.0, value * factor)
            tile = tl.where((cols == j) & (kept == 0), 0.0, tile - error * later)
            place = top + height * j
            tl.store(error_ptr + place + row, error, mask=real & (at < width))
            tl.store(kept_ptr + place + row, kept.to(tl.uint8), mask=real & (at < width))
    tl.store(rows_ptr + cols, tile, mask=real & (cols < width))


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
    """Arguments and effects as ``kfac_prune.reference.block_sweep``, on a GPU."""
    check_block_sweep(weight, u, error, kept, start, bits, n, m)
    rows, width = weight.shape[0], error.shape[0]
    if not rows or not width:
        return
    config = next(config for fewest, config in CONFIGS if rows >= fewest)
    span = m if bits is None else SPAN
    with torch.cuda.device_of(weight):
        block_sweep_kernel[(triton.cdiv(rows, config.rows),)](
            weight[:, start:],
            u[start:, start:],
            u.diagonal()[start : start + width].reciprocal(),
            error,
            kept.view(torch.uint8),
            error if bits is None else bits[:, start // SPAN :],
            rows,
            width,
            weight.stride(0),
            u.stride(0),
            0 if bits is None else bits.stride(0),
            N=n,
            SPAN=span,
            LANES=triton.next_power_of_2(span),
            WIDE=config.rows * weight.stride(0) >= 1 << 31,
            ROWS=config.rows,
            COLS=BLOCK_COLUMNS,
            num_warps=config.num_warps,
            enable_fp_fusion=True,
        )
