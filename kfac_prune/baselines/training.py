"""What methods that train have in common: which parameters they prune, and training with masks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kfac_prune.errors import InputError


def prunable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters with two dimensions or more, by name: weights, not biases or norms; shared ones once."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.ndim > 1}


def apply_masks(module: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set to zero, in place, what masks (True = kept, by parameter name) do not keep."""
    with torch.no_grad():
        for name, mask in masks.items():
            module.get_parameter(name).masked_fill_(~mask, 0.0)


@contextmanager
def masked_training(module: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block gradients off the masks are zero, so that an optimizer made there leaves those weights at zero.

    Raises:
        InputError: at the end, a weight off its mask is not zero: the training moved it in some other way.
    """
    apply_masks(module, masks)
    handles = [
        module.get_parameter(name).register_hook(lambda gradient, mask=mask: gradient * mask)
        for name, mask in masks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for name, mask in masks.items():
        if module.get_parameter(name)[~mask].any():
            raise InputError(
                f"training changed pruned weights of {name}; make the optimizer within the training, and move weights "
                "only along their gradients"
            )


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers, for ``restore``."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def restore(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give every parameter and buffer back the very values that it had, in place."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            tensor.copy_(state[name])
