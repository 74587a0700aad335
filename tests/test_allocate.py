"""Allocation of a sparsity budget, against exhaustive search on the convex envelopes."""

import functools
import itertools
import math

import pytest
import torch
from oracles import seeded

from kfac_prune.allocate import MAX_SPARSITY, STEP, LossCurve, allocate, choose, least_subset, lower_hull

CURVES = {
    "q": LossCurve({0.3: 1e-4, 0.5: 8e-4, 0.7: 6e-3, 0.9: 9e-2}, 1000),
    "up": LossCurve({0.3: 2e-3, 0.5: 6e-3, 0.7: 2e-2, 0.9: 7e-2}, 3000),
    "down": LossCurve({0.3: 1e-3, 0.5: 9e-3, 0.7: 5e-2, 0.9: 4e-1}, 2000),
}
SETS = {
    "one": ["q"],
    "two": ["q", "up"],
    "other-two": ["up", "down"],
    "three": ["q", "up", "down"],
}
layer_sets = pytest.mark.parametrize("names", SETS.values(), ids=SETS)
budgets = pytest.mark.parametrize("sparsity", [0.1, 0.33, 0.5, 0.7, 0.8, 0.88])


def limit_of(sparsity):
    return max(0.9, (1 + sparsity) / 2)


def used(result, curves):
    return sum(result[name] * curve.size for name, curve in curves.items())


def total(curves):
    return sum(curve.size for curve in curves.values())


class Envelope:
    """The greatest convex function below a curve on the allocation's grid: the least of all chords over each point."""

    def __init__(self, curve, limit):
        self.xs = torch.arange(0, limit + STEP / 2, STEP, dtype=torch.float64)
        ys = torch.tensor([curve(float(x)) for x in self.xs], dtype=torch.float64)
        left, right = self.xs[:, None, None], self.xs[None, :, None]
        at = self.xs[None, None, :]
        share = ((at - left) / (right - left).clamp_min(1e-12)).clamp(0, 1)
        chords = ys[:, None, None] * (1 - share) + ys[None, :, None] * share
        spans = (left <= at) & (at <= right) & (left < right)
        self.ys = chords.masked_fill(~spans, math.inf).amin((0, 1))

    def __call__(self, s):
        position = torch.as_tensor(s, dtype=torch.float64) / STEP
        low = position.floor().clamp(0, len(self.xs) - 2).long()
        return self.ys[low] + (self.ys[low + 1] - self.ys[low]) * (position - low)


@functools.cache
def envelope(name, limit):
    return Envelope(CURVES[name], limit)


