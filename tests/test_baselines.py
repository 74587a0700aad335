"""The baselines for trained networks against plain renditions of their papers."""

import dataclasses
import itertools

import pytest
import torch
from oracles import DTYPE_IDS, DTYPES, assert_close, constrained_minimum, eye, normal, quadratic, spd

from kfac_prune.baselines import alps, llm_surgeon, owl, sparsegpt, wanda
from kfac_prune.curvature.estimate import estimate_factors
from kfac_prune.curvature.factors import FactorShelf
from kfac_prune.errors import InputError
from kfac_prune.models import WeightSwap, prunable_layers
from kfac_prune.obs import NM, Unstructured, compensate
from kfac_prune.operators import Damping, Kronecker
from kfac_prune.plan import make_plan

SHAPES = [(1, 1), (7, 1), (1, 5), (5, 16), (6, 37), (3, 128), (4, 271)]
PATTERNS = [
    Unstructured(0.0),
    Unstructured(0.5),
    Unstructured(0.77),
    NM(2, 4),
    NM(1, 2),
    NM(3, 7),
    NM(16, 24),
    NM(40, 64),
]

shapes = pytest.mark.parametrize("shape", SHAPES, ids="{0[0]}x{0[1]}".format)
patterns = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


def problem(shape, *, seed=0, dead=()):
    """W and A in float64; the named inputs never fire."""
    a = spd(shape[1], condition=50.0, seed=seed)
    a[list(dead)], a[:, list(dead)] = 0, 0
    return normal(*shape, seed=seed + 1), a


def smallest(scores, count):
    """The positions of the smallest entries, by sorting Python numbers."""
    return sorted(range(len(scores)), key=lambda i: float(scores[i]))[: max(count, 0)]


