"""Cost curves of FFNs and attentions, against every subset and the dense quadratic."""

import itertools
import math

import pytest
import torch
from oracles import constrained_minimum, normal, spd
from torch import nn

from kfac_prune.models import Layer
from kfac_prune.operators import Diagonal, Kronecker
from kfac_prune.structure import curves
from kfac_prune.structure.curves import Option, corrected, ffn_options, head_options, interpolated, options_of
from kfac_prune.structure.groups import AttentionHeads, FfnUnits
from kfac_prune.structure.removal import ColumnProblem

WIDTH = 5  # of the residual stream
HEAD_DIM = 2


def linear(name, columns, rows):
    return Layer(name, nn.Linear(columns, rows, bias=False))


def ffn(units, producers=2):
    first = tuple(linear(f"mlp.{i}", WIDTH, units) for i in range(producers))
    return FfnUnits("mlp", first, linear("mlp.down", units, WIDTH))


def attention(groups, per_group):
    q, kv = groups * per_group * HEAD_DIM, groups * HEAD_DIM
    producers = (linear("q", WIDTH, q), linear("k", WIDTH, kv), linear("v", WIDTH, kv))
    return AttentionHeads("attn", producers, linear("o", q, WIDTH), groups, per_group, HEAD_DIM)


def curvature_of(group, seed=0, condition=100.0):
    """Weights of the consumer and a curvature for them."""
    columns = group.consumer.shape[1]
    curvature = Kronecker(spd(columns, condition=condition, seed=seed + 1), spd(WIDTH, seed=seed + 2))
    return normal(WIDTH, columns, seed=seed), curvature


def problem_of(group):
    """What ``options_of`` asks for."""
    return lambda member: ColumnProblem.of(*curvature_of(member))


def dense_cost(weight, curvature, gone):
    mask = torch.ones(weight.shape, dtype=torch.bool)
    mask[:, gone] = False
    return constrained_minimum(torch.kron(curvature.g, curvature.a), weight, mask)[1]


def columns_of(heads):
    return [head * HEAD_DIM + i for head in heads for i in range(HEAD_DIM)]


def numbers_of_weights(group, sizes):
    """Weights left in producers and consumer, counted from the model's shapes."""
    if isinstance(group, FfnUnits):
        (units,) = sizes
        return (len(group.producers) + 1) * units * WIDTH
    groups, per_group = sizes
    return (2 * groups * per_group + 2 * groups) * HEAD_DIM * WIDTH


class TestFfnOptions:
    @pytest.mark.parametrize("producers", [1, 2])
    @pytest.mark.parametrize("multiple", [1, 3, 8, 16, 64])
    @pytest.mark.parametrize("units", [1, 7, 16, 17])
    def test_sizes_savings_and_costs(self, units, multiple, producers):
        group = ffn(units, producers)
        weight, curvature = curvature_of(group)
        options = ffn_options(group, ColumnProblem.of(weight, curvature), multiple)
        widths = [len(option.kept) for option in options]
        assert widths == [units, *(w for w in reversed(range(1, units)) if w % multiple == 0)]
        assert torch.equal(options[0].kept, torch.arange(units))
        assert (options[0].saving, options[0].cost) == (0, 0.0)
        for option in options:
            kept = option.kept.tolist()
            assert kept == sorted(set(kept) & set(range(units)))
            assert option.saving == numbers_of_weights(group, [units]) - numbers_of_weights(group, [len(kept)])
            gone = [i for i in range(units) if i not in kept]
            assert option.cost == pytest.approx(dense_cost(weight, curvature, gone), rel=1e-8)
        costs = [option.cost for option in options]
        assert costs == sorted(costs)

    def test_selections_are_nested(self):
        group = ffn(13)
        options = ffn_options(group, ColumnProblem.of(*curvature_of(group)), 2)
        for larger, smaller in itertools.pairwise(options):
            assert set(smaller.kept.tolist()) < set(larger.kept.tolist())

    def test_a_row_of_a_producer_that_stacks_counts_twice(self):
        group = FfnUnits("mlp", (linear("gate_up", WIDTH, 12),), linear("down", 6, WIDTH))
        options = ffn_options(group, ColumnProblem.of(*curvature_of(group)), 4)
        assert [option.saving for option in options] == [0, 3 * 2 * WIDTH]


LAYOUTS = [(1, 1), (1, 2), (4, 1), (2, 2), (4, 2), (1, 3), (2, 3), (3, 3)]
layouts = pytest.mark.parametrize(("groups", "per_group"), LAYOUTS, ids=str)


