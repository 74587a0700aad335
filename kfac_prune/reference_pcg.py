"""Preconditioned conjugate gradients apart from the product with H: the twin of ``kernels/pcg.py``.

All scalars of the iterations are rows of a log, and after a row that says that the loop is over nothing changes. So the
log may lie on a GPU, beside the vectors, while the host queues iterations and looks at it only now and then: what it
finds is what it had found by looking every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kfac_prune.reference import check_tensor

#: So many iterations together must lower the objective by more than ``tolerance`` of it, or they are the last.
WINDOW = 5
#: Weights whose products are summed in the vectors' dtype; the sums of such parts are added in float64.
PART = 1 << 17


class Row(NamedTuple):
    """The state after an iteration.

    Attributes:
        rz: ⟨R, Z⟩, the squared norm of the gradient on the kept weights, weighted by M⁻¹.
        loss: the objective.
        decrease: by how much the iteration lowered it.
        iterations: so far.
        running: 1 if another one follows, 0 if the loop is over.
    """

    rz: float
    loss: float
    decrease: float
    iterations: float
    running: float


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
    """One step of conjugate gradients on the kept weights (Hestenes & Stiefel 1952; Saad 2003, algorithm 9.1).

    ``α = ⟨R, Z⟩ / ⟨P, HP⟩``, ``X ← X + α P``, ``B ← B − α HP``, ``Z ← M⁻¹ B``, ``P ← Z + (⟨B, Z⟩ / ⟨R, Z⟩) P``. The
    negative gradient B is not masked; M⁻¹ is zero on removed weights, so that ``⟨B, Z⟩`` is the next ⟨R, Z⟩ of the
    masked residual R. The objective falls by ``½ α ⟨R, Z⟩``.

    Row ``iteration`` of the log is written from the rows before it. It says to go on unless ⟨P, HP⟩ or the next ⟨R, Z⟩
    is not above 0, or the last five iterations lowered the objective by at most ``tolerance`` of it. If the row before
    says that the loop is over, or ⟨P, HP⟩ is not above 0, nothing but the log changes.

    Args:
        x: X [out, in], float32 or float64, updated in place.
        gradient: B = H(W − X) [out, in], updated in place.
        direction: P [out, in], zero on removed weights, updated in place.
        z: Z [out, in], overwritten, whatever it held.
        curved: H P [out, in], read.
        inverse: M⁻¹ [out, in], read: 1 / diag(H) on kept weights, 0 on removed ones.
        log: [more than iteration, 5] float64, its rows as ``Row``; row 0 is the start's.
        iteration: from 1.
        tolerance: fraction of the objective.

    All [out, in] are contiguous, of one dtype, on one device with the log, and none overlaps another.

    Raises:
        ValueError: an argument is not as described.
    """
    check_pcg_step(x, gradient, direction, z, curved, inverse, log, iteration)
    rows = [Row(*row) for row in log[max(iteration - WINDOW + 1, 0) : iteration].tolist()]
    row = advance(x, gradient, direction, z, curved, inverse, rows, tolerance)
    log[iteration].copy_(log.new_tensor(row))


def advance(
    x: Tensor,
    gradient: Tensor,
    direction: Tensor,
    z: Tensor,
    curved: Tensor,
    inverse: Tensor,
    rows: Sequence[Row],
    tolerance: float,
) -> Row:
    """``pcg_step`` with the log on the host: takes the rows so far, of which it needs the last four; returns the next.

    It allocates nothing, and checks nothing.
    """
    before = rows[-1]
    energy = _inner(direction, curved) if before.running else 0.0
    if not energy > 0:  # or the direction is below the smallest number of the dtype
        return before._replace(decrease=0.0, running=0.0)
    step = before.rz / energy
    x.add_(direction, alpha=step)
    gradient.add_(curved, alpha=-step)
    torch.mul(gradient, inverse, out=z)
    rz = _inner(gradient, z)
    torch.add(z, direction, alpha=rz / before.rz, out=direction)
    decrease = 0.5 * step * before.rz
    loss, iterations = before.loss - decrease, before.iterations + 1
    lately = decrease + sum(row.decrease for row in rows[1 - WINDOW :])
    settled = iterations >= WINDOW and lately <= tolerance * loss
    return Row(rz, loss, decrease, iterations, float(rz > 0 and not settled))


def check_pcg_step(
    x: Tensor,
    gradient: Tensor,
    direction: Tensor,
    z: Tensor,
    curved: Tensor,
    inverse: Tensor,
    log: Tensor,
    iteration: int,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64),
) -> None:
    """Raise ValueError unless the arguments are as ``pcg_step`` describes them (overlap is not looked for)."""
    name = "pcg_step"
    if x.dim() != 2 or x.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; {name} needs {wanted} [out, in]")
    vectors = {"x": x, "gradient": gradient, "direction": direction, "z": z, "curved": curved, "inverse": inverse}
    for argument, tensor in vectors.items():
        check_tensor(name, argument, tensor, x.shape, x.device, dtype=x.dtype)
    check_tensor(name, "log", log, (*log.shape[:1], len(Row._fields)), x.device, dtype=torch.float64)
    if not 1 <= iteration < len(log):
        raise ValueError(f"iteration is {iteration}; the log has rows for 1 to {len(log) - 1}")


def _inner(a: Tensor, b: Tensor) -> float:
    """⟨a, b⟩ in two stages."""
    a, b = a.view(-1), b.view(-1)
    if a.numel() <= PART:
        return float(torch.dot(a, b))
    return sum(float(torch.dot(p, q)) for p, q in zip(a.split(PART), b.split(PART), strict=True))