def column_by_column(weight, a, pattern):
    """Column after column; elimination gives the inverse Hessian of those that are left (eq. 4 of the paper)."""
    rows, width = weight.shape
    dead = a.diagonal() == 0
    h = a + 0.01 * a.diagonal().mean() * eye(width)
    inverses = [torch.linalg.inv(h)]
    for _ in range(width - 1):
        last = inverses[-1]
        inverses.append(last[1:, 1:] - torch.outer(last[1:, 0], last[0, 1:]) / last[0, 0])
    pivots = torch.stack([inverse[0, 0] for inverse in inverses])
    x, kept = torch.where(dead, 0.0, weight), torch.ones(rows, width, dtype=torch.bool)
    unit = pattern.m if isinstance(pattern, NM) else 128
    for j in range(width):
        if j % unit == 0:
            scores = x[:, j : j + unit] ** 2 / pivots[j : j + unit]
            if isinstance(pattern, NM):
                for r in range(rows):
                    kept[r, [j + i for i in smallest(scores[r], scores.shape[1] - pattern.n)]] = False
            else:
                gone = smallest(scores.reshape(-1), min(round(pattern.sparsity * scores.numel()), scores.numel() - 1))
                for i in gone:
                    kept[i // scores.shape[1], j + i % scores.shape[1]] = False
        error = torch.where(kept[:, j], 0.0, x[:, j]) / pivots[j]
        x[:, j:] -= torch.outer(error, inverses[j][0])
        x[~kept[:, j], j] = 0.0
    return x, kept & ~dead


class TestSparseGPT:
    @shapes
    @patterns
    def test_is_the_algorithm_of_the_paper(self, pattern, shape):
        w, a = problem(shape)
        x, mask, record = sparsegpt(w, a, pattern)
        expected, kept = column_by_column(w, a, pattern)
        assert torch.equal(mask, kept)
        assert_close(x, expected, condition=50.0)
        assert (record.relative, record.raised) == (0.01, False)

    def test_float32_chooses_the_same_weights(self):
        w, a = problem((40, 300))
        for pattern in PATTERNS[1:]:
            x, mask, _ = sparsegpt(w.float(), a.float(), pattern)
            exact, kept, _ = sparsegpt(w, a, pattern)
            assert x.dtype == torch.float32
            assert float((mask != kept).double().mean()) < 1e-3
            assert float((x - exact).norm()) < 0.05 * float(exact.norm())

    @pytest.mark.parametrize("pattern", [NM(2, 4), NM(3, 7), Unstructured(0.6)], ids=str)
    def test_nothing_is_left_off_the_mask_and_the_arguments_stay(self, pattern):
        w, a = problem((9, 271))
        before = w.clone(), a.clone()
        x, mask, _ = sparsegpt(w, a, pattern)
        assert torch.equal(x != 0, mask)
        assert torch.equal(w, before[0])
        assert torch.equal(a, before[1])

    @pytest.mark.parametrize("pattern", PATTERNS, ids=str)
    def test_identity_is_magnitude_per_block(self, pattern):
        w = normal(6, 300, seed=3)
        x, mask, _ = sparsegpt(w, 3.0 * eye(300), pattern)
        width = 128 if isinstance(pattern, Unstructured) else 300
        expected = torch.cat([pattern.project(part.abs()) for part in w.split(width, dim=1)], dim=1)
        assert torch.equal(mask, expected)
        assert torch.equal(x, w * mask)

    @pytest.mark.parametrize("pattern", PATTERNS[1:], ids=str)
    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_no_better_than_exact_compensation_on_its_mask(self, seed, pattern):
        w, a = problem((4, 21), seed=seed)
        x, mask, _ = sparsegpt(w, a, pattern)
        h = Kronecker(a + 0.01 * a.diagonal().mean() * eye(21), None, out_features=4)
        _, least = constrained_minimum(h.to_dense(), w, mask)
        own = quadratic(h.to_dense(), x - w)
        assert least <= own * (1 + 1e-12)
        assert own <= quadratic(h.to_dense(), w * mask - w) * 1.5  # it does compensate
        assert compensate(w, h, mask).loss <= own * (1 + 1e-12)

    def test_one_column_left_is_solved_exactly(self):
        """With one weight removed in the first column, the sweep is the Optimal Brain Surgeon's update."""
        w, a = problem((1, 2))
        w[0, 0] = 0.01
        x, mask, _ = sparsegpt(w, a, Unstructured(0.5))
        assert mask.tolist() == [[False, True]]
        h = a + 0.01 * a.diagonal().mean() * eye(2)
        assert_close(x, constrained_minimum(h, w, mask)[0], condition=50.0)

    def test_an_input_that_is_nothing_is_refused_by_name(self):
        with pytest.raises(InputError, match=r"layer blocks\.3\.up: its curvature factor A is zero"):
            sparsegpt(torch.ones(2, 3), torch.zeros(3, 3), NM(1, 2), where="blocks.3.up")


class TestWanda:
    @pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
    @shapes
    @patterns
    def test_every_row_keeps_its_best(self, pattern, shape, dtype):
        w, a = problem(shape)
        mask = wanda(w.to(dtype), a.to(dtype), pattern)
        rows, width = shape
        for r in range(rows):
            scores = [abs(float(w[r, j])) * float(a[j, j]) ** 0.5 for j in range(width)]
            if isinstance(pattern, NM):
                groups = [range(s, min(s + pattern.m, width)) for s in range(0, width, pattern.m)]
                gone = {g[i] for g in groups for i in smallest([scores[j] for j in g], len(g) - pattern.n)}
            else:
                gone = set(smallest(scores, min(round(pattern.sparsity * width), width - 1)))
            assert {j for j in range(width) if not mask[r, j]} == gone

    def test_loud_inputs_are_kept(self):
        w = torch.tensor([[1.0, 0.5]])
        assert wanda(w, torch.diag(torch.tensor([1.0, 9.0])), Unstructured(0.5)).tolist() == [[False, True]]
        assert wanda(w, torch.eye(2), Unstructured(0.5)).tolist() == [[True, False]]


@pytest.mark.parametrize("dead", [(0, 1, 2), (5,), (4, 5, 6, 7), tuple(range(17))], ids=str)
@pytest.mark.parametrize("width", [16, 18, 19, 23])
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(4, 8), NM(3, 7)], ids=str)
def test_dead_inputs_and_odd_widths_leave_a_valid_pattern(pattern, width, dead):
    """More dead inputs in a group than are removed, whole dead groups, a short last group."""
    dead = [d for d in dead if d < width - 1]
    w, a = problem((5, width), dead=dead)
    x, mask, _ = sparsegpt(w, a, pattern)
    for m in (mask, x != 0, wanda(w, a, pattern)):
        assert all(int(g.sum(1).max()) <= pattern.n for g in m.split(pattern.m, dim=1))
    assert not x[:, dead].any()
    assert not mask[:, dead].any()
    alive = [j for j in range(width) if j not in dead]
    expected = [
        min(pattern.n, sum(start <= j < start + pattern.m for j in alive)) for start in range(0, width, pattern.m)
    ]
    assert [[int(n) for n in row] for row in torch.stack([g.sum(1) for g in mask.split(pattern.m, dim=1)]).T] == [
        expected
    ] * 5
    live = wanda(w, a, pattern)[:, alive]
    assert [int(n) for n in live.sum(1)] == [sum(expected)] * 5  # dead inputs never displace live ones


