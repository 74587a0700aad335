"""A model that runs on the meta device: what its passes take, block by block, and what they hold on to.

Blocks with parameters of the same names and shapes cost the same: one of each kind runs, and counts for all of it.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from kfac_prune.costs.work import Work, counted, total
from kfac_prune.curvature.estimate import draw_all, frozen
from kfac_prune.data import Windows
from kfac_prune.errors import InputError, reason
from kfac_prune.experts import MATRICES, can_be_split, mean_share
from kfac_prune.models import Layer, find_blocks, only_trained, prunable_layers
from kfac_prune.objective import Objective
from kfac_prune.products import approximately
from kfac_prune.stream import BlockStack, observed


@dataclass(frozen=True)
class Matrix:
    """A weight matrix to be pruned.

    Attributes:
        name: in the model.
        shape: (out, in).
        share: of the tokens that it sees; below 1 for experts.
        own_inputs: False where the layer before it reads the very same tensor, so that both have one A.
    """

    name: str
    shape: tuple[int, int]
    share: float = 1.0
    own_inputs: bool = True

    @property
    def weights(self) -> int:
        """Their number."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Passes:
    """What a batch of windows takes.

    Attributes:
        forward: a forward pass of the model.
        blocks: the part of it that is spent in blocks.
        backward: the backward pass to all layers' outputs, no parameter's gradient.
        labels: drawing labels, and the gradient of the loss by the output.
        compared: what is compared of an output (log-probabilities).
        divergence: of two of them.
        held: bytes of activations that wait for the backward pass.
        output: bytes of the output in float32.
    """

    forward: Work
    blocks: Work
    backward: Work
    labels: Work
    compared: Work
    divergence: Work
    held: int
    output: int


@dataclass(frozen=True)
class Step:
    """What a training step of the reconstruction takes, summed over blocks.

    Attributes:
        forward: of all blocks without gradients.
        train: forward and backward of all blocks, by the trained weights.
        head_forward: the KL after the last block, without gradients.
        head_train: the same with the gradient by the stream.
        held: bytes of activations of the largest block and the head.
    """

    forward: Work
    train: Work
    head_forward: Work
    head_train: Work
    held: int


