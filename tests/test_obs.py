"""The Optimal Brain Surgeon's problem, against dense constrained solves and exhaustive search."""

import itertools
import math
import sys
from contextlib import contextmanager

import pytest
import torch
from oracles import (
    DTYPE_IDS,
    DTYPES,
    UNIT,
    assert_close,
    brute_force,
    constrained_minimum,
    eye,
    masks_n_of_m,
    masks_of_size,
    normal,
    quadratic,
    spd,
    tolerance,
)

from kfac_prune import linalg
from kfac_prune.curvature.factors import LayerFactors
from kfac_prune.obs import FAST, NM, THOROUGH, AdmmSchedule, Unstructured, compensate, saliency, select, solve
from kfac_prune.obs.compensate import MAX_ITERATIONS
from kfac_prune.obs.select import one_shot
from kfac_prune.operators import Damping, Dense, Diagonal, Kronecker, ScaledIdentity, quadratic_loss

CONDITION = 30.0  # of each factor, where weights are compared
SHAPES = [(1, 1), (1, 7), (5, 1), (7, 5), (4, 6)]
WIDE = [(13, 17), (24, 31), (31, 12)]
PATTERNS = [Unstructured(0.5), Unstructured(0.7), NM(2, 4)]
ODD = [*PATTERNS, NM(1, 2), NM(3, 7), Unstructured(0.9)]

MAKE = {
    "identity": lambda shape, seed, dtype: ScaledIdentity(torch.tensor(1.0, dtype=dtype), shape),
    "diagonal": lambda shape, seed, dtype: Diagonal(normal(*shape, seed=seed).exp().to(dtype)),
    "kronecker": lambda shape, seed, dtype: Kronecker(
        spd(shape[1], condition=CONDITION, seed=seed, dtype=dtype),
        spd(shape[0], condition=CONDITION, seed=seed + 1, dtype=dtype, largest=1e-3),
    ),
    "layerwise": lambda shape, seed, dtype: Kronecker(
        spd(shape[1], condition=CONDITION, seed=seed, dtype=dtype), None, out_features=shape[0]
    ),
    "dense": lambda shape, seed, dtype: Dense(
        spd(shape[0] * shape[1], condition=CONDITION**2, seed=seed, dtype=dtype), shape
    ),
}
COUPLED = ["kronecker", "layerwise", "dense"]

shapes = pytest.mark.parametrize("shape", SHAPES, ids="{0[0]}x{0[1]}".format)
wide = pytest.mark.parametrize("shape", WIDE, ids="{0[0]}x{0[1]}".format)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
all_curvatures = pytest.mark.parametrize("kind", MAKE)
coupled = pytest.mark.parametrize("kind", COUPLED)


def pattern_id(pattern):
    return f"{pattern.n}:{pattern.m}" if isinstance(pattern, NM) else f"{pattern.sparsity:.0%}"


patterns = pytest.mark.parametrize("pattern", PATTERNS, ids=pattern_id)


def ill_conditioned(shape, seed, condition=1e3):
    a = spd(shape[1], condition=condition, seed=seed)
    return Kronecker(a, spd(shape[0], condition=condition, seed=seed + 100)), normal(*shape, seed=seed + 200)


def random_mask(shape, seed, kept=0.5):
    """Random, with at least one weight kept and, where there are two, one removed."""
    order = normal(*shape, seed=seed).reshape(-1).argsort()
    mask = torch.zeros(order.numel(), dtype=torch.bool)
    mask[order[: max(int(kept * order.numel()), 1)]] = True
    return mask.reshape(shape)


def converged(weight, curvature, mask, start=None):
    """Compensated until the relative residual, not only the loss, is down to rounding."""
    exact = UNIT[weight.dtype] ** 2
    return compensate(weight, curvature, mask, start, tolerance=exact, max_iterations=2000)


def is_feasible(mask, pattern):
    if isinstance(pattern, NM):
        groups = [mask[:, i : i + pattern.m] for i in range(0, mask.shape[1], pattern.m)]
        return all(bool((g.sum(1) == min(pattern.n, g.shape[1])).all()) for g in groups)
    return int(mask.sum()) == max(mask.numel() - round(pattern.sparsity * mask.numel()), 1)