def admm_by_solving(weight, a, pattern):
    """Meng et al. 2024 in columns, as in the paper, with a linear system solved at every X step."""
    h = a + 0.01 * a.diagonal().mean() * eye(len(a))
    e = torch.diag(h.diagonal().rsqrt())
    h, w_hat = e @ h @ e, torch.linalg.inv(e) @ weight.T
    d, v, rho = w_hat.clone(), torch.zeros_like(w_hat), 0.1
    last = torch.ones_like(d, dtype=torch.bool)
    for t in range(1, 301):
        w = torch.linalg.solve(h + rho * eye(len(a)), h @ w_hat - v + rho * d)
        kept = pattern.project(((w + v / rho) ** 2).T).T
        d = torch.where(kept, w + v / rho, 0.0)
        v = v + rho * (w - d)
        if t % 3 == 0:
            change = int((kept != last).sum())
            if change == 0:
                break
            share = change / int(kept.sum())
            rho *= 1.3 if share >= 0.1 else 1.2 if share >= 0.005 else 1.1
            last = kept
    return (e @ d).T, kept.T


class TestAlps:
    @pytest.mark.parametrize("shape", [(1, 5), (5, 16), (6, 37), (31, 24)], ids="{0[0]}x{0[1]}".format)
    @pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.77), NM(2, 4), NM(3, 7)], ids=str)
    def test_the_mask_is_that_of_the_paper_and_the_weights_are_refined(self, pattern, shape):
        w, a = problem(shape)
        x, mask, record = alps(w, a, pattern)
        start, kept = admm_by_solving(w, a, pattern)
        assert torch.equal(mask, kept)
        assert not x[~mask].any()
        assert record.relative == 0.01
        h = torch.kron(eye(shape[0]), a + 0.01 * a.diagonal().mean() * eye(shape[1]))
        best, _ = constrained_minimum(h, w, mask)
        least, reached, before = (float(quadratic(h, point - w)) for point in (best, x, start))
        assert least <= reached * (1 + 1e-9)
        assert reached <= before * (1 + 1e-9)
        assert reached <= 1.02 * least

    def test_it_beats_one_sweep(self):
        w, a = problem((30, 60))
        for pattern in (Unstructured(0.7), NM(2, 4)):
            found = [float(quadratic(torch.kron(eye(30), a), f(w, a, pattern)[0] - w)) for f in (alps, sparsegpt)]
            assert found[0] < found[1]

    def test_a_mask_that_keeps_all_changes_nothing(self):
        w, a = problem((4, 6))
        assert_close(alps(w, a, Unstructured(0.0))[0], w, condition=50.0)

    def test_a_zero_factor_is_refused(self):
        with pytest.raises(InputError, match=r"layer q_proj: .* factor A is zero"):
            alps(normal(2, 3, seed=0), torch.zeros(3, 3, dtype=torch.float64), Unstructured(0.5), where="q_proj")


