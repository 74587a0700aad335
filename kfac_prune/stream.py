"""The residual stream of a transformer, carried from block to block by the model's own blocks.

No attention or norm is written again here: every block is called with the arguments that the model itself passes to it,
recorded once per batch, so masks, padding and position embeddings are exactly the model's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kfac_prune.data import Windows
from kfac_prune.models import Layer


@dataclass(frozen=True)
class Call:
    """How the model calls one block for one batch: everything but the residual stream."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Writer:
    """A layer of a block whose output is added to the residual stream.

    Attributes:
        layer: e.g. ``o_proj`` or ``down_proj``.
        factor: the stream becomes ``stream + factor · output`` (1 in most families).
    """

    layer: Layer
    factor: float


class BlockStack:
    """The blocks of a model and the calls that it makes to them.

    Args:
        model: in evaluation mode.
        layers: its prunable layers, by which the stack of blocks is recognised.
        windows: tokens [N, T].
        batch_size: windows per batch.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[Layer], windows: Windows, batch_size: int) -> None:
        self.names, self.blocks = find_blocks(model, layers)
        self.masks: list[Tensor | None] = []
        self.entries: list[Tensor] = []  # the stream before the first block, per batch [B, T, d] on CPU
        self._calls: list[list[Call]] = []  # [batch][block]
        self._device = model.device
        with torch.no_grad():
            for batch in windows.batches(batch_size):
                mask = None if batch.attention_mask is None else batch.attention_mask.to(model.device)
                calls: list[Call] = []
                with self._recorded(calls):
                    model(input_ids=batch.input_ids.to(model.device), attention_mask=mask, use_cache=False)
                self._calls.append(calls)
                self.masks.append(mask)

    @contextmanager
    def _recorded(self, calls: list[Call]) -> Iterator[None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stream = args[0] if args else kwargs["hidden_states"]
            if module is self.blocks[0]:
                self.entries.append(stream.cpu())
            calls.append(Call(args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}))

        handles = [block.register_forward_pre_hook(record, with_kwargs=True) for block in self.blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def run(self, block: int, batch: int, stream: Tensor, *, until: Layer | None = None) -> Tensor:
        """The stream [B, T, d] after a block, on the model's device.

        With ``until`` the block's forward pass ends once that layer has run, and the stream comes back as it was: for
        those who only look at what ``observed`` saw.
        """
        call = self._calls[batch][block]
        handle = None if until is None else until.module.register_forward_hook(_stop)
        try:
            output: Tensor | tuple[Tensor, ...]
            output = self.blocks[block](stream.to(self._device), *call.args, **call.kwargs)
        except _Stopped:
            return stream
        finally:
            if handle is not None:
                handle.remove()
        return output[0] if isinstance(output, tuple) else output


class _Stopped(Exception):
    """Raised by a hook to end a block's forward pass."""


def _stop(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    raise _Stopped


def find_blocks(model: nn.Module, layers: Sequence[Layer]) -> tuple[list[str], list[nn.Module]]:
    """Names and modules of the repeated blocks: the list of modules that holds most of the layers."""
    best: tuple[int, list[str], list[nn.Module]] = (0, [], [])
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            count = sum(layer.name.startswith(f"{name}.") for layer in layers)
            if count > best[0]:
                best = (count, [f"{name}.{i}" for i in range(len(module))], list(module))
    return best[1], best[2]


@contextmanager
def observed(layers: Sequence[Layer], *, detach: bool = True) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Within the block every forward pass leaves, per layer name, its last input and output; in order of execution."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Any:
        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen.pop(name, None)
            seen[name] = (args[0].detach(), output.detach()) if detach else (args[0], output)

        return keep

    handles = [layer.module.register_forward_hook(hook(layer.name)) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def find_writers(stack: BlockStack, block: int, stream: Tensor, layers: Sequence[Layer]) -> list[Writer]:
    """Which layers of a block write into the residual stream, read off one batch, in order of execution.

    They are those whose outputs, each times a constant, add up to what the block adds to the stream. Empty where no
    such sum exists (blocks that normalise what they add, or the stream itself).

    Args:
        stack: of the dense model.
        block: index.
        stream: before the block, first batch [B, T, d].
        layers: those of the block.
    """
    width = stream.shape[-1]
    candidates = {layer.name: layer for layer in layers if layer.shape[0] == width}
    with torch.no_grad(), observed(list(candidates.values())) as seen:
        added = (stack.run(block, 0, stream).cpu() - stream).double().reshape(-1)
    names = list(seen)
    if not names:
        return []
    outputs = torch.stack([seen[name][1].cpu().double().reshape(-1) for name in names], dim=1)
    tolerance = 1e-3 if stream.dtype == torch.float32 else 3e-2
    factors = torch.linalg.lstsq(outputs, added[:, None]).solution[:, 0]
    misfit = float((outputs @ factors - added).norm() / added.norm())
    if misfit > tolerance:
        return []
    return [Writer(candidates[n], float(f)) for n, f in zip(names, factors, strict=True) if abs(f) > 10 * tolerance]