class TestSaliency:
    @dtypes
    @all_curvatures
    @shapes
    def test_is_the_cost_of_removing_one_weight_when_all_others_move(self, shape, kind, dtype):
        h, w = MAKE[kind](shape, 0, dtype), normal(*shape, seed=9, dtype=dtype)
        costs = torch.empty(shape, dtype=torch.float64)
        for q in itertools.product(*map(range, shape)):
            mask = torch.ones(shape, dtype=torch.bool)
            mask[q] = False
            costs[q] = constrained_minimum(h.to_dense(), w, mask)[1]
        assert_close(saliency(w, h), costs, condition=CONDITION**2, working=torch.float64)

    def test_identity_orders_by_magnitude(self):
        w = normal(7, 5, seed=1)
        scores = saliency(w, ScaledIdentity(torch.tensor(2.0, dtype=w.dtype), (7, 5)))
        assert torch.equal(scores.reshape(-1).argsort(), w.abs().reshape(-1).argsort())

    def test_diagonal_is_optimal_brain_damage(self):
        w, h = normal(7, 5, seed=1), normal(7, 5, seed=2).exp()
        assert_close(saliency(w, Diagonal(h)), h * w**2 / 2)

    def test_magnitude_pays_more_than_optimal_brain_damage(self):
        w = torch.tensor([[0.2, 0.3], [-1.0, 2.0]], dtype=torch.float64)
        truth = Diagonal(torch.tensor([[5.0, 1.0], [1.0, 0.5]], dtype=torch.float64))
        magnitude = solve(w, ScaledIdentity(w.new_ones(()), (2, 2)), Unstructured(0.25))
        damage = solve(w, truth, Unstructured(0.25))
        assert magnitude.mask.tolist() == [[False, True], [True, True]]
        assert damage.mask.tolist() == [[True, False], [True, True]]
        assert quadratic_loss(truth, magnitude.weight - w) == pytest.approx(0.10, rel=1e-12)
        assert damage.loss == pytest.approx(0.045, rel=1e-12)

    def test_optimal_brain_surgeon_pays_less_than_either(self):
        h = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
        w = torch.tensor([[1.0, 1.2]], dtype=torch.float64)
        surgeon = solve(w, Dense(h, (1, 2)), Unstructured(0.5))
        assert_close(surgeon.weight, torch.tensor([[0.0, 2.1]], dtype=torch.float64))
        assert surgeon.loss == pytest.approx(0.5 * (1 - 0.81))
        assert surgeon.loss < 0.25 * quadratic_loss(Dense(h, (1, 2)), surgeon.mask * w - w)


class TestSeparable:
    @dtypes
    @pytest.mark.parametrize("kind", ["identity", "diagonal"])
    @pytest.mark.parametrize("shape", [*SHAPES, (13, 17)], ids="{0[0]}x{0[1]}".format)
    @pytest.mark.parametrize("pattern", ODD, ids=pattern_id)
    def test_no_weight_moves(self, pattern, shape, kind, dtype):
        h, w = MAKE[kind](shape, 0, dtype), normal(*shape, seed=9, dtype=dtype)
        solution = solve(w, h, pattern)
        assert torch.equal(solution.weight, w * solution.mask)
        assert is_feasible(solution.mask, pattern)
        assert (solution.admm_iterations, solution.cg_iterations, solution.kkt) == (0, 0, 0.0)
        loss = torch.tensor(solution.loss, dtype=dtype)
        assert_close(loss, quadratic(h.to_dense(), solution.weight - w), size=w.numel())

    @pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9])
    def test_identity_keeps_the_largest_magnitudes(self, sparsity):
        w = normal(13, 17, seed=0)
        mask = solve(w, MAKE["identity"]((13, 17), 0, w.dtype), Unstructured(sparsity)).mask
        assert w[mask].abs().min() > w[~mask].abs().max()

    @pytest.mark.parametrize("kind", ["identity", "diagonal"])
    @pytest.mark.parametrize(
        ("shape", "pattern", "masks"),
        [
            ((2, 5), Unstructured(0.6), list(masks_of_size((2, 5), 4))),
            ((2, 6), NM(2, 4), list(masks_n_of_m((2, 6), 2, 4))),
        ],
        ids=["60%", "2:4"],
    )
    def test_is_the_optimum(self, shape, pattern, masks, kind):
        h, w = MAKE[kind](shape, 3, torch.float64), normal(*shape, seed=9)
        best, least = brute_force(h.to_dense(), w, masks)
        solution = solve(w, h, pattern)
        assert torch.equal(solution.mask, best)
        assert solution.loss == pytest.approx(least, rel=1e-12)