class TestHeadOptions:
    @staticmethod
    def by_size(groups, per_group, seed=0):
        group = attention(groups, per_group)
        weight, curvature = curvature_of(group, seed)
        options = head_options(group, ColumnProblem.of(weight, curvature))
        return group, weight, curvature, {tuple(option.kept.shape): option for option in options}, options

    @staticmethod
    def check(group, options):
        """Every size once, each a valid selection with its true saving."""
        whole = (group.groups, group.per_group)
        sizes = [tuple(option.kept.shape) for option in options]
        assert sorted(sizes) == [(g, q) for g in range(1, whole[0] + 1) for q in range(1, whole[1] + 1)]
        assert sizes[0] == whole
        savings = [option.saving for option in options]
        assert savings == sorted(savings)
        for option in options:
            for row in option.kept.tolist():
                assert row == sorted(set(row))
                assert len({head // group.per_group for head in row}) == 1
            firsts = option.kept[:, 0].tolist()
            assert firsts == sorted(firsts)
            assert len({head // group.per_group for head in firsts}) == len(firsts)
            assert 0 <= int(option.kept.min()) <= int(option.kept.max()) < group.groups * group.per_group
            left = numbers_of_weights(group, option.kept.shape)
            assert option.saving == numbers_of_weights(group, whole) - left

    @layouts
    def test_every_size_once_with_valid_heads(self, groups, per_group):
        group, weight, curvature, _, options = self.by_size(groups, per_group)
        self.check(group, options)
        for option in options:
            gone = sorted(set(range(weight.shape[1])) - set(columns_of(option.kept.reshape(-1).tolist())))
            assert option.cost == pytest.approx(dense_cost(weight, curvature, gone), rel=1e-8)

    @pytest.mark.parametrize("seed", range(4))
    @layouts
    def test_kv_groups_are_the_best_of_all_subsets(self, groups, per_group, seed):
        _, weight, curvature, options, _ = self.by_size(groups, per_group, seed)
        for removed in range(1, groups):
            costs = {}
            for choice in itertools.combinations(range(groups), removed):
                heads = [i * per_group + j for i in choice for j in range(per_group)]
                costs[choice] = dense_cost(weight, curvature, columns_of(heads))
            best = min(costs, key=costs.get)
            kept = options[groups - removed, per_group].kept
            assert sorted(set(range(groups)) - set((kept[:, 0] // per_group).tolist())) == list(best)

    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("groups", [1, 2, 4])
    def test_query_heads_are_the_best_of_the_groups_that_stay(self, groups, seed):
        _, weight, curvature, options, _ = self.by_size(groups, 2, seed)
        for left in range(1, groups + 1):
            present = options[left, 2].kept
            gone = sorted(set(range(2 * groups)) - set(present.reshape(-1).tolist()))
            costs = {}
            for choice in itertools.product(*present.tolist()):
                others = [head for head in present.reshape(-1).tolist() if head not in choice]
                costs[choice] = dense_cost(weight, curvature, columns_of(sorted(gone + others)))
            assert tuple(options[left, 1].kept[:, 0].tolist()) == min(costs, key=costs.get)

    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize(("groups", "per_group"), [*LAYOUTS, (1, 4), (2, 4)], ids=str)
    def test_removed_greedily(self, groups, per_group, seed, monkeypatch):
        monkeypatch.setattr(curves, "EXHAUSTIVE", 0)
        group, _, _, options, listed = self.by_size(groups, per_group, seed)
        self.check(group, listed)
        for left in range(1, groups):  # one unit at a time: what has gone stays gone
            smaller, larger = (set(options[n, per_group].kept.reshape(-1).tolist()) for n in (left, left + 1))
            assert smaller < larger
        for left in range(1, groups + 1):
            for queries in range(1, per_group):
                smaller, larger = (set(options[left, n].kept.reshape(-1).tolist()) for n in (queries, queries + 1))
                assert smaller < larger

    @pytest.mark.parametrize("seed", range(4))
    @layouts
    def test_greedy_is_never_cheaper(self, groups, per_group, seed, monkeypatch):
        _, _, _, best, _ = self.by_size(groups, per_group, seed)
        monkeypatch.setattr(curves, "EXHAUSTIVE", 0)
        _, _, _, greedy, _ = self.by_size(groups, per_group, seed)
        comparable = [(g, per_group) for g in range(1, groups + 1)] + [(groups, q) for q in range(1, per_group + 1)]
        assert all(greedy[size].cost >= best[size].cost * (1 - 1e-9) for size in comparable)

    def test_exhaustive_and_greedy_steps_mix(self):
        """With 4 x 4 heads one or three in every group are chosen from 256 sets, two (of 1296) greedily."""
        group, _, _, _, listed = self.by_size(4, 4)
        self.check(group, listed)


class TestOptionsOf:
    @pytest.mark.parametrize("group", [ffn(10), attention(3, 2)], ids=["ffn", "heads"])
    def test_the_first_keeps_everything(self, group):
        first, *rest = options_of(group, problem_of(group), 4)
        assert torch.equal(first.kept, group.everything())
        assert (first.saving, first.cost) == (0, 0.0)
        assert all(option.saving > 0 and option.cost > 0 for option in rest)

    def test_without_coupling_units_go_by_their_own_saliency(self):
        group = ffn(9)
        weight, h = normal(WIDTH, 9, seed=1), normal(WIDTH, 9, seed=2).square() + 0.01
        own = [sum(0.5 * float(h[r, c] * weight[r, c] ** 2) for r in range(WIDTH)) for c in range(9)]
        by_saliency = sorted(range(9), key=own.__getitem__)
        for i, option in enumerate(options_of(group, lambda member: ColumnProblem.of(weight, Diagonal(h)), 1)):
            assert option.kept.tolist() == sorted(by_saliency[i:])
            assert option.cost == pytest.approx(sum(own[j] for j in by_saliency[:i]))


def line(savings, cost=lambda saving: 1e-3 * saving):
    return [Option(torch.arange(1), saving, cost(saving)) for saving in savings]


class TestCorrected:
    def measured_sizes(self, options, factor):
        """Corrected options, and what was measured: saving -> loss."""
        seen = {}

        def measure(option):
            seen[option.saving] = factor(option.saving) * option.cost
            return seen[option.saving]

        return corrected(options, measure), seen

    def test_passes_through_what_was_measured(self):
        options = line(range(0, 101, 5))
        after, seen = self.measured_sizes(options, lambda s: 1 + (s / 30) ** 2)
        assert sorted(seen) == [15, 30, 50, 70, 85]
        for option in after:
            if option.saving in seen:
                assert option.cost == pytest.approx(seen[option.saving], rel=1e-12)

    def test_ratio_is_geometric_between_and_constant_beyond(self):
        options = line(range(0, 101, 5))
        after, _ = self.measured_sizes(options, lambda s: 2.0 ** (s / 10))
        for option, old in zip(after, options, strict=True):
            assert option.cost == pytest.approx(2.0 ** (min(max(option.saving, 15), 85) / 10) * old.cost, rel=1e-12)

    def test_keeps_selections_savings_and_the_free_first(self):
        group = ffn(16)
        options = options_of(group, problem_of(group), 2)
        after, _ = self.measured_sizes(options, lambda s: 3.0)
        for new, old in zip(after, options, strict=True):
            assert new.saving == old.saving
            assert torch.equal(new.kept, old.kept)
            assert new.cost == pytest.approx(3 * old.cost)
        assert after[0].cost == 0.0

    def test_a_true_prediction_stays(self):
        options = line(range(0, 101, 7))
        after, _ = self.measured_sizes(options, lambda s: 1.0)
        assert [o.cost for o in after] == pytest.approx([o.cost for o in options])

    def test_every_size_is_measured_once(self):
        calls = []
        corrected(line([0, 10, 20]), lambda option: calls.append(option.saving) or 1.0)
        assert sorted(calls) == [10, 20]

    @pytest.mark.parametrize(
        "options", [line([0]), line([0, 5, 9], cost=lambda saving: 0.0)], ids=["one-size", "all-free"]
    )
    def test_nothing_to_correct_is_not_measured(self, options):
        assert corrected(options, lambda option: pytest.fail("measured")) == options

    def test_free_sizes_stay_free(self):
        options = line(range(0, 101, 10), cost=lambda saving: max(saving - 20, 0) * 1e-3)
        after, seen = self.measured_sizes(options, lambda s: 5.0)
        assert 0.0 not in [seen[s] for s in seen]
        assert [o.cost for o in after[:3]] == [0.0] * 3

    def test_a_loss_that_was_not_seen_stays_positive(self):
        """Rounding can make a measured KL zero or negative."""
        after = corrected(line([0, 50, 100]), lambda option: -1e-12)
        assert all(0 < option.cost <= 1e-8 for option in after[1:])


class TestInterpolated:
    XS, YS = (1.0, 2.0, 5.0), (10.0, 0.0, 6.0)

    @pytest.mark.parametrize(
        ("x", "y"),
        [(1, 10), (2, 0), (5, 6), (1.5, 5), (1.25, 7.5), (3, 2), (4.5, 5), (0, 10), (-math.inf, 10), (7, 6), (1e9, 6)],
    )
    def test_is_linear_between_and_constant_outside(self, x, y):
        assert interpolated(self.XS, self.YS, x) == pytest.approx(y)

    def test_of_one_point_is_constant(self):
        assert [interpolated([3.0], [4.0], x) for x in (0, 3, 9)] == [4.0] * 3
