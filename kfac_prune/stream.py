"""The residual stream of a transformer, carried from block to block by the model's own blocks.

No attention or norm is written again here: every block is called with the arguments that the model itself passes to it,
recorded once per batch, so masks, padding and position embeddings are exactly the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kfac_prune import ranks
from kfac_prune.data import Windows
from kfac_prune.errors import InputError
from kfac_prune.experts import ExpertLinear
from kfac_prune.memory import mapped
from kfac_prune.models import Layer, find_blocks, prunable_layers
from kfac_prune.objective import Objective
from kfac_prune.quality import compared


@dataclass(frozen=True)
class Call:
    """How the model calls one block for one batch: everything but the residual stream."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def split(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
        """The stream that enters a block, and the rest of what the model passes to it."""
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        return (args[0] if args else kwargs["hidden_states"]), cls(args[1:], rest)


@dataclass(frozen=True)
class Writer:
    """A layer of a block whose output is added to the residual stream.

    Attributes:
        layer: e.g. ``o_proj`` or ``down_proj``.
        factor: the stream becomes ``stream + factor · output`` (1 in most families).
    """

    layer: Layer
    factor: float


#: Share of what a block adds that may be lost to the rounding of a stream that is much larger (massive activations).
MOST_ROUNDING = 0.3
#: Where streams wait until their block is due: in the memory of the model's device, in main memory, or in files that
#: are mapped into memory and read ahead by the operating system (in the folder for temporary files; see TMPDIR).
Shelf = Literal["device", "cpu", "disk"]


class _Arguments:
    """What the blocks are called with in one batch, without second copies of what the first batch brought.

    Masks and position embeddings are equal for all batches without padding, and may be as large as the stream.

    Args:
        common: tensors of the first batch.
    """

    def __init__(self, common: Sequence[Tensor]) -> None:
        self._common = common
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}  # by identity: what came, which thus lives on, and what stays

    def __call__(self, value: Any) -> Any:
        """The same arguments."""
        if isinstance(value, Tensor):
            if id(value) not in self._kept:
                self._kept[id(value)] = value, next((one for one in self._common if _same(one, value)), value)
            return self._kept[id(value)][1]
        if type(value) in (tuple, list):
            return type(value)(map(self, value))
        return {name: self(one) for name, one in value.items()} if type(value) is dict else value

    def tensors(self) -> list[Tensor]:
        """All that stay."""
        return [kept for _, kept in self._kept.values()]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