class TestCompensate:
    @dtypes
    @all_curvatures
    @shapes
    @pytest.mark.parametrize("start", ["cold", "warm", "zero"])
    def test_is_the_dense_constrained_minimum(self, start, shape, kind, dtype):
        h, w, mask = MAKE[kind](shape, 0, dtype), normal(*shape, seed=9, dtype=dtype), random_mask(shape, 8)
        begin = {"cold": None, "warm": normal(*shape, seed=7, dtype=dtype) * mask, "zero": torch.zeros_like(w)}[start]
        expected, least = constrained_minimum(h.to_dense(), w, mask)
        result = converged(w, h, mask, begin)
        assert not result.weight[~mask].any()
        assert_close(result.weight, expected, condition=CONDITION**2)
        assert_close(torch.tensor(result.loss, dtype=dtype), least, condition=CONDITION**2)

    @dtypes
    @coupled
    @wide
    @pytest.mark.parametrize("begin", ["cold", "warm"])
    def test_no_gradient_is_left_on_kept_weights(self, begin, shape, kind, dtype):
        shape = (6, 11) if kind == "dense" else shape
        h, w, mask = MAKE[kind](shape, 0, dtype), normal(*shape, seed=9, dtype=dtype), random_mask(shape, 8)
        start = None if begin == "cold" else normal(*shape, seed=7, dtype=dtype) * mask
        result = converged(w, h, mask, start)
        gradient = h.apply(result.weight - w)
        assert_close(gradient * mask + gradient.abs().max(), gradient.abs().max().expand(shape), condition=CONDITION)
        assert result.kkt <= tolerance(dtype, w.numel(), CONDITION)

    @dtypes
    @all_curvatures
    @wide
    @pytest.mark.parametrize("iterations", [0, 1, 7, 100])
    def test_loss_is_the_quadratic_at_its_weights(self, iterations, shape, kind, dtype):
        shape = (6, 11) if kind == "dense" else shape
        h, w, mask = MAKE[kind](shape, 0, dtype), normal(*shape, seed=9, dtype=dtype), random_mask(shape, 8)
        result = compensate(w, h, mask, max_iterations=iterations)
        assert result.iterations <= iterations
        loss = torch.tensor(result.loss, dtype=dtype)
        assert_close(loss, quadratic(h.to_dense(), result.weight - w), size=w.numel())

    @dtypes
    @coupled
    @pytest.mark.parametrize("begin", ["cold", "warm"])
    def test_loss_never_rises(self, begin, kind, dtype):
        h, w, mask = MAKE[kind]((6, 11), 0, dtype), normal(6, 11, seed=9, dtype=dtype), random_mask((6, 11), 8)
        start = w * mask if begin == "cold" else normal(6, 11, seed=7, dtype=dtype) * mask
        losses = [quadratic(h.to_dense(), start - w)]
        losses += [compensate(w, h, mask, start, tolerance=0.0, max_iterations=i).loss for i in range(1, 30)]
        slack = 1 + tolerance(dtype, w.numel())
        assert all(after <= before * slack for before, after in itertools.pairwise(losses))

    @pytest.mark.parametrize("seed", range(5))
    def test_default_tolerance_is_near_the_optimum(self, seed):
        h, w = ill_conditioned((13, 17), seed)
        selection = select(w, h, Unstructured(0.7))
        quick, exact = compensate(w, h, selection.mask, selection.start), converged(w, h, selection.mask)
        assert exact.loss <= quick.loss <= 1.01 * exact.loss

    def test_reports_the_weighted_gradient_that_is_left(self):
        h, w = ill_conditioned((7, 5), 0)
        mask = random_mask((7, 5), 8)
        result = compensate(w, h, mask, max_iterations=3)
        gradient = (h.to_dense() @ (result.weight - w).reshape(-1)).reshape(7, 5) / h.to_dense().diagonal().reshape(
            7, 5
        ).sqrt()
        assert result.iterations == 3
        assert result.kkt == pytest.approx(float(gradient[mask].norm() / gradient.norm()), rel=1e-9)

    @dtypes
    @coupled
    @shapes
    @pytest.mark.parametrize("survivor", [0, -1], ids=["first", "last"])
    def test_everything_but_one(self, survivor, shape, kind, dtype):
        h, w = MAKE[kind](shape, 0, dtype), normal(*shape, seed=9, dtype=dtype)
        mask = torch.zeros(w.numel(), dtype=torch.bool)
        mask[survivor] = True
        mask = mask.reshape(shape)
        expected, least = constrained_minimum(h.to_dense(), w, mask)
        result = converged(w, h, mask)
        assert_close(result.weight, expected)
        assert_close(torch.tensor(result.loss, dtype=dtype), least, size=w.numel())

    @dtypes
    @all_curvatures
    @shapes
    def test_everything_kept(self, shape, kind, dtype):
        h, w, mask = (
            MAKE[kind](shape, 0, dtype),
            normal(*shape, seed=9, dtype=dtype),
            torch.ones(shape, dtype=torch.bool),
        )
        result = compensate(w, h, mask)
        assert torch.equal(result.weight, w)
        assert (result.loss, result.kkt, result.iterations) == (0.0, 0.0, 0)

    @dtypes
    @pytest.mark.parametrize("kept", [0.5, 1.0], ids=["half", "all"])
    @pytest.mark.parametrize("condition", [1.0, 10.0, 100.0])
    def test_runs_past_the_smallest_numbers_and_stays_finite(self, condition, kept, dtype):
        a, g = (spd(n, condition=condition, seed=n, dtype=dtype) for n in (17, 13))
        h, w, mask = Kronecker(a, g), normal(13, 17, seed=9, dtype=dtype), random_mask((13, 17), 8, kept)
        result = compensate(w, h, mask, torch.zeros_like(w), tolerance=0.0, max_iterations=2000)
        expected, least = constrained_minimum(h.to_dense(), w, mask)
        assert math.isfinite(result.loss)
        assert math.isfinite(result.kkt)
        assert_close(result.weight, expected, condition=condition**2)
        assert result.loss == pytest.approx(least, rel=1e-3, abs=1e-3 * quadratic(h.to_dense(), w))

    def test_starts_where_it_is_told(self):
        h, w = ill_conditioned((7, 5), 0)
        mask, start = random_mask((7, 5), 8), normal(7, 5, seed=7)
        assert torch.equal(compensate(w, h, mask, max_iterations=0).weight, w * mask)
        assert torch.equal(compensate(w, h, mask, start, max_iterations=0).weight, start * mask)
        best = converged(w, h, mask).weight
        assert compensate(w, h, mask, best).iterations < compensate(w, h, mask).iterations

    def test_arguments_are_left_alone(self):
        h, w = ill_conditioned((7, 5), 0)
        mask, start = random_mask((7, 5), 8), normal(7, 5, seed=7)
        before = w.clone(), mask.clone(), start.clone()
        compensate(w, h, mask, start)
        solve(w, h, Unstructured(0.5))
        assert all(torch.equal(x, y) for x, y in zip((w, mask, start), before, strict=True))