class TestLossCurve:
    POINTS = {0.3: 1e-3, 0.5: 4e-3, 0.88: 0.7}  # noqa: RUF012  (read only)

    def test_hits_its_points(self):
        curve = LossCurve(self.POINTS, 10)
        for s, e in self.POINTS.items():
            assert curve(s) == pytest.approx(e, rel=1e-12)

    def test_is_nothing_at_no_sparsity(self):
        assert LossCurve(self.POINTS, 10)(0.0) == 0.0

    @pytest.mark.parametrize(
        ("s", "expected"),
        [
            (0.4, 2e-3),
            (0.69, 4e-3 * 175**0.5),
            (0.2, 1e-3 / 2),
            (0.1, 1e-3 / 4),
            (0.98, 0.7 * 175 ** (0.1 / 0.38)),
        ],
    )
    def test_is_geometric_between_and_beyond(self, s, expected):
        assert LossCurve(self.POINTS, 10)(s) == pytest.approx(expected, rel=1e-12)

    def test_order_of_the_points_does_not_matter(self):
        backwards = LossCurve(dict(reversed(self.POINTS.items())), 10)
        assert [backwards(s / 50) for s in range(50)] == [LossCurve(self.POINTS, 10)(s / 50) for s in range(50)]

    @pytest.mark.parametrize("points", [{}, {0.5: 1.0}], ids=["none", "one"])
    def test_needs_two_points(self, points):
        with pytest.raises(ValueError, match="at least two points"):
            LossCurve(points, 10)

    def test_a_point_without_loss_is_next_to_nothing(self):
        curve = LossCurve({0.3: 0.0, 0.6: 1e-2}, 10)
        assert curve(0.3) == pytest.approx(1e-30)
        assert 0 < curve(0.5) < 1e-2

    def test_zeros_go_for_nothing(self):
        curve = LossCurve(self.POINTS, 10, zeros=0.25)
        assert [curve(s) for s in (0.0, 0.1, 0.25)] == [0.0] * 3
        assert all(curve(s) == LossCurve(self.POINTS, 10)(s) for s in (0.26, 0.4, 0.9))
        assert curve.corrected(0.2, 0.0) == curve
        assert curve.corrected(0.4, 1e-2).zeros == 0.25

    @pytest.mark.parametrize(("sparsity", "loss"), [(0.4, 1e-2), (0.62, 1e-3), (0.95, 0.1), (0.1, 1e-5)])
    def test_corrected_goes_through_the_point_and_scales_the_rest(self, sparsity, loss):
        curve = LossCurve(self.POINTS, 10)
        after = curve.corrected(sparsity, loss)
        assert after.size == 10
        assert after(sparsity) == pytest.approx(loss, rel=1e-12)
        for s in (0.05, *self.POINTS, 0.97):
            assert after(s) / curve(s) == pytest.approx(loss / curve(sparsity), rel=1e-9)

    @pytest.mark.parametrize("sparsity", [0.5, 0.495, 0.509])
    def test_corrected_replaces_a_point_that_is_too_near(self, sparsity):
        after = LossCurve(self.POINTS, 10).corrected(sparsity, 1e-2)
        assert sorted(after.points) == [0.3, sparsity, 0.88]
        assert after(sparsity) == pytest.approx(1e-2, rel=1e-12)

    @pytest.mark.parametrize(("sparsity", "loss"), [(0.0, 0.0), (1e-15, 0.0), (0.4, 0.0)])
    def test_nothing_lost_says_nothing_about_the_rest(self, sparsity, loss):
        curve = LossCurve(self.POINTS, 10)
        after = curve.corrected(sparsity, loss)
        for s in (0.7, 0.88):
            assert after(s) == pytest.approx(curve(s))


class TestLowerHull:
    @pytest.mark.parametrize("seed", range(8))
    def test_is_the_greatest_convex_function_below(self, seed):
        xs = torch.rand(40, generator=seeded(seed), dtype=torch.float64).sort().values.tolist()
        ys = torch.randn(40, generator=seeded(seed + 50), dtype=torch.float64).tolist()
        points = list(zip(xs, ys, strict=True))
        hull = lower_hull(points)
        assert set(hull) <= set(points)
        assert (hull[0], hull[-1]) == (points[0], points[-1])
        slopes = [(y1 - y0) / (x1 - x0) for (x0, y0), (x1, y1) in itertools.pairwise(hull)]
        assert all(a < b for a, b in itertools.pairwise(slopes))
        for (x0, y0), (x1, y1) in itertools.pairwise(hull):
            for x, y in points:
                assert not x0 <= x <= x1 or y >= y0 + (y1 - y0) * (x - x0) / (x1 - x0) - 1e-12

    def test_of_a_line_is_its_ends(self):
        assert lower_hull([(float(i), 2.0 * i) for i in range(5)]) == [(0.0, 0.0), (4.0, 8.0)]

    def test_of_a_convex_function_is_all_of_it(self):
        points = [(float(i), float(i * i)) for i in range(6)]
        assert lower_hull(points) == points

    @pytest.mark.parametrize("points", [[], [(0.0, 1.0)], [(0.0, 1.0), (1.0, 0.0)]], ids=["none", "one", "two"])
    def test_of_few_points(self, points):
        assert lower_hull(points) == points


