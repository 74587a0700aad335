"""Compensation: the exact joint optimum of all kept weights, by preconditioned conjugate gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_prune import backend
from kfac_prune.linalg import approximate_products, exact_products
from kfac_prune.operators import Curvature
from kfac_prune.reference_pcg import Row, advance

#: Stop when the last five iterations together lowered the objective by less than this fraction of it.
TOLERANCE = 3e-4
#: Reached only where factors are of low rank, from few tokens, and hardly damped; 100 left such a layer with a third
#: more loss. Others stop long before.
MAX_ITERATIONS = 300
#: Iterations with approximate products, at most, before the residual is replaced by the true one.
ROUND = 20
#: (fewest weights, iterations), largest first: on a GPU the host asks so often whether the stop is reached. Iterations
#: queued beyond it change nothing; what they cost grows with the layer, what asking costs does not.
LOOK_EVERY = ((1 << 20, 1), (0, 5))

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
    approximately (see ``approximate_products``) in rounds, after each of which the residual is replaced by the true
    one. Where what they believed is more than the tolerance below the truth, exact ones follow, from where the round
    began if it has raised the objective.

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
    state = x, torch.empty_like(x), torch.zeros_like(x), torch.zeros_like(x)
    _, gradient, direction, z = state
    rows = [_renewed(weight, curvature, state, inverse, Row(0.0, 0.0, 0.0, 0, 0))]
    while approximate and rows[-1].running and len(rows) <= max_iterations:
        before, begin, at_most = x.clone(), rows[-1].loss, min(len(rows) - 1 + ROUND, max_iterations)
        with approximate_products():
            loop(curvature, state, inverse, rows, tolerance, at_most)
        end = rows[-1]
        rows[-1] = _renewed(weight, curvature, state, inverse, end)
        believable = 0 < end.loss and rows[-1].loss <= end.loss * (1 + tolerance)
        if not rows[-1].loss <= begin:
            x.copy_(before)
            rows[-1] = _renewed(weight, curvature, state, inverse, end)
        if believable and not end.running:
            break
        approximate = believable and len(rows) > at_most  # an approximate H may be indefinite, which ends a round
        if not approximate:  # a new beginning, which takes no settling from what was not so
            direction.copy_(z)
            rows = [row._replace(decrease=math.inf) for row in rows]
    else:
        with exact_products():
            loop(curvature, state, inverse, rows, tolerance, max_iterations)
    total = float(torch.sum(gradient * (gradient / diagonal)))  # a square alone may underflow
    return Compensation(
        weight=x,
        loss=max(0.5 * float(torch.sum((weight - x) * gradient)), 0.0),
        kkt=(rows[-1].rz / total) ** 0.5 if total > 0 else 0.0,
        iterations=len(rows) - 1,
    )


def _renewed(weight: Tensor, curvature: Curvature, state: Vectors, inverse: Tensor, row: Row) -> Row:
    """The row with what is true at X; the true negative gradient goes into the state, and its Z into the direction."""
    x, gradient, direction, z = state
    with exact_products():
        gradient.copy_(curvature.apply(weight - x))  # H(W − X), on every weight
    direction.sub_(z)
    torch.mul(gradient, inverse, out=z)
    direction.add_(z)
    rz, loss = float(torch.sum(gradient * z)), 0.5 * float(torch.sum((weight - x) * gradient))
    return row._replace(rz=rz, loss=loss, running=float(rz > 0))


def _watched(
    curvature: Curvature, state: Vectors, inverse: Tensor, rows: list[Row], tolerance: float, at_most: int
) -> None:
    """The loop on a CPU, which looks after every iteration; updates the state, appends a row for every one taken."""
    while rows[-1].running and len(rows) <= at_most:
        curved = curvature.apply(state[2]).contiguous()
        rows.append(advance(*state, curved, inverse, rows, tolerance))
    del rows[int(rows[-1].iterations) + 1 :]


def _queued(
    curvature: Curvature, state: Vectors, inverse: Tensor, rows: list[Row], tolerance: float, at_most: int
) -> None:
    """``_watched`` for a GPU: no iteration waits for the host."""
    done, running = len(rows) - 1, rows[-1].running
    log = inverse.new_empty(at_most + 1, len(Row._fields), dtype=torch.float64)
    log[: len(rows)] = log.new_tensor(rows)
    look_every = next(every for fewest, every in LOOK_EVERY if inverse.numel() >= fewest)
    while running > 0 and done < at_most:
        done += 1
        curved = curvature.apply(state[2]).contiguous()
        backend.pcg_step(*state, curved, inverse, log, done, tolerance)
        if done % look_every == 0 or done == at_most:
            running = float(log[done, -1])
    rows[:] = [Row(*row) for row in log[: done + 1].tolist()]
    del rows[int(rows[-1].iterations) + 1 :]