@pytest.mark.parametrize("factor", [0.8, 1e-3, -1.0, math.nan], ids=str)
@pytest.mark.parametrize("loop", ["_watched", "_queued"])
def test_wrong_products_are_put_right(loop, factor, monkeypatch):
    """Where approximate products mislead, exact iterations follow, and the loss is the true one."""
    module, wrong = sys.modules["kfac_prune.obs.compensate"], []

    @contextmanager
    def approximate():
        wrong.append(True)
        yield
        wrong.pop()

    apply = Kronecker.apply
    monkeypatch.setattr(module, "_watched", getattr(module, loop))
    monkeypatch.setattr(module, "approximate_products", approximate)
    monkeypatch.setattr(Kronecker, "apply", lambda self, x: apply(self, x) * (factor if wrong else 1.0))
    h, w = ill_conditioned((12, 20), 0, condition=30)
    mask = random_mask((12, 20), 1)
    found, exact = compensate(w, h, mask), converged(w, h, mask)
    assert found.loss == pytest.approx(quadratic_loss(h, found.weight - w), rel=1e-9)
    assert exact.loss <= found.loss <= exact.loss * 1.01


@pytest.mark.parametrize(("seed", "damping"), [(1, 1e-3), (1, 1e-2), (2, 1e-3)])
def test_products_of_bfloat16_never_end_above_the_start(seed, damping, monkeypatch):
    """Fewer tokens than inputs and hardly any damping: rounding makes H indefinite, and conjugate gradients diverge."""
    monkeypatch.setattr(linalg, "bfloat16_units", lambda: "vector")
    monkeypatch.setattr(linalg, "WORTH_ROUNDING", 0)
    factors = []
    for size, part in ((256, seed), (192, seed + 50)):
        generator = torch.Generator().manual_seed(part)
        basis = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
        rows = torch.randn(64, size, generator=generator) * torch.logspace(0, -1, size) @ basis
        factors.append(Damping(damping)(rows.T @ rows / 64, name="A", where="x")[0])
    h, w = Kronecker(*factors), normal(192, 256, seed=0, dtype=torch.float32) / 16
    selection = select(w, h, Unstructured(0.5))
    exact = compensate(w, h, selection.mask, selection.start, tolerance=2.9e-4)
    for most in (7, 20, 100, MAX_ITERATIONS):
        found = compensate(w, h, selection.mask, selection.start, max_iterations=most)
        assert found.iterations <= most
        assert found.loss == pytest.approx(quadratic_loss(h, found.weight - w), rel=1e-3)
        assert found.loss <= quadratic_loss(h, selection.start - w)
    assert found.loss <= 1.02 * exact.loss