class TestOwl:
    def blocks(self, outliers, shapes=None):
        """Blocks of one layer with inputs of unit norm, so many of whose weights are a hundred, the others one."""
        made = {}
        for i, count in enumerate(outliers):
            w = torch.ones((shapes or {}).get(i, (10, 10)), dtype=torch.float64)
            w.view(-1)[:count] = -100.0
            made[f"block{i}"] = {f"layer{i}": (w, torch.ones_like(w[0]))}
        return made

    def test_is_linear_in_the_share_of_outliers(self):
        """Shares 0, 2 and 10 % (with means below 11, 100 is beyond five times them); mean 4 %, farthest 6 %."""
        found = owl(self.blocks([0, 2, 10]), 0.7)
        expected = [0.7 + 0.08 * 4 / 6, 0.7 + 0.08 * 2 / 6, 0.7 - 0.08]
        assert list(found.values()) == pytest.approx(expected)

    def test_no_sparsity_is_below_zero_by_rounding(self):
        for seed in range(100):
            weights = [normal(16, 16, seed=4 * seed + i) ** 3 for i in range(4)]
            found = owl({f"block{i}": {f"layer{i}": (w, torch.ones_like(w[0]))} for i, w in enumerate(weights)}, 0.05)
            assert all(one >= 0 for one in found.values())

    @pytest.mark.parametrize("sparsity", [0.0, 0.02, 0.5, 0.97, 0.999])
    def test_the_whole_has_the_sparsity_asked_for(self, sparsity):
        blocks = self.blocks([0, 3, 10], {1: (20, 30)})
        found = owl(blocks, sparsity)
        sizes = [100, 600, 100]
        total = sum(n * s for n, s in zip(sizes, found.values(), strict=True))
        assert total == pytest.approx(sparsity * sum(sizes))
        assert all(0 <= s < 1 and abs(s - sparsity) <= 0.08 + 1e-12 for s in found.values())

    def test_equal_blocks_share_evenly(self):
        assert set(owl(self.blocks([3, 3]), 0.6).values()) == {0.6}

    def test_layers_of_a_block_have_one_sparsity_in_a_plan(self, make_model, make_windows):
        model = make_model("llama")
        layers = prunable_layers(model)
        factors = estimate_factors(model, layers, make_windows(count=20, length=12))
        plan = make_plan(layers, factors, sparsity=0.6, method="magnitude", allocation="owl")
        assert plan.sparsity == pytest.approx(0.6, abs=1e-3)
        blocks = [[p.sparsity for p in plan.layers if f"layers.{i}." in p.name] for i in range(2)]
        assert abs(blocks[0][0] - blocks[1][0]) > 0.01
        for found in blocks:
            assert max(found) - min(found) < 2e-3  # a weight of the smallest layer


