"""Removal of columns, against the dense quadratic, repeated inversion and every subset."""

import itertools

import pytest
import torch
from oracles import assert_close, constrained_minimum, eye, normal, quadratic, spd

from kfac_prune.operators import Diagonal, Kronecker, ScaledIdentity
from kfac_prune.structure.removal import ColumnProblem, cheapest, cheapest_each, compensated, removal_order

SHAPES = {"1x1": (1, 1), "1x5": (1, 5), "7x5": (7, 5), "3x8": (3, 8)}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
conditions = pytest.mark.parametrize("condition", [1.0, 10.0, 1e4], ids=["identity", "mild", "steep"])
metrics = pytest.mark.parametrize("metric", [True, False], ids=["G", "no-G"])


def instance(shape, *, condition=10.0, metric=True, seed=0, dtype=torch.float64):
    """A weight matrix and a Kronecker curvature."""
    rows, columns = shape
    a = spd(columns, condition=condition, seed=seed + 1, dtype=dtype)
    g = spd(rows, condition=condition, seed=seed + 2, dtype=dtype) if metric else None
    return normal(*shape, seed=seed, dtype=dtype), Kronecker(a, g, out_features=rows)


def dense_kron(curvature):
    g = eye(curvature.shape[0]) if curvature.g is None else curvature.g.double()
    return torch.kron(g, curvature.a.double())


def without_columns(w, columns):
    mask = torch.ones(w.shape, dtype=torch.bool)
    mask[:, list(columns)] = False
    return mask


def dense_minimum(w, curvature, columns):
    """(X [out, in], cost) of removing columns, by one solve with the dense matrix."""
    return constrained_minimum(dense_kron(curvature), w, without_columns(w, columns))


def subsets(n):
    return itertools.chain.from_iterable(itertools.combinations(range(n), size) for size in range(n + 1))


def naive_order(w, a, g):
    """Greedy removal that solves for the rest and inverts A_KK anew after every removal: (order, summed costs)."""
    w, a, g = w.double(), a.double(), g.double()
    kept, order, costs = list(range(len(a))), [], []
    while kept:
        block = a[kept][:, kept]
        x = torch.linalg.lstsq(block, (w @ a[:, kept]).T, driver="gelsd").solution.T
        inverse = torch.linalg.inv(block)
        saliency = [0.5 * float(x[:, i] @ g @ x[:, i]) / float(inverse[i, i]) for i in range(len(kept))]
        order.append(kept.pop(saliency.index(min(saliency))))
        change = torch.zeros_like(w)
        if kept:
            change[:, kept] = torch.linalg.solve(a[kept][:, kept], (w @ a[:, kept]).T).T
        costs.append(quadratic(torch.kron(g, a), change - w))
    return order, costs


class TestCost:
    @shapes
    @conditions
    @metrics
    def test_is_the_minimum_of_the_dense_quadratic(self, shape, condition, metric):
        w, curvature = instance(shape, condition=condition, metric=metric)
        problem = ColumnProblem.of(w, curvature)
        for columns in subsets(shape[1]):
            expected = dense_minimum(w, curvature, columns)[1]
            cost = problem.cost(torch.tensor(columns, dtype=torch.int64))
            assert_close(torch.tensor(cost, dtype=torch.float64), expected, condition=condition**2, size=w.numel())

    def test_of_nothing_is_zero_and_of_all_is_the_whole_quadratic(self):
        w, curvature = instance((4, 6))
        problem = ColumnProblem.of(w, curvature)
        assert problem.cost(torch.tensor([], dtype=torch.int64)) == 0.0
        assert problem.cost(torch.arange(6)) == pytest.approx(quadratic(dense_kron(curvature), w), rel=1e-12)

    def test_does_not_depend_on_the_order_of_the_columns(self):
        problem = ColumnProblem.of(*instance((4, 6)))
        assert problem.cost(torch.tensor([4, 0, 3])) == pytest.approx(problem.cost(torch.tensor([0, 3, 4])), rel=1e-12)

    def test_a_larger_set_costs_no_less(self):
        problem = ColumnProblem.of(*instance((3, 6), condition=100.0))
        costs = {frozenset(s): problem.cost(torch.tensor(s, dtype=torch.int64)) for s in subsets(6)}
        for small, large in itertools.product(costs, repeat=2):
            if small < large:
                assert costs[small] <= costs[large] * (1 + 1e-9)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    def test_is_worked_out_in_float64(self, dtype):
        w, curvature = instance((5, 7), condition=1e3, dtype=torch.float32)
        w = w.to(dtype)
        problem = ColumnProblem.of(w, curvature)
        assert problem.p.dtype == problem.m.dtype == torch.float64
        expected = dense_minimum(w.double(), curvature, [1, 2, 5])[1]
        assert problem.cost(torch.tensor([1, 2, 5])) == pytest.approx(expected, rel=1e-8)