class DryRun:
    """A model without weights.

    Args:
        model: on the meta device.
        objective: of it.
        include: patterns of layers, as ``prunable_layers``.
        ignore: the same.

    Attributes:
        config: of the language model.
        matrices: that are to be pruned, in the order of the model.
        count: of blocks.
        width: of the residual stream.
        block_bytes: of the largest block's parameters.
        blocks_bytes: of all blocks'.
    """

    def __init__(
        self, model: PreTrainedModel, objective: Objective, include: Sequence[str] = (), ignore: Sequence[str] = ()
    ) -> None:
        self._model, self.objective = model, objective
        self.config: Any = model.config.get_text_config()
        for module in model.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer.to("meta"))
        layers = prunable_layers(model, include, ignore)
        names, self._blocks = find_blocks(model, layers)
        if not names:
            raise InputError(f"{type(model).__name__} has no list of blocks; what it would take cannot be told")
        self.count = len(names)
        kinds: dict[Any, list[int]] = {}
        for i, block in enumerate(self._blocks):
            kinds.setdefault(tuple((n, tuple(p.shape)) for n, p in block.named_parameters()), []).append(i)
        self._kinds = list(kinds.values())
        self.matrices = self._find_matrices(layers, names, include, ignore)
        sizes = [sum(p.numel() * p.element_size() for p in block.parameters()) for block in self._blocks]
        self.block_bytes, self.blocks_bytes = max(sizes), sum(sizes)
        self.width = int(self._stack(1, 2).entries[0].shape[-1])

    def passes(self, batch: int, length: int) -> Passes:
        """Of ``batch`` windows of ``length`` tokens."""
        windows = _windows(batch, length)
        ids = windows.input_ids.to("meta")
        draws = draw_all(self._model, windows, self.objective, 0)
        with self._running(), self._outside_only(), frozen(self._model), torch.enable_grad(), _held() as held:
            with counted() as forward:
                output = self.objective.output(self._model, ids, None)
            with counted() as labels:
                cotangent = self.objective.cotangent(output, draws[0], ids, None, "sampled")
            with counted() as backward:
                output.backward(cotangent)
        with torch.no_grad():
            with counted() as compared:
                rows = self.objective.compared(output.detach(), None)
            with counted() as divergence:
                self.objective.divergence(rows, rows)
        parts = [self._block(kind, batch, length) for kind in self._kinds]
        blocks = total(part.forward * len(kind) for part, kind in zip(parts, self._kinds, strict=True))
        behind = total(part.backward * len(kind) for part, kind in zip(parts, self._kinds, strict=True))
        waiting = sum(part.held * len(kind) for part, kind in zip(parts, self._kinds, strict=True))
        return Passes(
            forward + blocks,
            blocks,
            (backward + behind) * len(draws),
            labels * len(draws),
            compared,
            divergence,
            _bytes(held, self._model) + waiting,
            4 * output.numel(),
        )

    def step(self, batch: int, length: int) -> Step:
        """Of training blocks on ``batch`` windows of ``length`` tokens."""
        chosen = {matrix.name for matrix in self.matrices}
        forward, train, held = Work(), Work(), 0
        stack = self._stack(batch, length)
        for kind in self._kinds:
            block, times = self._blocks[kind[0]], len(kind)
            layers = [layer for layer in stack.inside(kind[0]) if layer.name in chosen]
            trained = [p for layer in layers for p in layer.parameters()]
            trained += [p for p in block.parameters() if p.ndim == 3]
            with self._running():
                with torch.no_grad(), counted() as once:
                    stack.run(kind[0], 0, stack.entries[0])
                with only_trained(block, trained), approximately(layers), _held() as tensors, counted() as step:
                    output = stack.run(kind[0], 0, stack.entries[0])
                    output.backward(torch.empty_like(output))
            for p in trained:
                p.grad = None
            forward, train = forward + once * times, train + step * times
            held = max(held, _bytes(tensors, self._model))
        ids = _windows(batch, length).input_ids.to("meta")

        def rows() -> Tensor:
            return self.objective.compared(self.objective.output(self._model, ids, None), None)

        with self._running(), self._outside_only():
            with torch.no_grad(), counted() as taught:
                dense = rows()
            with torch.no_grad(), counted() as looked:
                self.objective.divergence(dense, rows())
            with frozen(self._model), torch.enable_grad(), _held() as tensors, counted() as learned:
                self.objective.divergence(dense, rows()).sum().backward()
        return Step(forward, train, taught + looked, taught + learned, held + _bytes(tensors, self._model))

    def _block(self, kind: Sequence[int], batch: int, length: int) -> Passes:
        """Forward, backward and what is held of one block of a kind."""
        stack, nothing = self._stack(batch, length), Work()
        with self._running(), frozen(self._model), torch.enable_grad(), _held() as held:
            entry = stack.entries[0].detach().requires_grad_(True)
            with counted() as forward:
                output = stack.run(kind[0], 0, entry)
            with counted() as backward:
                output.backward(torch.empty_like(output))
        return Passes(forward, forward, backward, nothing, nothing, nothing, _bytes(held, self._model), 0)

    def _stack(self, batch: int, length: int) -> BlockStack:
        """The blocks and how the model calls them."""
        with self._running(), self._outside_only(keep=[kind[0] for kind in self._kinds]), counted():
            return BlockStack(self._model, _windows(batch, length), batch, "device")

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Within the block experts run, and what the model cannot do without numbers is told in one line."""
        try:
            with _experts_counted(self._model):
                yield
        except InputError:
            raise
        except Exception as error:  # whatever a model's code raises where it looks at numbers
            raise InputError(
                f"{type(self._model).__name__} cannot be run without weights, so what it takes cannot be told: "
                f"{reason(error)}"
            ) from error

    @contextmanager
    def _outside_only(self, keep: Sequence[int] = ()) -> Iterator[None]:
        """Within the block all blocks but those to keep let the stream pass."""
        shut = [block for i, block in enumerate(self._blocks) if i not in keep]
        many = self._gives_tuples()
        for block in shut:
            block.forward = lambda stream, *args, **kwargs: (stream, *[None] * (many - 1)) if many else stream
        try:
            yield
        finally:
            for block in shut:
                del block.forward

    def _gives_tuples(self) -> int:
        """Outputs of a block: 0 = the stream alone."""
        if not hasattr(self, "_many"):
            self._many = 0
            found: list[Any] = []
            handle = self._blocks[0].register_forward_hook(lambda module, args, output: found.append(output))
            with self._running(), torch.no_grad(), counted():
                try:
                    self.objective.output(self._model, torch.zeros(1, 2, dtype=torch.long, device="meta"), None)
                finally:
                    handle.remove()
            self._many = len(found[0]) if isinstance(found[0], tuple) else 0
        return self._many

    def _find_matrices(
        self, layers: Sequence[Layer], names: Sequence[str], include: Sequence[str], ignore: Sequence[str]
    ) -> list[Matrix]:
        """The layers, with those that share an A told by a pass of one block of each kind, and experts' matrices."""
        stack = self._stack(1, 2)
        shared: set[str] = set()  # names of layers of the first block of a kind
        for kind in self._kinds:
            inside = stack.inside(kind[0])
            with self._running(), torch.no_grad(), observed(inside, detach=False) as seen, counted():
                stack.run(kind[0], 0, stack.entries[0])
            read = [(name, x) for name, (x, _) in seen.items()]
            shared |= {name for (_, before), (name, x) in pairwise(read) if x is before}
        first = {names[i]: names[kind[0]] for kind in self._kinds for i in kind}
        found = []
        for layer in layers:
            block = next((name for name in first if layer.name.startswith(f"{name}.")), "")
            twin = first[block] + layer.name.removeprefix(block) if block else layer.name
            found.append(Matrix(layer.name, layer.shape, own_inputs=twin not in shared))
        for matrix in expert_matrices(self._model):
            wanted = not include or any(fnmatch.fnmatchcase(matrix.name, pattern) for pattern in include)
            if wanted and not any(fnmatch.fnmatchcase(matrix.name, pattern) for pattern in ignore):
                found.append(matrix)
        return found


