"""Linear layers that multiply approximately while they are trained."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from kfac_prune import linalg, products
from kfac_prune.models import Layer
from kfac_prune.products import approximately


def layer_of(kind, bias=True):
    torch.manual_seed(0)
    module = nn.Linear(48, 64, bias=bias) if kind == "linear" else Conv1D(64, 48)
    return Layer("layer", module)


@pytest.mark.parametrize(("kind", "bias"), [("linear", True), ("linear", False), ("conv1d", True)])
def test_gradients_are_autograds_own_in_float64(kind, bias):
    layer = layer_of(kind, bias)
    layer.module.double()
    x = torch.randn(3, 5, 48, dtype=torch.float64, requires_grad=True)
    leaves = [x, *layer.parameters()]
    want = torch.autograd.grad(layer.module(x).square().sum(), leaves)
    with approximately([layer]):
        got = torch.autograd.grad(layer.module(x).square().sum(), leaves)
        assert torch.autograd.gradcheck(layer.module, (x[:1, :2].detach().requires_grad_(),))
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_products_in_float32_are_as_close_as_rounded_factors_allow(kind, rounds, monkeypatch):
    monkeypatch.setattr(linalg, "bfloat16_units", lambda: "vector" if rounds else None)
    monkeypatch.setattr(linalg, "WORTH_ROUNDING", 0)
    layer = layer_of(kind)
    x = torch.randn(7, 48, requires_grad=True)
    leaves = [x, *layer.parameters()]
    want = [layer.module(x), *torch.autograd.grad(layer.module(x).square().sum(), leaves)]
    with approximately([layer]):
        got = [layer.module(x), *torch.autograd.grad(layer.module(x).square().sum(), leaves)]
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm().item() <= 2**-6 * b.norm().item()


def test_every_product_of_the_layer_is_approximate_and_no_other(monkeypatch):
    switched = []

    class Switch:
        def __enter__(self):
            switched.append(True)

        def __exit__(self, *_):
            switched.append(False)

    monkeypatch.setattr(products, "approximate_products", Switch)
    layer, other = layer_of("linear"), nn.Linear(64, 4)
    x = torch.randn(2, 48, requires_grad=True)
    with approximately([layer]):
        y = other(layer.module(x))
        assert switched == [True, False]
        y.sum().backward()
        assert switched == [True, False] * 2


def test_the_layer_is_its_own_again_after_an_error():
    layer = layer_of("linear")
    hooked = layer.module.forward = lambda x: x
    with suppress(ZeroDivisionError), approximately([layer]):
        raise ZeroDivisionError
    assert layer.module.forward is hooked
    del layer.module.forward
    with suppress(ZeroDivisionError), approximately([layer]):
        raise ZeroDivisionError
    assert "forward" not in layer.module.__dict__


def test_what_is_not_trained_gets_no_gradient():
    layer = layer_of("linear")
    layer.module.weight.requires_grad_(False)
    x = torch.randn(2, 48)
    with approximately([layer]):
        layer.module(x).sum().backward()
    assert layer.module.weight.grad is None
    assert layer.module.bias.grad is not None


def test_a_model_may_add_to_the_output_in_place():
    layer, x = layer_of("linear"), torch.randn(2, 3, 48)
    want = torch.autograd.grad((2 * layer.module(x)).square().sum(), layer.parameters())
    with approximately([layer]):
        y = layer.module(x)
        y += layer.module(x)
        got = torch.autograd.grad(y.square().sum(), layer.parameters())
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 2**-6 * b.norm()