class TestCompensated:
    @shapes
    @conditions
    def test_is_the_minimiser_of_the_dense_quadratic(self, shape, condition):
        w, curvature = instance(shape, condition=condition)
        for columns in subsets(shape[1]):
            kept = torch.tensor([i for i in range(shape[1]) if i not in columns], dtype=torch.int64)
            if len(kept):
                expected = dense_minimum(w, curvature, columns)[0]
                x = compensated(w, curvature, kept)
                assert_close(x, expected[:, kept], condition=condition**2, size=w.numel())

    def test_does_not_depend_on_the_metric(self):
        w, curvature = instance((5, 7))
        kept = torch.tensor([0, 2, 3, 6])
        results = [
            compensated(w, Kronecker(curvature.a, g, out_features=5), kept) for g in (None, spd(5, seed=8), curvature.g)
        ]
        assert all(torch.equal(x, results[0]) for x in results)

    def test_columns_come_in_the_order_asked_for(self):
        w, curvature = instance((3, 6))
        forward, backward = (compensated(w, curvature, torch.tensor(k)) for k in ([1, 2, 5], [5, 2, 1]))
        assert_close(backward.flip(1), forward)

    def test_keeping_all_changes_nothing(self):
        w, curvature = instance((3, 6), condition=100.0)
        assert_close(compensated(w, curvature, torch.arange(6)), w, condition=100.0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    def test_has_the_dtype_of_the_weights(self, dtype):
        w, curvature = instance((3, 6), dtype=torch.float32)
        w = w.to(dtype)
        x = compensated(w, curvature, torch.tensor([0, 4]))
        assert x.dtype == dtype
        assert_close(x, dense_minimum(w.double(), curvature, [1, 2, 3, 5])[0][:, [0, 4]])


class TestRemovalOrder:
    @pytest.mark.parametrize("block", [1, 3, 64])
    @pytest.mark.parametrize("shape", [(1, 1), (3, 2), (4, 7), (6, 13), (2, 20)], ids=str)
    @pytest.mark.parametrize("condition", [10.0, 1e3], ids=["mild", "steep"])
    def test_is_that_of_repeated_inversion(self, shape, condition, block):
        w, curvature = instance(shape, condition=condition, seed=5)
        order, costs = removal_order(ColumnProblem.of(w, curvature), block)
        expected, summed = naive_order(w, curvature.a, curvature.g)
        assert order.tolist() == expected
        assert_close(costs, summed, condition=condition**2, size=w.numel())

    @pytest.mark.parametrize("block", [1, 16, 64, 1000])
    def test_blocks_change_nothing_on_more_columns_than_one_block(self, block):
        problem = ColumnProblem.of(*instance((30, 150), condition=1e3))
        order, costs = removal_order(problem, block)
        reference, expected = removal_order(problem, 7)
        assert torch.equal(order, reference)
        assert_close(costs, expected, condition=1e6)

    @conditions
    @metrics
    def test_single_costs_add_up_to_that_of_the_set(self, condition, metric):
        problem = ColumnProblem.of(*instance((6, 17), condition=condition, metric=metric))
        order, costs = removal_order(problem)
        joint = [problem.cost(order[: i + 1]) for i in range(17)]
        assert_close(costs, joint, condition=condition**2)

    def test_leaves_the_problem_as_it_was(self):
        problem = ColumnProblem.of(*instance((4, 9)))
        before = problem.p.clone(), problem.m.clone()
        removal_order(problem, 2)
        assert torch.equal(problem.p, before[0])
        assert torch.equal(problem.m, before[1])

    @pytest.mark.parametrize("n", [6, 7, 8])
    @pytest.mark.parametrize(
        ("condition", "slack", "equal"), [(1.0, 1.0, 1.0), (3.0, 1.02, 0.95), (1e3, 2.5, 0.5)], ids=str
    )
    def test_against_the_best_of_all_subsets(self, n, condition, slack, equal):
        """Never better; the optimum where nothing couples, nearly always where little does, often else."""
        ratios = []
        for seed in range(8):
            problem = ColumnProblem.of(*instance((64, n), condition=condition, seed=10 * seed))
            _, costs = removal_order(problem)
            for size in range(1, n + 1):
                best = min(problem.cost(torch.tensor(s)) for s in itertools.combinations(range(n), size))
                ratios.append(float(costs[size - 1]) / best)
        assert min(ratios) >= 1 - 1e-9
        assert max(ratios) <= slack + 1e-9
        assert sum(ratio < 1 + 1e-9 for ratio in ratios) >= equal * len(ratios)

    def test_first_and_last_step_are_exact(self):
        """One column gone is the least single cost; all gone is the whole quadratic."""
        w, curvature = instance((5, 9), condition=1e3)
        problem = ColumnProblem.of(w, curvature)
        order, costs = removal_order(problem)
        singles = [dense_minimum(w, curvature, [i])[1] for i in range(9)]
        assert int(order[0]) == singles.index(min(singles))
        assert float(costs[0]) == pytest.approx(min(singles), rel=1e-9)
        assert float(costs[-1]) == pytest.approx(quadratic(dense_kron(curvature), w), rel=1e-9)

    @pytest.mark.parametrize("block", [1, 3, 64])
    def test_duplicated_columns_are_each_removed_once(self, block):
        """Four inputs, every one four times: under A + damping, copies stand in for each other nearly for free."""
        inputs = normal(40, 4, seed=3).repeat(1, 4)
        a = inputs.T @ inputs / 40
        a = a + 1e-3 * a.diagonal().mean() * eye(16)
        w = normal(5, 4, seed=4).repeat(1, 4)
        order, costs = removal_order(ColumnProblem.of(w, Kronecker(a, None, out_features=5)), block)
        assert sorted(order.tolist()) == list(range(16))
        assert sorted(i % 4 for i in order[-4:].tolist()) == [0, 1, 2, 3]  # one of each lasts
        assert float(costs[11]) < 0.01 * float(costs[-1])

    @pytest.mark.parametrize("block", [1, 3, 64])
    @pytest.mark.parametrize("w", [torch.zeros(3, 6), torch.ones(3, 6)], ids=["zero", "ones"])
    def test_full_ties_give_a_permutation(self, w, block):
        order, costs = removal_order(ColumnProblem.of(w, Kronecker(eye(6), eye(3))), block)
        assert sorted(order.tolist()) == list(range(6))
        assert_close(costs, 0.5 * w[:, 0].sum() * torch.arange(1, 7))

    @pytest.mark.parametrize("block", [1, 3, 64])
    def test_dead_columns_go_first_and_cost_nothing(self, block):
        w, curvature = instance((4, 9), condition=100.0)
        dead = [1, 4, 5, 8]
        w[:, dead] = 0
        order, costs = removal_order(ColumnProblem.of(w, curvature), block)
        assert sorted(order[:4].tolist()) == dead
        assert costs[:4].tolist() == [0.0] * 4
        assert sorted(order.tolist()) == list(range(9))
        assert float(costs[4]) > 0

    def test_no_columns(self):
        order, costs = removal_order(ColumnProblem(torch.zeros(0, 0), torch.zeros(0, 0)))
        assert order.shape == costs.shape == (0,)


class TestWithout:
    @metrics
    @conditions
    def test_then_cost_is_the_joint_cost(self, condition, metric):
        problem = ColumnProblem.of(*instance((5, 9), condition=condition, metric=metric))
        first, then = torch.tensor([2, 7, 3]), torch.tensor([8, 0])
        rest = problem.without(first)
        total = torch.tensor(problem.cost(first) + rest.cost(then), dtype=torch.float64)
        assert_close(total, problem.cost(torch.cat([first, then])), condition=condition**2, size=45)

    def test_is_the_problem_of_the_compensated_layer(self):
        w, curvature = instance((5, 9), condition=100.0)
        gone, kept = torch.tensor([1, 6]), torch.tensor([0, 2, 3, 4, 5, 7, 8])
        rest = ColumnProblem.of(w, curvature).without(gone)
        x = dense_minimum(w, curvature, gone.tolist())[0][:, kept]
        assert_close(rest.p[kept][:, kept], torch.linalg.inv(curvature.a[kept][:, kept]), condition=1e4)
        assert_close(rest.m[kept][:, kept], x.T @ curvature.g @ x, condition=1e4)

    def test_twice_is_at_once(self):
        problem = ColumnProblem.of(*instance((5, 9), condition=100.0))
        stepwise = problem.without(torch.tensor([4])).without(torch.tensor([0, 5]))
        once = problem.without(torch.tensor([0, 4, 5]))
        kept = torch.tensor([1, 2, 3, 6, 7, 8])
        for a, b in ((stepwise.p, once.p), (stepwise.m, once.m)):
            assert_close(a[kept][:, kept], b[kept][:, kept], condition=1e4)


class TestWithoutCoupling:
    @pytest.fixture(params=["diagonal", "identity"])
    def separable(self, request):
        w = normal(4, 11, seed=1)
        if request.param == "identity":
            return w, ScaledIdentity(torch.ones((), dtype=torch.float64), (4, 11))
        return w, Diagonal(normal(4, 11, seed=2).square() + 0.01)

    @pytest.mark.parametrize("block", [1, 3, 64])
    def test_order_is_by_own_saliency_and_costs_are_sums(self, separable, block):
        w, curvature = separable
        own = torch.tensor([quadratic(curvature.to_dense(), w * ~without_columns(w, [i])) for i in range(11)])
        order, costs = removal_order(ColumnProblem.of(w, curvature), block)
        assert order.tolist() == sorted(range(11), key=lambda i: float(own[i]))
        assert_close(costs, own[order].double().cumsum(0), working=torch.float32)

    def test_nothing_is_compensated(self, separable):
        w, curvature = separable
        kept = torch.tensor([0, 3, 4, 9])
        assert torch.equal(compensated(w, curvature, kept), w[:, kept])
        expected = constrained_minimum(curvature.to_dense(), w, without_columns(w, [1, 2, 5, 6, 7, 8, 10]))
        assert_close(compensated(w, curvature, kept), expected[0][:, kept])
        cost = ColumnProblem.of(w, curvature).cost(torch.tensor([1, 2, 5, 6, 7, 8, 10]))
        assert cost == pytest.approx(expected[1], rel=1e-12)


class TestUnits:
    UNITS = tuple(torch.arange(i, i + 2) for i in (0, 2, 4, 6, 8))

    @pytest.mark.parametrize("seed", range(5))
    @pytest.mark.parametrize("removed", [1, 2, 3, 4])
    def test_cheapest_is_the_best_of_the_choices(self, removed, seed):
        w, curvature = instance((3, 10), condition=100.0, seed=20 * seed)
        costs = {
            choice: dense_minimum(w, curvature, [c for i in choice for c in (2 * i, 2 * i + 1)])[1]
            for choice in itertools.combinations(range(5), removed)
        }
        problem = ColumnProblem.of(w, curvature)
        assert cheapest(problem, self.UNITS, iter(costs)) == min(costs, key=costs.get)

    def test_cheapest_looks_at_no_other_choice(self):
        problem = ColumnProblem.of(*instance((3, 10)))
        assert cheapest(problem, self.UNITS, [[3, 1]]) == (3, 1)

    @pytest.mark.parametrize("seed", range(5))
    def test_one_of_each_class_given_those_gone_before(self, seed):
        w, curvature = instance((3, 10), condition=100.0, seed=20 * seed)
        problem = ColumnProblem.of(w, curvature)
        classes = [[4, 0], [1, 3], [2]]
        rest, units = cheapest_each(problem, self.UNITS, classes)
        gone = []
        for members, taken in zip(classes, units, strict=True):
            costs = {i: dense_minimum(w, curvature, [*gone, 2 * i, 2 * i + 1])[1] for i in members}
            assert taken == min(costs, key=costs.get)
            gone += [2 * taken, 2 * taken + 1]
        left = torch.tensor([c for c in range(10) if c not in gone])
        joint = problem.cost(torch.cat([torch.tensor(gone), left[:1]])) - problem.cost(torch.tensor(gone))
        assert rest.cost(left[:1]) == pytest.approx(joint, rel=1e-8)