def expert_matrices(model: PreTrainedModel) -> list[Matrix]:
    """Experts that transformers stores as parameters of three dimensions, each a layer that sees its mean share."""
    found = []
    for name, module in model.named_modules():
        if can_be_split(module):
            for expert in range(len(module.down_proj)):
                for matrix in MATRICES:
                    shape = getattr(module, matrix).shape
                    share = mean_share(model, shape[0])
                    found.append(Matrix(f"{name}.{expert}.{matrix}", (shape[1], shape[2]), share))
    return found


@contextmanager
def _experts_counted(model: nn.Module) -> Iterator[None]:
    """Within the block every expert multiplies its average share of the tokens, whatever the router says."""
    experts = [module for module in model.modules() if can_be_split(module) and "forward" not in vars(module)]
    for module in experts:
        module.forward = MethodType(_experts_forward, module)
    try:
        yield
    finally:
        for module in experts:
            del module.forward


def _experts_forward(module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """What the experts add to tokens [tokens, width], chosen [tokens, experts per token]."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    share = max(-(-len(rows) * chosen.shape[-1] // len(module.down_proj)), 1)
    result = torch.zeros_like(rows)
    for up, down in zip(module.gate_up_proj, module.down_proj, strict=True):
        gate, value = F.linear(rows[:share], up).chunk(2, dim=-1)
        output = F.linear(F.silu(gate) * value, down) * weights.reshape(-1)[:share, None].to(rows.dtype)
        result = result.index_add(0, torch.zeros(share, dtype=torch.long, device=rows.device), output)
    return result.reshape(hidden.shape)


@contextmanager
def _held() -> Iterator[list[Tensor]]:
    """Within the block what autograd keeps for the backward pass is noted."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def _bytes(tensors: Sequence[Tensor], model: nn.Module) -> int:
    """Of the tensors' memory, each once, without the model's own."""
    own = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
    sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(size for place, size in sizes.items() if place not in own)


def _windows(batch: int, length: int) -> Windows:
    return Windows(torch.zeros(batch, length, dtype=torch.long))