class TestSelect:
    @patterns
    def test_how_weights_lie_in_memory_does_not_matter(self, pattern):
        h, w = ill_conditioned((12, 20), 0)
        by_row, by_column = select(w, h, pattern), select(w.T.contiguous().T, h, pattern)
        assert torch.equal(by_row.mask, by_column.mask)
        assert_close(by_column.start, by_row.start, condition=CONDITION)

    @patterns
    @wide
    @pytest.mark.parametrize("condition", [1e2, 1e4], ids="cond={:g}".format)
    @pytest.mark.parametrize("schedule", [THOROUGH, FAST], ids=["thorough", "fast"])
    def test_is_better_than_the_saliencies_of_single_weights(self, schedule, condition, shape, pattern):
        ratios = []
        for seed in range(4):
            h, w = ill_conditioned(shape, seed, condition)
            found, single = select(w, h, pattern, schedule), one_shot(w, h, pattern)
            ratios.append(compensated(w, h, found) / compensated(w, h, single))
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        assert mean <= 0.6, f"geometric mean {mean:.3f} of {ratios}"
        assert max(ratios) <= 0.85, f"{ratios}"

    @patterns
    @wide
    def test_thorough_is_better_than_fast(self, shape, pattern):
        ratios = []
        for seed in range(4):
            h, w = ill_conditioned(shape, seed)
            ratios.append(compensated(w, h, select(w, h, pattern)) / compensated(w, h, select(w, h, pattern, FAST)))
        assert math.exp(sum(map(math.log, ratios)) / len(ratios)) <= 1.0, f"{ratios}"
        assert max(ratios) <= 1.1, f"{ratios}"

    @pytest.mark.parametrize(
        ("shape", "pattern", "masks"),
        [
            ((3, 4), Unstructured(0.5), list(masks_of_size((3, 4), 6))),
            ((2, 5), Unstructured(0.6), list(masks_of_size((2, 5), 4))),
            ((2, 8), NM(2, 4), list(masks_n_of_m((2, 8), 2, 4))),
            ((3, 4), NM(1, 2), list(masks_n_of_m((3, 4), 1, 2))),
            ((2, 5), NM(2, 4), list(masks_n_of_m((2, 5), 2, 4))),
        ],
        ids=["3x4-50%", "2x5-60%", "2x8-2:4", "3x4-1:2", "2x5-2:4"],
    )
    def test_is_close_to_exhaustive_search(self, shape, pattern, masks):
        ratios = []
        for seed in range(8):
            h, w = ill_conditioned(shape, seed, 10.0)
            least = brute_force(h.to_dense(), w, masks)[1]
            ratios.append(constrained_minimum(h.to_dense(), w, select(w, h, pattern).mask)[1] / least)
        assert min(ratios) >= 1 - 1e-9, f"{ratios}"
        assert sum(ratios) / len(ratios) <= 1.15, f"{ratios}"
        assert max(ratios) <= 1.5, f"{ratios}"

    @pytest.mark.parametrize("kind", COUPLED)
    @pytest.mark.parametrize("pattern", PATTERNS, ids=pattern_id)
    def test_start_is_feasible_and_no_worse_than_plain_removal(self, pattern, kind):
        h, w = MAKE[kind]((6, 11), 0, torch.float64), normal(6, 11, seed=9)
        found = select(w, h, pattern)
        assert not found.start[~found.mask].any()
        assert 0 < found.iterations <= THOROUGH.iterations
        assert quadratic_loss(h, found.start - w) < quadratic_loss(h, w * found.mask - w)

    @pytest.mark.parametrize("shape", [(1, 1), (1, 2), (7, 5)], ids="{0[0]}x{0[1]}".format)
    def test_nothing_to_remove(self, shape):
        h, w = MAKE["kronecker"](shape, 0, torch.float64), normal(*shape, seed=9)
        solution = solve(w, h, NM(2, 4) if shape[1] <= 2 else Unstructured(0.0))
        assert solution.mask.all()
        assert torch.equal(solution.weight, w)
        assert (solution.loss, solution.sparsity, solution.admm_iterations) == (0.0, 0.0, 0)

    @pytest.mark.parametrize(
        ("churn", "factor"), [(0.5, 1.2), (0.2, 1.2), (0.1, 1.05), (0.02, 1.05), (0.01, 1.1), (0.002, 1.1), (0.0, 1.5)]
    )
    def test_schedule(self, churn, factor):
        assert AdmmSchedule().factor(churn) == factor
        assert AdmmSchedule(growth=1.3).factor(churn) == 1.3