class TestAllocate:
    @layer_sets
    @pytest.mark.parametrize("sparsity", [0.0, 1e-4, 0.1, 0.33, 0.5, 0.7, 0.88, 0.9, 0.95, 0.97, 0.99, 0.997, 0.9999])
    def test_meets_the_budget(self, sparsity, names):
        curves = {name: CURVES[name] for name in names}
        result = allocate(curves, sparsity)
        assert set(result) == set(curves)
        assert used(result, curves) == pytest.approx(sparsity * total(curves), rel=1e-12, abs=1e-9)
        assert all(0 <= s <= limit_of(sparsity) + 1e-12 for s in result.values())

    def test_no_sparsity(self):
        assert allocate(CURVES, 0.0) == dict.fromkeys(CURVES, 0.0)

    def test_no_layers(self):
        assert allocate({}, 0.5) == {}

    @budgets
    @pytest.mark.parametrize("names", [SETS["two"], SETS["other-two"]], ids=["two", "other-two"])
    def test_two_layers_against_a_fine_grid(self, names, sparsity):
        curves = {name: CURVES[name] for name in names}
        self.compare_with_grid(curves, sparsity, step=1e-4)

    @budgets
    def test_three_layers_against_a_fine_grid(self, sparsity):
        self.compare_with_grid(CURVES, sparsity, step=2e-3)

    @staticmethod
    def compare_with_grid(curves, sparsity, step):
        limit = limit_of(sparsity)
        envelopes = {name: envelope(name, limit) for name in curves}
        *free, last = curves
        axes = [torch.arange(0, limit + step / 2, step, dtype=torch.float64) for _ in free]
        mesh = dict(zip(free, torch.meshgrid(*axes, indexing="ij"), strict=True))
        rest = sparsity * total(curves) - sum(mesh[name] * curves[name].size for name in free)
        mesh[last] = rest / curves[last].size
        losses = sum(envelopes[name](mesh[name].clamp(0, limit)) for name in curves)
        best = float(losses[(mesh[last] >= 0) & (mesh[last] <= limit)].min())
        result = allocate(curves, sparsity)
        reached = float(sum(envelopes[name](result[name]) for name in curves))
        assert reached <= best * (1 + 1e-9)
        assert reached >= best * (1 - 20 * step)

    @budgets
    def test_slopes_per_weight_are_equal(self, sparsity):
        limit = limit_of(sparsity)
        result = allocate(CURVES, sparsity)
        downhill, uphill = [], []  # cost of the last weight taken, and of the next one
        for name, curve in CURVES.items():
            hull, s = envelope(name, limit), result[name]
            if s > STEP:
                downhill.append(float(hull(s) - hull(s - STEP)) / (STEP * curve.size))
            if s < limit - STEP:
                uphill.append(float(hull(s + STEP) - hull(s)) / (STEP * curve.size))
        assert max(downhill) <= min(uphill) * (1 + 1e-9)

    def test_equal_marginal_loss_where_the_curves_are_convex(self):
        rates = {"a": 9.0, "b": 7.0, "c": 12.0}
        curves = {n: LossCurve({0.2: math.exp(0.2 * k), 0.9: math.exp(0.9 * k)}, 100) for n, k in rates.items()}
        result = allocate(curves, 0.6)
        marginal = [rates[name] * curves[name](s) for name, s in result.items()]
        assert max(marginal) / min(marginal) <= math.exp(2 * STEP * 12.0)

    def test_beats_the_uniform_allocation(self):
        result = allocate(CURVES, 0.7)
        assert sum(CURVES[n](s) for n, s in result.items()) < 0.9 * sum(c(0.7) for c in CURVES.values())

    @pytest.mark.parametrize(
        ("sparsity", "cap"), [(0.5, MAX_SPARSITY), (0.8, MAX_SPARSITY), (0.9, 0.95), (0.96, 0.98), (0.999, 0.9995)]
    )
    def test_cap(self, sparsity, cap):
        cheap, dear = LossCurve({0.3: 1e-9, 0.9: 1e-8}, 500), LossCurve({0.3: 1.0, 0.9: 50.0}, 500)
        result = allocate({"cheap": cheap, "dear": dear}, sparsity)
        assert result["cheap"] == pytest.approx(cap, abs=1e-9)
        assert result["dear"] == pytest.approx(2 * sparsity - cap, abs=1e-9)

    def test_larger_layers_are_pruned_more_at_the_same_loss(self):
        points = {0.3: 1e-3, 0.9: 1e-1}
        result = allocate({"small": LossCurve(points, 100), "large": LossCurve(points, 400)}, 0.6)
        assert result["large"] > result["small"] + 0.1

    def test_a_layer_split_in_equal_parts_is_pruned_as_before(self):
        points = CURVES["up"].points
        half = LossCurve({s: e / 2 for s, e in points.items()}, CURVES["up"].size // 2)
        whole = allocate({"q": CURVES["q"], "up": CURVES["up"]}, 0.7)
        parts = allocate({"q": CURVES["q"], "up-1": half, "up-2": half}, 0.7)
        assert parts["q"] == pytest.approx(whole["q"], abs=STEP)
        assert (parts["up-1"] + parts["up-2"]) / 2 == pytest.approx(whole["up"], abs=STEP)

    @pytest.mark.parametrize("unit", [2.0**-20, 2.0**9])
    def test_the_unit_of_the_loss_does_not_matter(self, unit):
        scaled = {n: LossCurve({s: e * unit for s, e in c.points.items()}, c.size) for n, c in CURVES.items()}
        result = allocate(scaled, 0.7)
        for name, s in allocate(CURVES, 0.7).items():
            assert result[name] == pytest.approx(s, abs=1e-9)

    def test_the_order_of_the_layers_does_not_matter(self):
        backwards = allocate(dict(reversed(CURVES.items())), 0.63)
        assert backwards == pytest.approx(allocate(CURVES, 0.63), abs=1e-12)

    def test_more_sparsity_never_takes_weights_back(self):
        """Below 80 % the cap does not move, so a larger budget goes further along the same list of segments."""
        results = [allocate(CURVES, 0.04 * i) for i in range(21)]
        for fewer, more in itertools.pairwise(results):
            assert all(more[name] >= fewer[name] - 1e-12 for name in CURVES)

    def test_a_layer_that_was_barely_touched_does_not_become_free(self):
        corrected = {**CURVES, "down": CURVES["down"].corrected(1e-9, 0.0)}
        assert allocate(corrected, 0.5) == pytest.approx(allocate(CURVES, 0.5), abs=1e-9)


class TestChoose:
    """Savings are whole numbers of bins here, so that rounding takes nothing away."""

    @staticmethod
    def instance(seed, groups=4, sizes=5, target=60, zero=True):
        """Per group (saving, cost) pairs, in no particular order."""
        generator = seeded(seed)
        savings = torch.randint(0, 40, (groups, sizes), generator=generator).tolist()
        costs = torch.rand(groups, sizes, generator=generator, dtype=torch.float64).tolist()
        options = [list(zip(map(float, s), c, strict=True)) for s, c in zip(savings, costs, strict=True)]
        return [[(0.0, 0.0), *group] for group in options] if zero else options, float(target)

    @staticmethod
    def reaching(options, target):
        """Total cost of every choice that reaches the target."""
        totals = {}
        for choice in itertools.product(*(range(len(group)) for group in options)):
            savings, costs = zip(*(group[i] for group, i in zip(options, choice, strict=True)), strict=True)
            if sum(savings) >= target:
                totals[choice] = sum(costs)
        return totals

    @pytest.mark.parametrize("zero", [True, False], ids=["with-nothing", "without"])
    @pytest.mark.parametrize("target", [1, 17, 60, 90, 120])
    @pytest.mark.parametrize("seed", range(6))
    def test_is_the_cheapest_of_all_choices(self, seed, target, zero):
        options, target = self.instance(seed, target=target, zero=zero)
        totals = self.reaching(options, target)
        taken = choose(options, target, bins=int(target))
        if not totals:
            assert taken is None
            return
        assert len(taken) == len(options)
        assert tuple(taken) in totals  # one option per group, and they reach the target
        assert totals[tuple(taken)] == pytest.approx(min(totals.values()), rel=1e-12)

    @pytest.mark.parametrize("seed", range(6))
    def test_more_bins_are_as_exact(self, seed):
        options, target = self.instance(seed, target=50)
        totals = self.reaching(options, target)
        for bins in (50, 100, 4000):
            assert totals[tuple(choose(options, target, bins=bins))] == pytest.approx(min(totals.values()), rel=1e-12)

    @pytest.mark.parametrize("bins", [3, 10, 1000])
    @pytest.mark.parametrize("seed", range(6))
    def test_rounding_never_misses_the_target(self, seed, bins):
        """Savings of any size; what rounding down may cost is a target that is higher by one bin per group."""
        options, _ = self.instance(seed)
        options = [[(saving * math.pi, cost) for saving, cost in group] for group in options]
        target = 30 * math.e
        taken = choose(options, target, bins=bins)
        careful = self.reaching(options, target * (1 + len(options) / bins))
        if taken is None:
            assert not careful
            return
        totals = self.reaching(options, target)
        assert tuple(taken) in totals
        assert totals[tuple(taken)] <= min(careful.values(), default=math.inf) * (1 + 1e-12)

    @pytest.mark.parametrize("scale", [1e-6, 1.0, 1e9])
    def test_the_unit_of_savings_does_not_matter(self, scale):
        options, target = self.instance(3)
        scaled = [[(saving * scale, cost) for saving, cost in group] for group in options]
        assert choose(scaled, target * scale, bins=60) == choose(options, target, bins=60)

    @pytest.mark.parametrize(
        "options",
        [[[(0.0, 0.0)]], [[(0.0, 0.0), (4.0, 1.0)], [(0.0, 0.0), (5.0, 1.0)]], []],
        ids=["nothing-to-save", "too-little", "no-groups"],
    )
    def test_unreachable(self, options):
        assert choose(options, 10.0, bins=10) is None

    def test_all_of_it_is_reachable(self):
        assert choose([[(0.0, 0.0), (4.0, 1.0)], [(0.0, 0.0), (6.0, 1.0)]], 10.0, bins=10) == [1, 1]

    def test_what_costs_nothing_is_not_needed_to_be_small(self):
        """One option far beyond the target wins where it is cheapest."""
        assert choose([[(0.0, 0.0), (10.0, 5.0), (1000.0, 1.0)], [(0.0, 0.0), (10.0, 2.0)]], 10.0, bins=10) == [2, 0]

    def test_a_group_must_take_what_it_offers(self):
        assert choose([[(3.0, 7.0)], [(0.0, 0.0), (7.0, 1.0), (8.0, 2.0)]], 10.0, bins=10) == [0, 1]


class TestLeastSubset:
    @staticmethod
    def instance(seed, unit):
        generator = torch.Generator().manual_seed(seed)
        sizes = [unit * int(n) for n in torch.randint(1, 60, (9,), generator=generator)]
        return sizes, torch.rand(9, generator=generator, dtype=torch.float64).tolist()

    @pytest.mark.parametrize("unit", [1, 2048, 999_983])
    @pytest.mark.parametrize("share", [0.01, 0.3, 0.8, 0.95, 1.0])
    @pytest.mark.parametrize("seed", range(3))
    def test_is_the_cheapest_of_all_subsets(self, seed, share, unit):
        sizes, costs = self.instance(seed, unit)
        target = math.ceil(share * sum(sizes))
        taken = least_subset(sizes, costs, target)
        reaching = [
            sum(itertools.compress(costs, chosen))
            for chosen in itertools.product((False, True), repeat=len(sizes))
            if sum(itertools.compress(sizes, chosen)) >= target
        ]
        assert sum(itertools.compress(sizes, taken)) >= target
        assert sum(itertools.compress(costs, taken)) == pytest.approx(min(reaching), rel=1e-12)

    def test_sizes_without_a_large_divisor_still_reach_the_target(self):
        sizes, costs = [1_000_003, 700_001, 500_009, 300_007], [4.0, 1.0, 2.0, 3.0]
        taken = least_subset(sizes, costs, 1_199_000)
        assert taken == [False, True, True, False]

    def test_ends(self):
        assert least_subset([4, 6], [1.0, 2.0], 0) == [False, False]
        assert least_subset([4, 6], [1.0, 2.0], 10) == [True, True]
        assert least_subset([4, 6], [1.0, 2.0], 11) is None
        assert least_subset([0, 0], [1.0, 2.0], 1) is None
        assert least_subset([0, 0], [1.0, 2.0], 0) == [False, False]


def test_what_is_zero_already_is_taken_first():
    dense = LossCurve({0.3: 1e-9, 0.9: 1e-8}, 500)
    sparse = LossCurve({0.65: 1.0, 0.95: 50.0}, 500, zeros=0.5)
    result = allocate({"dense": dense, "sparse": sparse}, 0.4)
    assert result["sparse"] == pytest.approx(0.5)
    assert result["dense"] == pytest.approx(0.3)
