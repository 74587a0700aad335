"""Training of kept weights with masks fixed: units, masks, layers without weights."""

import pytest
import torch
from conftest import build

from kfac_prune.errors import InputError
from kfac_prune.masked_training import MaskedParameters, adam, mean_everywhere
from kfac_prune.models import prunable_layers


def layer(dtype=torch.float32):
    """One with a bias, half of its weights pruned, and the mask [out, in]."""
    chosen = next(layer for layer in prunable_layers(build("opt", dtype=dtype)) if layer.name.endswith("fc1"))
    mask = chosen.weight.abs() >= chosen.weight.abs().median()
    chosen.assign(chosen.weight * mask, torch.ones_like(chosen.bias))
    return chosen, mask


def step(weights, total, rate=0.01):
    """One step of Adam on a sum."""
    copies = weights.copies()
    optimizer = adam(copies, rate, (0.9, 0.95))
    mean = weights.differentiate(total(), 4, copies)
    optimizer.step()
    weights.take_over(copies)
    return float(mean)


def test_steps_are_relative_to_the_kept_weights():
    moved = []
    for scale in (1.0, 8.0):
        chosen, mask = layer()
        chosen.assign(chosen.weight * scale, chosen.bias)
        before, weights = chosen.weight.clone(), MaskedParameters([chosen], {chosen.name: mask})
        mean = step(weights, lambda c=chosen: (3 * c.module.weight).sum() + c.module.bias.sum())
        assert mean == pytest.approx(float(3 * before.sum() + chosen.bias.numel()) / 4, abs=1e-3)
        moved.append((chosen.weight - before)[mask])
        size = float(before[mask].square().mean().sqrt())
        torch.testing.assert_close(moved[-1], torch.full_like(moved[-1], -0.01 * size), rtol=1e-3, atol=1e-6)
        assert bool((chosen.weight[~mask] == 0).all())
    torch.testing.assert_close(8 * moved[0], moved[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_bias_of_a_layer_without_weights_learns(dtype):
    chosen, _ = layer(dtype)
    chosen.assign(torch.zeros_like(chosen.weight), chosen.bias)
    weights = MaskedParameters([chosen], {chosen.name: torch.zeros_like(chosen.weight, dtype=torch.bool)})
    step(weights, lambda: chosen.module.weight.sum() + chosen.module.bias.sum(), rate=0.25)
    assert bool((chosen.weight == 0).all())
    torch.testing.assert_close(chosen.bias, torch.full_like(chosen.bias, 0.75))


def test_what_was_assigned_is_not_written_to():
    chosen, mask = layer()
    weights = MaskedParameters([chosen], {chosen.name: mask})
    before = weights.values()
    kept = [value.clone() for value in before]
    step(weights, lambda: chosen.module.weight.sum())
    assert all(torch.equal(value, other) for value, other in zip(before, kept, strict=True))
    assert not torch.equal(chosen.weight, before[0])


def test_a_mean_over_all_batches():
    assert mean_everywhere([(3.0, 2), (1.0, 6)], torch.device("cpu")) == 0.5
    for nothing in ([], [(0.0, 0)]):
        with pytest.raises(InputError, match="no position of the calibration windows that are held out counts"):
            mean_everywhere(nothing, torch.device("cpu"))


@pytest.mark.parametrize("scale", [1e-6, 1e-9, 1e3])
def test_steps_do_not_depend_on_the_scale_of_the_loss(scale):
    found = []
    for factor in (1.0, scale):
        chosen, mask = layer()
        weights = MaskedParameters([chosen], {chosen.name: mask})
        x = torch.randn(4, chosen.shape[1], generator=torch.Generator().manual_seed(0))
        for _ in range(3):
            step(weights, lambda chosen=chosen, x=x, factor=factor: factor * chosen.module(x).square().sum())
        found.append(chosen.weight.clone())
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_a_small_gradient_survives_float16():
    chosen, mask = layer(torch.float16)
    weights = MaskedParameters([chosen], {chosen.name: mask})
    copies = weights.copies()
    x = torch.full((1, chosen.shape[1]), 1e-3, dtype=torch.float16)
    weights.differentiate(1e-3 * chosen.module(x).float().sum(), 512, copies)
    assert bool((copies[0].grad[mask] > 0).all())