class BlockStack:
    """The blocks of a model and the calls that it makes to them.

    Args:
        model: in evaluation mode.
        windows: tokens [N, T].
        batch_size: windows per batch.
        shelf: where streams wait.

    Attributes:
        model: whose blocks they are.
        device: of the model.
        layers: all linear layers of the model by name.
        names: of the blocks.
        blocks: the modules.
        masks: per batch [B, T] bool, True = a real token, or None.
        outputs: of a block's forward pass: 0 = the stream alone, n = a tuple of n that begins with it.
        entries: the stream before the first block, per batch [B, T, d] on the shelf.
    """

    def __init__(self, model: PreTrainedModel, windows: Windows, batch_size: int, shelf: Shelf = "cpu") -> None:
        self._shelf = shelf
        self.layers = {layer.name: layer for layer in prunable_layers(model)}
        self.names, self.blocks = find_blocks(model, self.layers.values())
        self.masks: list[Tensor | None] = []
        self.entries: list[Tensor] = []
        self.outputs = 0
        self._calls: list[list[Call]] = []  # [batch][block]
        self._batches = list(windows.batches(batch_size))
        self.model, self.device = model, model.device
        common: list[Tensor] = []
        with torch.no_grad():
            for batch in self._batches:
                ids, mask = batch.on(model.device)
                arguments = _Arguments(common)
                calls: list[Call] = []
                with self._recorded(calls, arguments), suppress(_Stopped):
                    model(input_ids=ids, attention_mask=mask, use_cache=False)
                common = common or arguments.tensors()
                self._calls.append(calls)
                self.masks.append(mask)

    def entered_anew(self, changed: Iterable[str]) -> BlockStack:
        """The same blocks, entered by the stream of the model as it is now; itself if no layer outside them changed.

        Args:
            changed: names of the layers that have.
        """
        if all(block_of(self.layers[name], self.names) >= 0 for name in changed):
            return self
        other = copy(self)
        other.entries = []

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            other.entries.append(self.keep(Call.split(args, kwargs)[0]))
            raise _Stopped

        handle = self.blocks[0].register_forward_pre_hook(enter, with_kwargs=True)
        try:
            for batch in self._batches:
                ids, mask = batch.on(self.device)
                with torch.no_grad(), suppress(_Stopped):
                    self.model(input_ids=ids, attention_mask=mask, use_cache=False)
        finally:
            handle.remove()
        return other

    @contextmanager
    def _recorded(self, calls: list[Call], arguments: _Arguments) -> Iterator[None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stream, call = Call.split(args, kwargs)
            if module is self.blocks[0]:
                self.entries.append(self.keep(stream))
            calls.append(Call(arguments(call.args), arguments(call.kwargs)))
            if module is self.blocks[-1] and len(self.blocks) > 1:
                raise _Stopped  # what follows, the head above all, is not needed

        def look(module: nn.Module, args: tuple[Any, ...], output: Tensor | tuple[Any, ...]) -> None:
            self.outputs = len(output) if isinstance(output, tuple) else 0
            if len(self.blocks) == 1:
                raise _Stopped

        handles = [block.register_forward_pre_hook(record, with_kwargs=True) for block in self.blocks]
        handles += [block.register_forward_hook(look) for block in self.blocks[:1]]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def keep(self, stream: Tensor) -> Tensor:
        """The same values where streams wait, in their own dtype."""
        if self._shelf == "device":
            return stream
        if self._shelf == "cpu":
            return stream.cpu()
        return mapped(stream.cpu())

    def inside(self, block: int) -> list[Layer]:
        """The linear layers of a block."""
        return [layer for name, layer in self.layers.items() if name.startswith(f"{self.names[block]}.")]

    def run(self, block: int, batch: int, stream: Tensor, *, until: Layer | None = None) -> Tensor:
        """The stream [B, T, d] after a block, on the model's device.

        With ``until`` the block's forward pass ends once that layer has run, and the stream comes back as it was: for
        those who only look at what ``observed`` saw.
        """
        call = self._calls[batch][block]
        handle = None if until is None else until.module.register_forward_hook(_stop)
        try:
            output = self.blocks[block](stream.to(self.device), *call.args, **call.kwargs)
        except _Stopped:
            return stream
        finally:
            if handle is not None:
                handle.remove()
        return left(output)

    def compared(self, objective: Objective, block: int, batch: int, stream: Tensor) -> Tensor:
        """``objective.compared`` of what the model puts out where this stream [B, T, d] enters a block.

        Block ``len(blocks)`` is what follows the last one.
        """
        with _no_router_loss(self.model), begun_at(self, block, [stream]):
            return compared(self.model, self._batches[batch], objective)

    def check_calls(self, what: str) -> None:
        """Refuse a model that runs a block several times per pass, where only the first call would be seen.

        Args:
            what: does not work with it, and how to leave that out.
        """
        if not self.calls_once():
            raise InputError(f"{type(self.model).__name__} runs {self.names[-1]} several times per pass; {what}")

    def calls_once(self) -> bool:
        """The model calls its last block once per pass; some (ALBERT) run the same block several times."""
        if not self.blocks:
            return True
        times: list[int] = []
        handle = self.blocks[-1].register_forward_hook(lambda module, args, output: times.append(1))
        ids, mask = self._batches[0].on(self.device)
        try:
            with torch.no_grad():
                self.model(input_ids=ids, attention_mask=mask, use_cache=False)
        finally:
            handle.remove()
        return len(times) == 1


def left(output: Tensor | tuple[Any, ...]) -> Tensor:
    """The stream in what a block returns."""
    stream: Tensor = output[0] if isinstance(output, tuple) else output
    return stream


def block_of(layer: Layer, names: Sequence[str]) -> int:
    """The number of the block that a layer is in, given the blocks' names; −1 outside all blocks."""
    return next((i for i, name in enumerate(names) if layer.name.startswith(f"{name}.")), -1)


@contextmanager
def begun_at(stack: BlockStack, block: int, streams: Iterable[Tensor]) -> Iterator[None]:
    """Within the block the model's forward passes begin at a block; each takes the next of the recorded streams.

    The blocks before it cost nothing; embeddings and head run as ever, so the tokens must be those of the streams. At
    ``len(blocks)`` no block runs, and the streams are what the last one leaves.
    """
    inputs = iter(streams)

    def passes(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def unchanged(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if index + 1 == len(stack.blocks):
                hidden_states = next(inputs).to(hidden_states.device)
            return (hidden_states, *[None] * (stack.outputs - 1)) if stack.outputs else hidden_states

        def begins(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return forward(next(inputs).to(hidden_states.device), *args, **kwargs)

        return begins if index == block else unchanged

    outer = [vars(module).get("forward") for module in stack.blocks]  # of a context around this one
    for index, module in enumerate(stack.blocks[: block + 1]):
        module.forward = passes(index, module.forward)
    try:
        yield
    finally:
        for module, forward in zip(stack.blocks[: block + 1], outer, strict=False):
            del module.forward
            if forward is not None:
                module.forward = forward


@contextmanager
def _no_router_loss(model: PreTrainedModel) -> Iterator[None]:
    """Within the block a mixture does not compute its router's loss, which needs all blocks to have run."""
    wanted = getattr(model.config, "output_router_logits", False)
    if wanted:
        model.config.output_router_logits = False
    try:
        yield
    finally:
        if wanted:
            model.config.output_router_logits = wanted


class _Stopped(Exception):
    """Raised by a hook to end a block's forward pass."""


def _stop(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    raise _Stopped


@contextmanager
def observed(layers: Sequence[Layer], *, detach: bool = True) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Within the block every forward pass leaves, per layer name, its last input and output; in order of execution."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Any:
        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            seen.pop(name, None)
            seen[name] = (args[0].detach(), output.detach()) if detach else (args[0], output)
            return output.clone()  # the model may add to its own in place, as Falcon does

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
    plain = [layer for layer in layers if not isinstance(layer.module, ExpertLinear)]  # those that see all tokens
    candidates = {layer.name: layer for layer in plain if layer.shape[0] == width}
    with torch.no_grad(), observed(list(candidates.values())) as seen:
        after = stack.run(block, 0, stream).cpu()
    outputs = {name: output for name, (_, output) in seen.items()}
    found = ranks.told(_summands(outputs, stream.cpu(), after))
    return [Writer(candidates[name], factor) for name, factor in found]


def _summands(outputs: Mapping[str, Tensor], before: Tensor, after: Tensor) -> list[tuple[str, float]]:
    """Which outputs, times what, add up to what the stream has gained; empty where none do."""
    added = (after - before).double().reshape(-1)
    names = [name for name, output in outputs.items() if output.numel() == added.numel()]
    if not names:
        return []
    columns = torch.stack([outputs[name].cpu().double().reshape(-1) for name in names], dim=1)
    tolerance = 1e-3 if after.dtype == torch.float32 else 3e-2
    rounding = torch.finfo(after.dtype).eps * float(after.double().norm() / added.norm())  # of a stream that is large
    gram = columns.T @ columns  # a few layers of one block: far from singular, or no sum is found
    factors = torch.linalg.lstsq(gram, columns.T @ added).solution
    misfit = float((columns @ factors - added).norm() / added.norm())
    if misfit > max(tolerance, min(rounding, MOST_ROUNDING)):
        return []
    return [(name, float(f)) for name, f in zip(names, factors, strict=True) if abs(f) > 10 * tolerance]