class TestLlmSurgeon:
    @pytest.fixture
    def trial(self, model, make_windows):
        """The layers of a small model, and its factors as it is."""
        windows, layers = make_windows(count=20, length=12), prunable_layers(model)
        return layers, lambda: estimate_factors(model, layers, windows)

    def test_one_shot_is_the_joint_optimum_on_the_smallest_saliencies(self, trial):
        layers, estimate = trial
        factors, before = estimate(), [layer.weight.clone() for layer in layers]
        masks = llm_surgeon(layers, estimate, sparsity=0.4, shots=1)
        scores = {}
        for layer, w in zip(layers, before, strict=True):
            operator, _ = factors.layers[layer.name].operator("kfac", Damping(0.01), where="", dtype=torch.float64)
            inverses = [torch.linalg.inv(f).diagonal() for f in (operator.g, operator.a)]
            scores[layer.name] = w.double() ** 2 / torch.outer(*inverses) / 2
            if layer is layers[-1]:
                h = operator.to_dense()
        threshold = sorted(torch.cat([s.flatten() for s in scores.values()]).tolist())
        threshold = threshold[round(0.4 * len(threshold))]
        for name, score in scores.items():
            clear = (score / threshold - 1).abs() > 1e-3  # float32 may decide the others either way
            assert torch.equal(masks[name][clear], (score >= threshold)[clear])
        best, _ = constrained_minimum(h, before[-1].double(), masks[layers[-1].name])
        reached, least = (
            float(quadratic(h, x - before[-1].double())) for x in (layers[-1].weight.double(), best)
        )  # fmt: skip
        assert least * (1 - 1e-6) <= reached <= 1.01 * least

    @pytest.mark.parametrize("together", [True, False])
    def test_shots_end_at_the_sparsity_and_nothing_comes_back(self, trial, together):
        layers, estimate = trial
        seen = []

        def noted():
            seen.append([layer.weight == 0 for layer in layers])
            return estimate()

        masks = llm_surgeon(layers, noted, sparsity=0.6, shots=3, together=together)
        seen.append([~masks[layer.name] for layer in layers])
        total = sum(layer.weight.numel() for layer in layers)
        shares = [sum(int(z.sum()) for z in zeros) / total for zeros in seen]
        assert shares == pytest.approx([0.0, 0.2, 0.4, 0.6], abs=len(layers) / total)
        for earlier, later in itertools.pairwise(seen):
            assert all(bool((b | ~a).all()) for a, b in zip(earlier, later, strict=True))
        assert all(torch.equal(layer.weight != 0, masks[layer.name]) for layer in layers)
        if not together:
            assert all(float(z.float().mean()) == pytest.approx(0.6, abs=0.01) for z in seen[-1])

    def test_factors_may_wait_off_the_device(self, trial):
        layers, estimate = trial
        dense = WeightSwap(layers)
        whole = llm_surgeon(layers, estimate, sparsity=0.6, shots=2)
        dense.restore()

        def shelved():
            factors = estimate()
            shelf = FactorShelf(torch.device("cpu"), on_disk=False)
            shelf.update(factors.layers)
            return dataclasses.replace(factors, layers=shelf)

        waiting = llm_surgeon(layers, shelved, sparsity=0.6, shots=2)
        assert all(torch.equal(waiting[name], mask) for name, mask in whole.items())

    @pytest.mark.parametrize(("n", "m", "shots"), [(2, 4, 2), (1, 2, 1), (2, 7, 5), (1, 7, 5)])
    def test_patterns_are_valid_and_take_no_more_shots_than_they_can(self, trial, n, m, shots):
        layers, estimate = trial
        calls, pattern = [], NM(n, m)
        masks = llm_surgeon(layers, lambda: (calls.append(1), estimate())[1], sparsity=0.1, pattern=pattern)
        assert len(calls) == shots
        for layer in layers:
            assert pattern.is_valid(layer.weight != 0)
            assert int(masks[layer.name].sum()) == layer.shape[0] * pattern.kept_of(layer.shape[1])

    def test_a_plan_leaves_the_model_dense_and_prices_what_it_made(self, trial):
        layers, estimate = trial
        factors, before = estimate(), [p.data.clone() for layer in layers for p in layer.parameters()]
        plan = make_plan(layers, factors, sparsity=0.5, method="llm-surgeon", allocation="global", estimate=estimate)
        assert all(map(torch.equal, before, (p.data for layer in layers for p in layer.parameters())))
        assert plan.sparsity == pytest.approx(0.5, abs=1e-3)
        swap = WeightSwap(layers)
        llm_surgeon(layers, estimate, sparsity=0.5)
        for layer, made in zip(layers, plan.layers, strict=True):
            assert torch.equal(layer.weight, made.weight)
            if made.bias is not None:
                assert_close(layer.bias, made.bias, working=torch.float32)
        swap.restore()
        best = make_plan(layers, factors, sparsity=0.5, allocation="curves")
        assert 0 < best.predicted < plan.predicted  # under the same curvature, with the better mask

    def test_a_plan_needs_an_estimate(self, trial):
        layers, estimate = trial
        with pytest.raises(InputError, match="give make_plan an estimate"):
            make_plan(layers, estimate(), method="llm-surgeon", allocation="global")
