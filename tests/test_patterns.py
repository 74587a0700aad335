"""Patterns: exact counts, valid groups, maximal kept score."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import masks_n_of_m, masks_of_size, normal

from kfac_prune.obs import NM, Unstructured

SHAPES = [(1, 1), (1, 7), (5, 1), (13, 17), (24, 10)]
WIDTHS = [1, 3, 5, 7, 13, 17, 172]
NMS = [NM(1, 2), NM(2, 4), NM(4, 8), NM(3, 7), NM(5, 12)]
SCORES = {
    "distinct": lambda shape: normal(*shape, seed=0).square(),
    "ties": lambda shape: normal(*shape, seed=0).abs().round(),
    "zeros": torch.zeros,
    "equal": torch.ones,
    "transposed": lambda shape: normal(*shape[::-1], seed=0).abs().round().T,
    "one-large": lambda shape: torch.zeros(shape).index_put_((torch.tensor(0), torch.tensor(-1)), torch.tensor(2.0)),
}
shape_id = "{0[0]}x{0[1]}".format
nm_id = "{0.n}:{0.m}".format
kinds = pytest.mark.parametrize("kind", SCORES)
few = settings(max_examples=60, deadline=None, derandomize=True)


def kept_per_group(mask, m):
    """Kept weights and size of every group, row by row, counted one by one."""
    for row in mask.tolist():
        for start in range(0, len(row), m):
            group = row[start : start + m]
            yield sum(group), len(group)


@kinds
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.77, 0.9])
def test_unstructured_keeps_exactly_the_count(sparsity, shape, kind):
    scores = SCORES[kind](shape)
    before = scores.clone()
    mask = Unstructured(sparsity).project(scores)
    assert mask.dtype == torch.bool
    assert mask.shape == shape
    assert torch.equal(scores, before)
    n = scores.numel()
    assert int(mask.sum()) == max(n - round(sparsity * n), 1)
    ordered = sorted(scores.reshape(-1).tolist(), reverse=True)
    assert float(scores[mask].sum()) == pytest.approx(sum(ordered[: int(mask.sum())]), rel=1e-12)
    if not mask.all():
        assert scores[mask].min() >= scores[~mask].max()


def test_unstructured_ties_go_to_the_earlier_position():
    scores = torch.tensor([[1.0, 2.0, 1.0], [1.0, 0.0, 1.0]])
    assert Unstructured(0.5).project(scores).tolist() == [[True, True, True], [False, False, False]]
    assert Unstructured(0.5).project(scores.T.contiguous().T).tolist() == [[True, True, True], [False, False, False]]


def test_unstructured_always_keeps_one():
    assert int(Unstructured(0.999).project(torch.rand(2, 3)).sum()) == 1


@kinds
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("pattern", NMS, ids=nm_id)
def test_nm_keeps_n_of_every_group(pattern, width, kind):
    scores = SCORES[kind]((3, width))
    mask = pattern.project(scores)
    assert mask.dtype == torch.bool
    assert mask.shape == scores.shape
    assert pattern.is_valid(mask)
    for kept, size in kept_per_group(mask, pattern.m):
        assert kept == min(pattern.n, size)
    for start in range(0, width, pattern.m):
        group, chosen = scores[:, start : start + pattern.m], mask[:, start : start + pattern.m]
        for row, keep in zip(group, chosen, strict=True):
            assert sorted(row[keep].tolist()) == sorted(row.tolist())[len(row) - int(keep.sum()) :]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("pattern", NMS, ids=nm_id)
def test_nm_is_valid_counts_groups(pattern, width):
    mask = normal(40, width, seed=width) > 0.3
    for row in mask:
        expected = all(kept <= pattern.n for kept, _ in kept_per_group(row[None], pattern.m))
        assert pattern.is_valid(row[None]) == expected
    assert pattern.is_valid(torch.zeros(2, width, dtype=torch.bool))
    assert pattern.is_valid(torch.ones(2, width, dtype=torch.bool)) == (width <= pattern.n)


@pytest.mark.parametrize(
    ("pattern", "shape", "masks"),
    [
        (Unstructured(0.5), (2, 5), lambda: masks_of_size((2, 5), 5)),
        (Unstructured(0.7), (3, 3), lambda: masks_of_size((3, 3), 3)),
        (NM(2, 4), (2, 6), lambda: masks_n_of_m((2, 6), 2, 4)),
        (NM(1, 2), (2, 5), lambda: masks_n_of_m((2, 5), 1, 2)),
        (NM(3, 7), (1, 10), lambda: masks_n_of_m((1, 10), 3, 7)),
    ],
    ids=["5-of-10", "3-of-9", "2:4", "1:2", "3:7"],
)
@pytest.mark.parametrize("seed", range(3))
def test_projection_is_maximal(pattern, shape, masks, seed):
    scores = normal(*shape, seed=seed).square()
    chosen = pattern.project(scores)
    best = max(float(scores[mask].sum()) for mask in masks())
    assert any(torch.equal(chosen, mask) for mask in masks())
    assert float(scores[chosen].sum()) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_unstructured_refuses(sparsity):
    with pytest.raises(ValueError, match="sparsity is"):
        Unstructured(sparsity)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4), (-1, 2), (1, 1)])
def test_nm_refuses(n, m):
    with pytest.raises(ValueError, match=f"pattern {n}:{m}"):
        NM(n, m)


@pytest.mark.parametrize("pattern", NMS, ids=nm_id)
def test_nm_sparsity_is_what_whole_groups_lose(pattern):
    mask = pattern.project(torch.rand(2, 3 * pattern.m))
    assert pattern.sparsity == Fraction(int((~mask).sum()), mask.numel())


@st.composite
def score_matrices(draw):
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 11))
    entry = st.one_of(st.just(0.0), st.sampled_from([1.0, 2.0]), st.floats(2**-10, 1e6, width=32))
    values = draw(st.lists(entry, min_size=rows * columns, max_size=rows * columns))
    matrix = torch.tensor(values).reshape(rows, columns)
    return matrix.T if draw(st.booleans()) else matrix


@few
@given(scores=score_matrices(), sparsity=st.floats(0, 1, exclude_max=True))
def test_unstructured_property(scores, sparsity):
    mask = Unstructured(sparsity).project(scores)
    assert int(mask.sum()) == max(scores.numel() - round(sparsity * scores.numel()), 1)
    assert mask.all() or scores[mask].min() >= scores[~mask].max()


@few
@given(scores=score_matrices(), m=st.integers(2, 9), data=st.data())
def test_nm_property(scores, m, data):
    pattern = NM(data.draw(st.integers(1, m - 1)), m)
    mask = pattern.project(scores)
    assert all(kept == min(pattern.n, size) for kept, size in kept_per_group(mask, m))
    for start in range(0, scores.shape[1], m):
        for row, keep in zip(scores[:, start : start + m], mask[:, start : start + m], strict=True):
            assert keep.all() or row[keep].min() >= row[~keep].max()


@few
@given(scores=score_matrices(), power=st.integers(-8, 8))
def test_projection_ignores_the_unit_of_the_scores(scores, power):
    for pattern in (Unstructured(0.4), NM(2, 4)):
        assert torch.equal(pattern.project(scores), pattern.project(scores * 2.0**power))
