"""Loss curves from a sample of rows and columns."""

import pytest
import torch
from oracles import assert_close, normal

from kfac_prune import curves
from kfac_prune.curves import CURVE_POINTS, sampled_losses
from kfac_prune.obs import FAST, Unstructured, solve
from kfac_prune.operators import Kronecker


def correlated(n, seed):
    """A covariance whose eigenvalues fall as those of activations do, damped."""
    x = normal(4 * n, n, seed=seed) @ torch.diag(torch.arange(1.0, n + 1, dtype=torch.float64) ** -0.5)
    turned = x @ torch.linalg.qr(normal(n, n, seed=seed + 1)).Q
    a = turned.mT @ turned / (4 * n)
    return a + 0.03 * a.diagonal().mean() * torch.eye(n, dtype=torch.float64)


def test_a_small_layer_is_solved_whole():
    operator, weight = Kronecker(correlated(48, 1), correlated(32, 2)), normal(32, 48, seed=3)
    assert sampled_losses(weight, operator) == [
        solve(weight, operator, Unstructured(s), FAST).loss for s in CURVE_POINTS
    ]


@pytest.mark.parametrize("shape", [(192, 320), (48, 256)], ids=str)
def test_a_sample_stands_for_the_whole(shape):
    rows, columns = shape
    operator, weight = Kronecker(correlated(columns, 1), correlated(rows, 5)), normal(*shape, seed=9)
    whole = [solve(weight, operator, Unstructured(s), FAST).loss for s in CURVE_POINTS]
    for sampled, exact, most in zip(sampled_losses(weight, operator), whole, (0.1, 0.2, 0.25, 0.4), strict=True):
        assert 1 - most < sampled / exact < 1 + most


def test_uncorrelated_weights_are_exact_up_to_the_sampled_ratio():
    """H diagonal: saliencies add up, so that the ratio is one whatever the sample."""
    a, g = (torch.diag(normal(n, seed=n).square() + 0.1) for n in (200, 160))
    operator, weight = Kronecker(a, g), normal(160, 200, seed=1)
    ordered = (0.5 * weight.square() * operator.diagonal()).reshape(-1).sort().values
    exact = [float(ordered[: round(s * len(ordered))].sum()) for s in CURVE_POINTS]
    assert sampled_losses(weight, operator) == pytest.approx(exact, rel=1e-3)


def test_points_are_fractions_of_what_is_not_zero_yet():
    """Half of the inputs are gone: what is left is a layer of half the width."""
    a, g, weight = correlated(320, 1), correlated(160, 2), normal(160, 320, seed=3)
    a[:, ::2] = a[::2] = 0
    a += torch.diag(torch.arange(320) % 2 == 0) * a.diagonal().max()
    weight[:, ::2] = 0
    operator, rest = Kronecker(a, g), Kronecker(a[1::2, 1::2].contiguous(), g)
    assert curves.zeros_of(weight) == 0.5
    assert curves.sparsities(0.5) == [0.65, 0.75, 0.85, 0.95]
    whole = [solve(weight[:, 1::2].contiguous(), rest, Unstructured(s), FAST).loss for s in CURVE_POINTS]
    for sampled, exact, most in zip(sampled_losses(weight, operator), whole, (0.1, 0.2, 0.25, 0.4), strict=True):
        assert 1 - most < sampled / exact < 1 + most


def test_the_sample_does_not_depend_on_the_process_or_the_generator():
    torch.manual_seed(1)
    one = curves._some(300, torch.device("cpu"))
    torch.manual_seed(2)
    assert torch.equal(one, curves._some(300, torch.device("cpu")))
    assert [curves.sampled(width) for width in (48, 100, 300, 4096)] == [48, 64, 150, 512]


def test_a_restricted_curvature_is_a_principal_part():
    operator = Kronecker(correlated(7, 1), correlated(5, 2))
    rows, columns = torch.tensor([0, 2, 3]), torch.tensor([1, 6])
    positions = (rows[:, None] * 7 + columns).reshape(-1)
    assert_close(operator.restricted(rows, columns).to_dense(), operator.to_dense()[positions][:, positions])
    layerwise = Kronecker(operator.a, None, out_features=5)
    assert_close(layerwise.restricted(rows, columns).to_dense(), layerwise.to_dense()[positions][:, positions])