def compensated(weight, curvature, selection):
    return converged(weight, curvature, selection.mask, selection.start).loss


class TestSolve:
    @dtypes
    @pytest.mark.parametrize("kind", ["kronecker", "layerwise"])
    @pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1), (13, 17), (3, 10)], ids="{0[0]}x{0[1]}".format)
    @pytest.mark.parametrize("pattern", ODD, ids=pattern_id)
    def test_is_feasible(self, pattern, shape, kind, dtype):
        h, w = MAKE[kind](shape, 0, dtype), normal(*shape, seed=9, dtype=dtype)
        solution = solve(w, h, pattern)
        assert is_feasible(solution.mask, pattern)
        assert not solution.weight[~solution.mask].any()
        assert solution.sparsity == pytest.approx(1 - int(solution.mask.sum()) / w.numel())
        loss = torch.tensor(solution.loss, dtype=dtype)
        assert_close(loss, quadratic(h.to_dense(), solution.weight - w), size=w.numel(), condition=CONDITION)

    @dtypes
    @pytest.mark.parametrize("pattern", PATTERNS, ids=pattern_id)
    def test_dead_inputs_and_outputs(self, pattern, dtype):
        a, g = spd(17, condition=1e3, seed=1, dtype=dtype), spd(13, condition=1e3, seed=2, dtype=dtype)
        a[4], a[:, 4], g[7], g[:, 7] = 0, 0, 0, 0
        h = Kronecker(Damping()(a, name="A", where="x")[0], Damping()(g, name="G", where="x")[0])
        w = normal(13, 17, seed=3, dtype=dtype)
        solution = solve(w, h, pattern)
        assert is_feasible(solution.mask, pattern)
        assert torch.isfinite(solution.weight).all()
        assert solution.loss <= quadratic_loss(h, w * solution.mask - w)
        dead = torch.zeros(13, 17, dtype=torch.bool)
        dead[:, 4] = True
        assert solution.mask[dead].float().mean() < solution.mask.float().mean()

    @patterns
    @pytest.mark.parametrize(("c", "d"), [(4.0, 1.0), (1e-3, 1.0), (1.0, 1e-6), (37.0, 2e-5)])
    def test_the_unit_of_the_factors_does_not_matter(self, c, d, pattern):
        h, w = ill_conditioned((13, 17), 0, CONDITION)
        before, after = solve(w, h, pattern), solve(w, Kronecker(c * h.a, d * h.g), pattern)
        assert torch.equal(before.mask, after.mask)
        assert_close(after.weight, before.weight, condition=1e6)
        assert after.loss == pytest.approx(c * d * before.loss, rel=1e-9)

    @patterns
    @pytest.mark.parametrize("k", [8.0, 1e-3, -1.0])
    def test_the_unit_of_the_weights_does_not_matter(self, k, pattern):
        h, w = ill_conditioned((13, 17), 0, CONDITION)
        before, after = solve(w, h, pattern), solve(k * w, h, pattern)
        assert torch.equal(before.mask, after.mask)
        assert_close(after.weight / k, before.weight, condition=1e6)

    @patterns
    def test_rows_may_be_permuted(self, pattern):
        h, w = ill_conditioned((13, 17), 0, CONDITION)
        order = normal(13, seed=5).argsort()
        before, after = solve(w, h, pattern), solve(w[order], Kronecker(h.a, h.g[order][:, order]), pattern)
        assert torch.equal(after.mask, before.mask[order])
        assert_close(after.weight, before.weight[order], condition=1e6)

    def test_columns_may_be_permuted_without_groups(self):
        h, w = ill_conditioned((13, 17), 0, CONDITION)
        order = normal(17, seed=5).argsort()
        before = solve(w, h, Unstructured(0.6))
        after = solve(w[:, order], Kronecker(h.a[order][:, order], h.g), Unstructured(0.6))
        assert torch.equal(after.mask, before.mask[:, order])
        assert_close(after.weight, before.weight[:, order], condition=1e6)

    def test_kronecker_and_its_dense_form_agree(self):
        h, w = ill_conditioned((5, 7), 0, 10.0)
        mask = select(w, h, Unstructured(0.5)).mask
        one, other = converged(w, h, mask), converged(w, Dense(h.to_dense(), (5, 7)), mask)
        assert_close(one.weight, other.weight, condition=1e2)

    def test_repeats_bit_by_bit(self):
        h, w = ill_conditioned((13, 17), 0)
        assert torch.equal(solve(w, h, NM(2, 4)).weight, solve(w, h, NM(2, 4)).weight)


