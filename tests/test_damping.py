"""Damping adds a stated multiple of the identity, and nothing else."""

import math

import pytest
import torch
from oracles import DTYPE_IDS, DTYPES, assert_close, eye, normal, spd

from kfac_prune.errors import InputError
from kfac_prune.operators import Damping, DampingRecord

WHERE = "model.layers.3.mlp.down_proj"


def with_eigenvalues(values, seed=0):
    q, _ = torch.linalg.qr(normal(len(values), len(values), seed=seed))
    matrix = q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.T
    return (matrix + matrix.T) / 2


def assert_only_the_diagonal_moved(damped, factor, shift):
    off = ~torch.eye(len(factor), dtype=torch.bool)
    assert torch.equal(damped[off], factor[off])
    assert torch.equal(damped.diagonal(), factor.diagonal() + shift)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("n", [1, 7, 12])
@pytest.mark.parametrize("relative", [1e-4, 0.03, 1.0])
def test_adds_the_multiple_of_the_mean_diagonal(n, relative, dtype):
    factor = spd(n, condition=1e3, seed=n, dtype=dtype, largest=1e-3)
    before = factor.clone()
    damped, record = Damping(relative)(factor, name="A", where=WHERE)
    assert torch.equal(factor, before)
    assert damped.dtype == dtype
    assert_only_the_diagonal_moved(damped, factor, relative * float(factor.diagonal().mean()))
    assert_close(damped, factor.double() + relative * float(torch.trace(factor.double())) / n * eye(n))
    assert record == DampingRecord("A", relative, raised=False, smallest_eigenvalue=None)


def test_blocks_share_one_shift():
    """Of the mean over the entries that are weights; the last rows of the second block are none."""
    blocks = torch.stack([spd(4, seed=1), 5 * spd(4, seed=2), spd(4, seed=3)])
    blocks[1, 2:] = blocks[1, :, 2:] = 0
    damped, record = Damping(0.1)(blocks, name="H", where=WHERE, entries=10)
    shift = 0.1 * float(blocks.diagonal(dim1=1, dim2=2).sum()) / 10
    assert_close(damped, blocks + shift * eye(4))
    assert record == DampingRecord("H", 0.1)


def test_the_worst_block_raises_it():
    blocks = torch.stack([spd(3), with_eigenvalues([-0.2, 0.5, 2.7])])
    mean = float(blocks.diagonal(dim1=1, dim2=2).mean())
    damped, record = Damping(0.03)(blocks, name="H", where=WHERE)
    assert (record.relative, record.raised) == (0.3, True)
    assert record.smallest_eigenvalue == pytest.approx(-0.2)
    assert_close(damped, blocks + 0.3 * mean * eye(3))


@pytest.mark.parametrize("mean", [0.0, -1.0, math.nan, math.inf])
def test_of_a_mean_that_says_nothing(mean):
    assert Damping(0.2).of_mean(3.0, name="H", where=WHERE) == (pytest.approx(0.6), DampingRecord("H", 0.2))
    with pytest.raises(InputError, match=f"layer {WHERE}: its curvature factor H"):
        Damping(0.2).of_mean(mean, name="H", where=WHERE)


def test_default():
    _, record = Damping()(spd(3), name="G", where=WHERE)
    assert (record.factor, record.relative) == ("G", 0.03)


def test_singular_factor_needs_no_more():
    factor = torch.zeros(5, 5, dtype=torch.float64)
    factor[:2, :2] = spd(2)
    damped, record = Damping(0.01)(factor, name="A", where=WHERE)
    assert not record.raised
    assert float(torch.linalg.eigvalsh(damped)[0]) > 0


@pytest.mark.parametrize(
    ("lowest", "start", "expected"),
    [(-0.2, 0.03, 0.3), (-0.2, 0.01, 1.0), (-0.08, 0.01, 0.1), (-0.8, 0.05, 1.0)],
    ids=["one-step", "two-steps", "one-step-lower", "to-the-cap"],
)
def test_raised_on_an_indefinite_factor(lowest, start, expected):
    values = [lowest, 0.5, 1.0, 4.0 - lowest - 1.5]  # mean one
    factor = with_eigenvalues(values)
    damped, record = Damping(start)(factor, name="G", where=WHERE)
    assert record.raised
    assert record.relative == pytest.approx(expected, rel=1e-12)
    assert record.smallest_eigenvalue == pytest.approx(lowest, rel=1e-12)
    assert_only_the_diagonal_moved(damped, factor, record.relative * float(factor.diagonal().mean()))
    assert float(torch.linalg.eigvalsh(damped)[0]) > 0


@pytest.mark.parametrize("name", ["A", "G", "H"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: f.index_put_((torch.tensor(1), torch.tensor(2)), torch.tensor(math.nan)), "NaN or infinity"),
        (lambda f: f.index_put_((torch.tensor(0), torch.tensor(0)), torch.tensor(math.inf)), "NaN or infinity"),
        (lambda f: f.index_put_((torch.tensor(2), torch.tensor(2)), torch.tensor(-math.inf)), "NaN or infinity"),
        (lambda f: f.zero_(), "is zero"),
        (lambda f: f.copy_(torch.diag(torch.tensor([-5.0, 6.0, 5.0]))), r"not positive definite .*-5.*mean diagonal 2"),
    ],
    ids=["nan", "inf", "minus-inf", "zero", "indefinite"],
)
def test_hopeless_factor_is_named(name, spoil, message):
    with pytest.raises(InputError, match=message) as error:
        Damping()(spoil(spd(3, dtype=torch.float32)), name=name, where=WHERE)
    assert WHERE in str(error.value)
    assert f"factor {name} " in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("relative", [0.0, -0.1, 1.5, math.nan, math.inf])
def test_invalid_relative(relative):
    with pytest.raises(ValueError, match="damping is"):
        Damping(relative)
