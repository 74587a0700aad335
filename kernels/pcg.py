"""An iteration of preconditioned conjugate gradients in three passes over memory: 48 bytes a weight.

The twin is ``kfac_prune.reference_pcg.pcg_step``. A pass per sum that the next one needs: ⟨P, HP⟩; then the gradient,
Z and ⟨R, Z⟩; then X and P. Sums have two stages and no atomics: a program leaves one number, and every program of the
next pass adds up all of them, each in the same order, so that a result depends on the shape alone. Step and stopping
rule are computed where they are used and never reach the host.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kfac_prune import reference_pcg
from kfac_prune.reference_pcg import Row, check_pcg_step

RZ, LOSS, DECREASE, ITERATIONS, RUNNING = (tl.constexpr(column) for column in range(len(Row._fields)))
COLUMNS, WINDOW = tl.constexpr(len(Row._fields)), tl.constexpr(reference_pcg.WINDOW)


class Config(NamedTuple):
    """How a launch is cut.

    Attributes:
        block: weights per tile, a power of two.
        programs: at most this many; each takes several tiles before it leaves its part of a sum.
        num_warps: per program.
    """

    block: int
    programs: int
    num_warps: int


#: (fewest weights, configuration), largest first. Four weights a thread are one 16-byte access of float32; 528 programs
#: are four per multiprocessor of an H100, and few enough for every program to add up the parts of all.
CONFIGS = ((1 << 19, Config(1024, 528, 8)), (0, Config(512, 256, 4)))


@triton.jit
def total_of(parts_ptr, programs, PARTS: tl.constexpr):
    """The sum of what the programs of a pass left, in float64."""
    lane = tl.arange(0, PARTS)
    return tl.sum(tl.load(parts_ptr + lane, mask=lane < programs, other=0.0).to(tl.float64), axis=0)


@triton.jit
def energy_kernel(direction_ptr, curved_ptr, energy_ptr, n_weights, tiles, BLOCK: tl.constexpr):
    """Parts of ⟨P, HP⟩: energy [programs]."""
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for tile in range(tiles):
        offsets = (program * tiles + tile) * BLOCK + tl.arange(0, BLOCK)
        inside = offsets < n_weights
        direction = tl.load(direction_ptr + offsets, mask=inside, other=0.0)
        total += direction * tl.load(curved_ptr + offsets, mask=inside, other=0.0)
    tl.store(energy_ptr + program, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["iteration", "programs"])
def gradient_kernel(
    gradient_ptr,
    z_ptr,
    curved_ptr,
    inverse_ptr,
    log_ptr,
    energy_ptr,
    rz_ptr,
    iteration,
    n_weights,
    tiles,
    programs,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """B and Z of the iteration, and parts of ⟨R, Z⟩: rz [programs]; nothing where the loop is over."""
    program = tl.program_id(0).to(tl.int64)
    energy = total_of(energy_ptr, programs, PARTS)
    before = log_ptr + (iteration - 1) * COLUMNS
    if (energy > 0) & (tl.load(before + RUNNING) > 0):
        step = (tl.load(before + RZ) / energy).to(tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for tile in range(tiles):
            offsets = (program * tiles + tile) * BLOCK + tl.arange(0, BLOCK)
            inside = offsets < n_weights
            curved = tl.load(curved_ptr + offsets, mask=inside, other=0.0)
            gradient = tl.load(gradient_ptr + offsets, mask=inside, other=0.0) - step * curved
            z = gradient * tl.load(inverse_ptr + offsets, mask=inside, other=0.0)
            tl.store(gradient_ptr + offsets, gradient, mask=inside)
            tl.store(z_ptr + offsets, z, mask=inside)
            total += gradient * z
        tl.store(rz_ptr + program, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["iteration", "programs"])
def direction_kernel(
    x_ptr,
    direction_ptr,
    z_ptr,
    log_ptr,
    energy_ptr,
    rz_ptr,
    iteration,
    tolerance,
    n_weights,
    tiles,
    programs,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """X and P of the iteration; the first program writes its row of the log, which no program of this pass reads."""
    program = tl.program_id(0).to(tl.int64)
    energy = total_of(energy_ptr, programs, PARTS)
    before = log_ptr + (iteration - 1) * COLUMNS
    row = log_ptr + iteration * COLUMNS
    previous = tl.load(before + RZ)
    loss = tl.load(before + LOSS)
    taken = tl.load(before + ITERATIONS)
    if (energy > 0) & (tl.load(before + RUNNING) > 0):
        rz = total_of(rz_ptr, programs, PARTS)
        length = previous / energy
        step = length.to(tl.float32)
        turn = (rz / previous).to(tl.float32)
        for tile in range(tiles):
            offsets = (program * tiles + tile) * BLOCK + tl.arange(0, BLOCK)
            inside = offsets < n_weights
            direction = tl.load(direction_ptr + offsets, mask=inside, other=0.0)
            x = tl.load(x_ptr + offsets, mask=inside, other=0.0)
            z = tl.load(z_ptr + offsets, mask=inside, other=0.0)
            tl.store(x_ptr + offsets, x + step * direction, mask=inside)
            tl.store(direction_ptr + offsets, z + turn * direction, mask=inside)
        if program == 0:
            decrease = 0.5 * length * previous
            after = loss - decrease
            back = 1 + tl.arange(0, 8)  # rows of the window before this one
            inside = (back < WINDOW) & (back < iteration)
            lately = decrease + tl.sum(tl.load(row - back * COLUMNS + DECREASE, mask=inside, other=0.0), axis=0)
            goes_on = (rz > 0) & ((iteration < WINDOW) | (lately > tolerance * after))
            tl.store(row + RZ, rz)
            tl.store(row + LOSS, after)
            tl.store(row + DECREASE, decrease)
            tl.store(row + ITERATIONS, taken + 1)
            tl.store(row + RUNNING, goes_on.to(tl.float64))
    else:
        if program == 0:
            zero = tl.zeros([], tl.float64)
            zero = tl.zeros([], tl.float64)
            tl.store(row + RZ, previous)
            tl.store(row + LOSS, loss)
            tl.store(row + DECREASE, zero)
            tl.store(row + ITERATIONS, taken)
            tl.store(row + RUNNING, zero)


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
    """Arguments and effects as ``kfac_prune.reference_pcg.pcg_step``, on a GPU, in float32 only."""
    check_pcg_step(x, gradient, direction, z, curved, inverse, log, iteration, (torch.float32,))
    n_weights = x.numel()
    config = next(config for fewest, config in CONFIGS if n_weights >= fewest)
    tiles = triton.cdiv(triton.cdiv(n_weights, config.block), config.programs)
    programs = max(triton.cdiv(n_weights, max(tiles, 1) * config.block), 1)  # one writes the log at least
    energy, rz = torch.empty(2, programs, dtype=torch.float32, device=x.device)
    parts = triton.next_power_of_2(config.programs)
    cut = {"BLOCK": config.block, "num_warps": config.num_warps, "enable_fp_fusion": True}
    with torch.cuda.device_of(x):
        energy_kernel[(programs,)](direction, curved, energy, n_weights, tiles, **cut)
        gradient_kernel[(programs,)](
            gradient, z, curved, inverse, log, energy, rz, iteration, n_weights, tiles, programs, PARTS=parts, **cut
        )
        direction_kernel[(programs,)](
            x, direction, z, log, energy, rz, iteration, tolerance, n_weights, tiles, programs, PARTS=parts, **cut
        )
