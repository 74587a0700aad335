"""Compensation: the exact joint optimum of all kept weights, by preconditioned conjugate gradients."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_prune import backend
from kfac_prune.linalg import approximate_products
from kfac_prune.operators import Curvature
from kfac_prune.reference_pcg import Row, advance

#: Stop when the last five iterations together lowered the objective by less than this fraction of it.
TOLERANCE = 3e-4
MAX_ITERATIONS = 100
#: On a GPU the host asks this often whether the stop is reached; the iterations queued beyond it change nothing.
LOOK_EVERY = 5

#: X, the negative gradient, the direction and Z, each [out, in] and updated in place.
Vectors = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Compensation:
    """The compensated weights and how good they are.

    Attributes:
        weight: X [out, in], zero off the mask.
        loss: ½⟨X − W, H(X − W)⟩, nats per token under the Fisher.
        kkt: ‖P_F[H(X − W)]‖ / ‖H(X − W)‖ in the norm weighted by 1/diag(H): the share of the gradient that is left
            on the kept weights F; 0 is optimal.
        iterations: of conjugate gradients.
    """

    weight: Tensor
    loss: float
    kkt: float
    iterations: int


def compensate(
    weight: Tensor,
    curvature: Curvature,
    mask: Tensor,
    start: Tensor | None = None,
    *,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
) -> Compensation:
    """Minimise ``½⟨X − W, H(X − W)⟩`` over X that vanish off the mask.

    Conjugate gradients with the Jacobi preconditioner on the kept entries. The *unmasked* residual H(W − X) is carried
    along, so the objective and the gradient on removed weights cost no further product. The iterations multiply
    approximately (see ``approximate_products``) until the objective has settled; where what they believe is then more
    than the tolerance below the truth, exact ones follow.

    Args:
        weight: W [out, in].
        curvature: H, positive definite.
        mask: [out, in] bool, True = kept.
        start: [out, in], zero off the mask; None starts from the masked weights.
        tolerance: stop when five iterations lower the objective by less than this fraction.
        max_iterations: stop there in any case; the residual reached is reported.
    """
    x = (weight * mask if start is None else start * mask).contiguous()
    diagonal = curvature.diagonal()
    inverse = (mask / diagonal).contiguous()  # of the preconditioner, on the kept weights

    loop = _queued if x.is_cuda else _watched
    approximate = tolerance >= TOLERANCE
    state, begin = _begun(weight, curvature, x, inverse)
    with approximate_products() if approximate else nullcontext():
        end = loop(curvature, state, inverse, begin, tolerance, max_iterations)
    iterations, believed = int(end.iterations), end.loss
    if approximate:
        del state
        state, end = _begun(weight, curvature, x, inverse)
        if end.loss > believed * (1 + tolerance):
            end = loop(curvature, state, inverse, end, tolerance, max_iterations - iterations)
            iterations += int(end.iterations)
    total = float(torch.sum(state[1] * (state[1] / diagonal)))  # a square alone may underflow
    return Compensation(
        weight=x,
        loss=max(0.5 * float(torch.sum((weight - x) * state[1])), 0.0),
        kkt=(end.rz / total) ** 0.5 if total > 0 else 0.0,
        iterations=iterations,
    )


def _begun(weight: Tensor, curvature: Curvature, x: Tensor, inverse: Tensor) -> tuple[Vectors, Row]:
    """Vectors and log at a point X, with exact products."""
    gradient = curvature.apply(weight - x).contiguous()  # H(W − X), the negative gradient on every weight
    z = gradient * inverse
    rz, loss = float(torch.sum(gradient * z)), 0.5 * float(torch.sum((weight - x) * gradient))
    return (x, gradient, z.clone(), z), Row(rz, loss, 0.0, 0, rz > 0)


def _watched(
    curvature: Curvature, state: Vectors, inverse: Tensor, begin: Row, tolerance: float, max_iterations: int
) -> Row:
    """The loop on a CPU, which looks after every iteration; updates the state, returns the last row."""
    rows = [begin]
    while rows[-1].running and len(rows) <= max_iterations:
        curved = curvature.apply(state[2]).contiguous()
        rows.append(advance(*state, curved, inverse, rows, tolerance))
    return rows[-1]


def _queued(
    curvature: Curvature, state: Vectors, inverse: Tensor, begin: Row, tolerance: float, max_iterations: int
) -> Row:
    """``_watched`` for a GPU: no iteration waits for the host."""
    log = inverse.new_empty(max_iterations + 1, len(Row._fields), dtype=torch.float64)
    log[0] = log.new_tensor(begin)
    row, done = begin, 0
    while row.running and done < max_iterations:
        done += 1
        curved = curvature.apply(state[2]).contiguous()
        backend.pcg_step(*state, curved, inverse, log, done, tolerance)
        if done % LOOK_EVERY == 0 or done == max_iterations:
            row = Row(*log[done].tolist())
    return row
