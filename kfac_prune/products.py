"""Linear layers that multiply approximately, forward and backward, while they are trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kfac_prune.linalg import approximate_products, product
from kfac_prune.models import Layer


@contextmanager
def approximately(layers: Sequence[Layer]) -> Iterator[None]:
    """Within the block these layers, and no others, multiply as under ``approximate_products``.

    The rest of a model keeps its products: for the whole process, the switch would also take the fast path from
    attention on a CPU.
    """
    modules: list[Any] = [layer.module for layer in layers]
    before = [module.__dict__.get("forward") for module in modules]
    for layer, module in zip(layers, modules, strict=True):
        module.forward = partial(_forward, layer)
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _forward(layer: Layer, x: Tensor) -> Tensor:
    """The layer's output [..., out] for an input [..., in]."""
    module: Any = layer.module
    rows = _Linear.apply(x.flatten(0, -2), layer.stored(module.weight), module.bias)
    y: Tensor = rows.unflatten(0, x.shape[:-1])
    return y


class _Linear(torch.autograd.Function):
    """``x Wᵀ + b`` of rows x [N, in], its gradients by the same kind of product.

    What it returns is no view, so that a model may add to it in place, as Llama 4 does.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        with approximate_products():
            y: Tensor = product(x, weight.T)
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (rows,) = gradients
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        with approximate_products():
            return (
                product(rows, weight) if for_x else None,
                product(rows.T, x) if for_weight else None,
                rows.sum(0) if for_bias else None,
            )
