"""Models larger than a device: their blocks stay in main memory and come to the device one at a time.

Embeddings, head and everything else outside the blocks live on the device, so does a block while it runs. Backward
passes run every block once more instead of holding on to its weights and activations (Chen et al. 2016, "Training deep
nets with sublinear memory cost"). Between two passes a block's parameters are ordinary tensors in main memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from kfac_prune.errors import InputError
from kfac_prune.models import find_blocks, prunable_layers

_again = False


def running_again() -> bool:
    """Whether this forward pass only repeats an earlier one, for its gradients: hooks have seen its inputs."""
    return _again


@contextmanager
def _repetition() -> Iterator[None]:
    global _again
    _again = True
    try:
        yield
    finally:
        _again = False


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For the forward pass and for its repetition."""
    return nullcontext(), _repetition()


@contextmanager
def resident(block: nn.Module, device: torch.device) -> Iterator[None]:
    """Within the block of code a module's parameters are on a device; what replaces them there comes back too."""
    parameters = list(block.parameters())
    homes = [p.data for p in parameters]
    moved = [home.to(device, non_blocking=True) for home in homes]
    for p, there in zip(parameters, moved, strict=True):
        p.data = there
    try:
        yield
    finally:
        for p, home, there in zip(parameters, homes, moved, strict=True):
            p.data = home if p.data_ptr() == there.data_ptr() else p.data.to(home.device)


class _Visitor:
    """The forward pass of a block that visits the device for it."""

    def __init__(self, block: nn.Module, device: torch.device) -> None:
        self._block, self._device, self._forward = block, device, block.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and self._is_away():
            options: Any = {"use_reentrant": False, "context_fn": _contexts, "preserve_rng_state": False}
            return checkpoint(self._visit, *args, **options, **kwargs)
        return self._visit(*args, **kwargs)

    def _is_away(self) -> bool:
        return any(p.device != self._device for p in self._block.parameters())

    def _visit(self, *args: Any, **kwargs: Any) -> Any:
        with resident(self._block, self._device):
            return self._forward(*args, **kwargs)


def _take_over(model: PreTrainedModel) -> None:
    """Bring a model that accelerate dispatches back to main memory, without its hooks."""
    if not any(hasattr(module, "_hf_hook") for module in model.modules()):
        return
    values: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        with align_module_device(module, "cpu"):
            for own, p in module.named_parameters(recurse=False):
                values[f"{name}.{own}" if name else own] = p.data
    remove_hook_from_module(model, recurse=True)
    vars(model).pop("hf_device_map", None)
    for name, value in values.items():
        parent, _, own = name.rpartition(".")
        module = model.get_submodule(parent)
        setattr(module, own, nn.Parameter(value.cpu(), module.get_parameter(own).requires_grad))
    model.tie_weights()


def offload(model: PreTrainedModel, device: torch.device) -> None:
    """Move a model from main memory to a device but for its blocks, which from now on visit the device to run.

    ``model.device`` is the device then. A model that accelerate holds elsewhere (``device_map``, ``cpu_offload``,
    ``disk_offload``) is taken over: all of its weights come to main memory.

    Raises:
        InputError: the model has no list of blocks.
    """
    _take_over(model)
    _, blocks = find_blocks(model, prunable_layers(model))
    if not blocks:
        raise InputError(f"--offload brings the blocks of a model to the device, and {type(model).__name__} has none")
    inside = {id(p) for block in blocks for p in block.parameters()}
    for p in model.parameters():
        if id(p) not in inside:
            p.data = p.data.to(device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    for block in blocks:
        block.forward = _Visitor(block, device)
