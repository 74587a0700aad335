"""Passes through some of a model's blocks alone, forward and backward, from what one pass through all of them left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kfac_prune.models import Layer
from kfac_prune.stream import Call, block_of, left


class Span:
    """Neighbouring blocks: a whole pass records what enters them and which gradient comes back to their end.

    From there the blocks alone give the gradients of the very same loss at all their layers. So the curvature of any
    number of groups of layers takes two passes through every block instead of one per group.

    Args:
        layers: a group.
        names: of the model's blocks.
        blocks: the modules.
        keep: puts a tensor where it can wait.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        names: Sequence[str],
        blocks: Sequence[nn.Module],
        keep: Callable[[Tensor], Tensor],
    ) -> None:
        homes = [block_of(layer, names) for layer in layers]
        self._blocks = list(blocks[min(homes) : max(homes) + 1]) if min(homes) >= 0 else []
        self._keep = keep
        self._calls: list[list[Call]] = []  # [batch][block]
        self._entries: list[Tensor] = []  # [batch]
        self._gradients: list[list[Tensor]] = []  # [batch][draw]

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Within the block of code whole passes are recorded, one per batch."""
        with ExitStack() as hooks:
            for block in self._blocks:
                hooks.callback(block.register_forward_pre_hook(self._called, with_kwargs=True).remove)
            for block in self._blocks[-1:]:
                hooks.callback(block.register_forward_hook(self._left).remove)
            yield

    def _called(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream, call = Call.split(args, kwargs)
        if block is self._blocks[0]:
            self._entries.append(self._keep(stream.detach()))
            self._calls.append([])
            self._gradients.append([])
        self._calls[-1].append(call)

    def _left(self, block: nn.Module, args: tuple[Any, ...], output: Tensor | tuple[Any, ...]) -> None:
        waiting = self._gradients[-1]
        left(output).register_hook(lambda gradient: waiting.append(self._keep(gradient)))

    @property
    def suffices(self) -> bool:
        """The recorded passes are all that is needed.

        It is not where layers lie outside all blocks, or a block is called several times in a pass or with anything but
        the stream that gradients flow through.
        """
        together = all(
            len(calls) == len(self._blocks) and not any(map(_flows, (*call.args, *call.kwargs.values())))
            for calls in self._calls
            for call in calls
        )
        return bool(self._calls) and together

    def run(self, batch: int, device: torch.device) -> None:
        """Forward and backward through these blocks, for hooks to see."""
        with torch.enable_grad():
            stream = self._entries[batch].to(device).detach().requires_grad_()
            for block, call in zip(self._blocks, self._calls[batch], strict=True):
                stream = left(block(stream, *call.args, **call.kwargs))
        gradients = self._gradients[batch]
        for i, gradient in enumerate(gradients):
            stream.backward(gradient.to(device), retain_graph=i < len(gradients) - 1)

    def clear(self) -> None:
        """Give up what was recorded."""
        self._calls, self._entries, self._gradients = [], [], []


@contextmanager
def recorded(spans: Iterable[Span]) -> Iterator[None]:
    """All of them at once."""
    with ExitStack() as stack:
        for span in spans:
            stack.enter_context(span.recorded())
        yield


def _flows(argument: Any) -> bool:
    """Gradients flow to it, or to what it holds."""
    if isinstance(argument, Tensor):
        return argument.requires_grad
    if isinstance(argument, Mapping):
        argument = tuple(argument.values())
    return isinstance(argument, (tuple, list)) and any(map(_flows, argument))
