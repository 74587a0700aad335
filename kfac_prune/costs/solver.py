"""What selecting masks and solving for weights takes, per layer: the operations of ``obs`` and ``plan``, counted."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kfac_prune.config import parse_pattern
from kfac_prune.costs.dry_run import Matrix
from kfac_prune.costs.work import Call, Factorisation, Precision, Product, Rank, Work
from kfac_prune.curves import CURVE_POINTS, sampled


@dataclass(frozen=True)
class Iterations:
    """Of one solve, on average over the layers of the reference models.

    Attributes:
        admm: iterations of the selection.
        factorings: of its preconditioner.
        cg: iterations of the compensation.
    """

    admm: float
    factorings: float
    cg: float


#: At 50 %, by the fast schedule (also averaged over the points of a curve) and the thorough one; at n:m.
QUICK = Iterations(admm=19, factorings=2.0, cg=8.5)
SLOW = Iterations(admm=33, factorings=2.2, cg=20)
SLOW_NM = Iterations(admm=33, factorings=2.6, cg=19)
#: Passes over [out, in] in float32 (two operands and a result) and operations of an iteration.
ADMM_PASSES, ADMM_CALLS = 22, 60
CG_PASSES, CG_CALLS = 6, 30
#: Passes of the projection onto n:m, per weight in a group.
NM_PASSES = 2


def curve_work(matrix: Matrix) -> Work:
    """The points of a layer's loss curve: its single saliencies, and a part of it solved under one operator."""
    rows, columns = matrix.shape
    part = replace(matrix, shape=(sampled(rows), sampled(columns)))
    one = select_work(part, "kfac", None, QUICK) + compensate_work(part, "kfac", QUICK)
    work = operator_work(matrix, "kfac") + equilibrate_work(matrix, "kfac") + equilibrate_work(part, "kfac")
    work.add(Rank(matrix.weights))
    return work + one * len(CURVE_POINTS)


def solve_work(matrix: Matrix, method: str, pattern: str, iterations: Iterations, *, known: bool = False) -> Work:
    """One layer pruned by a method, and what that is predicted to cost under the damped G ⊗ A.

    Args:
        matrix: to prune.
        method: to prune by.
        pattern: n:m, or "unstructured".
        iterations: of the solver.
        known: the factors were damped and factorised before.
    """
    work = pair_work(matrix, "kfac", "float32")
    if not known:
        work += operator_work(matrix, "kfac")
    if method in ("kfac", "layerwise"):
        groups = parse_pattern(pattern)
        work += select_work(matrix, method, groups, iterations) + compensate_work(matrix, method, iterations)
        if not known:
            work += equilibrate_work(matrix, method)
        if method != "kfac":
            work += operator_work(matrix, method)
    elif method == "sparsegpt":
        rows, columns = matrix.shape
        work.add(Factorisation("float64", columns, inverse=True))
        work.add(Product("float32", rows, columns, columns), 0.5)  # each block updates those after it
        work.add(Call(), 8 * columns)
        work.move(12 * rows * 16, 2 * columns)
    else:
        work.add(Rank(matrix.weights))
    work.move(12 * matrix.weights, 12)
    work.add(Call(), 60)
    return work


def operator_work(matrix: Matrix, method: str) -> Work:
    """Damping: is each factor definite, in float64."""
    return _factored(matrix, method, inverse=False, passes=5)


def equilibrate_work(matrix: Matrix, method: str) -> Work:
    """The diagonals of the inverses, in float64, and the scaled factors."""
    return _factored(matrix, method, inverse=True, passes=4)


def _factored(matrix: Matrix, method: str, *, inverse: bool, passes: int) -> Work:
    """Every factor once, in float64, and so many passes over it."""
    work = Work()
    for width in _factors(matrix, method):
        work.add(Factorisation("float64", width, inverse=inverse))
        work.move(12 * width**2, passes)
        work.add(Call(), 20)
    return work


def select_work(matrix: Matrix, method: str, groups: tuple[int, int] | None, iterations: Iterations) -> Work:
    """ADMM: per iteration three products, of which two are on the cheaper side, and a projection."""
    rows, columns = matrix.shape
    work = Work()
    work.add(Product("approximate", rows, columns, columns), iterations.admm * (1 if rows <= columns else 2))
    if method != "layerwise":
        work.add(Product("approximate", rows, rows, columns), iterations.admm * (2 if rows <= columns else 1))
    work.move(12 * matrix.weights, ADMM_PASSES * iterations.admm)
    work.add(Call(), ADMM_CALLS * iterations.admm)
    if groups is None:
        work.add(Rank(matrix.weights), iterations.admm)
    else:
        work.move(12 * matrix.weights, NM_PASSES * groups[1] * iterations.admm)
    for width in _factors(matrix, method):
        work.add(Factorisation("float32", width, inverse=True), iterations.factorings)
        work.move(12 * width**2, 2 * iterations.factorings)
    return work


def compensate_work(matrix: Matrix, method: str, iterations: Iterations) -> Work:
    """Conjugate gradients: approximate products, and exact ones at the beginning and the end."""
    work = pair_work(matrix, method, "approximate") * iterations.cg + pair_work(matrix, method, "float32") * 2
    work.move(12 * matrix.weights, CG_PASSES * iterations.cg + 20)
    work.add(Call(), CG_CALLS * iterations.cg + 40)
    return work


def pair_work(matrix: Matrix, method: str, precision: Precision) -> Work:
    """G X A; with G = I half of it."""
    rows, columns = matrix.shape
    work = Work({Product(precision, rows, columns, columns): 1})
    if method != "layerwise":
        work.add(Product(precision, rows, rows, columns))
    return work


def workspace_bytes(matrix: Matrix) -> int:
    """The most that solving a layer holds beyond its factors: of [out, in] and of the factors' size."""
    squares = sum(width**2 for width in matrix.shape)
    largest = max(matrix.shape) ** 2
    return 4 * 14 * matrix.weights + 4 * 4 * squares + 8 * 3 * largest


def _factors(matrix: Matrix, method: str) -> tuple[int, ...]:
    """Widths of the factors that a method has."""
    return matrix.shape[1:] if method == "layerwise" else matrix.shape
