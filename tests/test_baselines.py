"""SparseGPT and Wanda against plain renditions of their papers."""

import pytest
import torch
from oracles import DTYPE_IDS, DTYPES, assert_close, constrained_minimum, eye, normal, quadratic, spd

from kfac_prune.baselines import sparsegpt, wanda
from kfac_prune.errors import InputError
from kfac_prune.obs import NM, Unstructured, compensate
from kfac_prune.operators import Kronecker

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