class TestBias:
    """Eliminating the bias, against least squares on the samples with a constant input that is never pruned."""

    DAMPING = Damping(0.05)

    @pytest.fixture(params=[(1, 5), (3, 5), (4, 2)], ids=lambda s: f"{s[0]}x{s[1]}")
    def case(self, request):
        rows, columns = request.param
        inputs = normal(40, columns, seed=1) @ spd(columns, condition=9.0, seed=2) + normal(columns, seed=3)
        gradients = normal(50, rows, seed=4) @ spd(rows, condition=9.0, seed=5)
        factors = LayerFactors(
            a=inputs.T @ inputs / 40,
            mean=inputs.mean(0),
            g=gradients.T @ gradients / 50,
            tokens=40,
            has_bias=True,
        )
        mask = random_mask((rows, columns), 6)
        return inputs, factors, normal(rows, columns, seed=7), normal(rows, seed=8), mask

    @pytest.mark.parametrize("method", ["kfac", "layerwise"])
    def test_equals_the_augmented_least_squares_problem(self, case, method):
        inputs, factors, w, b, mask = case
        rows, columns = w.shape
        n = len(inputs)
        operator, records = factors.operator(method, self.DAMPING, where="x", dtype=torch.float64)
        spread = (inputs - inputs.mean(0)).square().mean()  # the mean diagonal of the covariance
        shift = records[0].relative * spread
        design = torch.cat([torch.cat([inputs, torch.ones(n, 1)], 1) / n**0.5, eye(columns + 1)[:-1] * shift**0.5])
        metric = eye(rows)
        if method == "kfac":
            g = factors.g + records[1].relative * factors.g.diagonal().mean() * eye(rows)
            metric = torch.linalg.cholesky(g).T
        big = torch.kron(metric, design)
        augmented = torch.cat([w, b[:, None]], 1)
        free = torch.cat([mask, torch.ones(rows, 1, dtype=torch.bool)], 1).reshape(-1)
        target = big @ augmented.reshape(-1)
        x = torch.zeros_like(augmented).reshape(-1)
        x[free] = torch.linalg.lstsq(big[:, free], target).solution
        least = 0.5 * float((big @ x - target).square().sum())
        x = x.reshape(rows, columns + 1)

        result = converged(w, operator, mask)
        assert_close(result.weight, x[:, :-1], condition=1e4)
        assert_close(b + factors.bias_update(result.weight - w), x[:, -1], condition=1e4)
        assert result.loss == pytest.approx(least, rel=1e-9)

    @pytest.mark.parametrize("update", ["none", "other", "optimal"])
    def test_what_another_bias_costs(self, case, update):
        inputs, factors, w, _, mask = case
        change = w * mask - w
        best = factors.bias_update(change)
        shift = {"none": torch.zeros_like(best), "other": normal(len(best), seed=9), "optimal": best}[update]

        def cost(bias_change):
            outputs = inputs @ change.T + bias_change
            return 0.5 * float(((outputs @ factors.g) * outputs).sum(1).mean())

        centred = inputs - inputs.mean(0)
        covariance = centred.T @ centred / len(centred)
        assert cost(best) == pytest.approx(quadratic(torch.kron(factors.g, covariance), change), rel=1e-9)
        assert factors.bias_loss(change, shift) == pytest.approx(cost(shift) - cost(best), rel=1e-9, abs=1e-12)

    def test_a_layer_without_bias_uses_the_second_moment(self, case):
        inputs, factors, w, _, _ = case
        plain = LayerFactors(factors.a, factors.mean, factors.g, factors.tokens, has_bias=False)
        operator, records = plain.operator("kfac", Damping(1e-9), where="x", dtype=torch.float64)
        outputs = inputs @ w.T
        cost = 0.5 * float(((outputs @ factors.g) * outputs).sum(1).mean())
        assert quadratic_loss(operator, w) == pytest.approx(cost, rel=1e-6)
        assert [r.factor for r in records] == ["A", "G"]
        assert plain.bias_loss(w, torch.ones(len(w), dtype=torch.float64)) == 0.0

    @pytest.mark.parametrize("has_bias", [True, False])
    def test_separable_methods(self, case, has_bias):
        _, factors, _, _, _ = case
        factors = LayerFactors(factors.a, factors.mean, factors.g, factors.tokens, has_bias)
        magnitude, none = factors.operator("magnitude", self.DAMPING, where="x", dtype=torch.float64)
        damage, also_none = factors.operator("obd", self.DAMPING, where="x", dtype=torch.float64)
        n = factors.g.shape[0] * factors.a.shape[0]
        assert none == also_none == []
        assert_close(magnitude.to_dense(), eye(n))
        assert_close(damage.to_dense(), torch.kron(factors.g, factors.a) * eye(n))

    @pytest.mark.parametrize("method", ["magnitude", "obd", "layerwise", "kfac"])
    def test_dtype(self, case, method):
        operator, _ = case[1].operator(method, self.DAMPING, where="x")
        assert operator.diagonal().dtype == torch.float32

    def test_a_dead_input_under_optimal_brain_damage_stays_finite(self):
        a = torch.diag(torch.tensor([1.0, 0.0, 2.0, 3.0]))
        factors = LayerFactors(a, torch.zeros(4), torch.eye(2), 10, has_bias=False)
        operator, _ = factors.operator("obd", self.DAMPING, where="x")
        solution = solve(torch.full((2, 4), 0.1), operator, NM(2, 4))
        assert torch.isfinite(solution.weight).all()
        assert not solution.mask[:, 1].any()
        assert math.isfinite(solution.kkt)


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**-83, 2.0**-99], ids=str)
def test_a_layer_with_tiny_gradients_is_solved_like_any_other(scale):
    """The square of its curvature is zero in float32."""
    a, g = spd(8, seed=1, dtype=torch.float32), spd(6, seed=2, dtype=torch.float32)
    weight = normal(6, 8, seed=3).float()
    found = []
    for size in (1.0, scale):
        factors = LayerFactors(a, torch.zeros(8), g * size, 10, has_bias=False)
        operator, _ = factors.operator("kfac", Damping(), where="layer")
        found.append(solve(weight, operator, Unstructured(0.5)))
    whole, tiny = found
    assert torch.equal(whole.mask, tiny.mask)
    assert_close(tiny.weight, whole.weight, condition=CONDITION)
    assert tiny.loss / scale == pytest.approx(whole.loss, rel=1e-4)
    assert tiny.kkt > 0
