"""Hooks that accumulate, for every layer, the covariances of its inputs and of its output gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kfac_prune import ranks
from kfac_prune.errors import InputError
from kfac_prune.experts import tokens_of
from kfac_prune.linalg import exact_products
from kfac_prune.models import Layer
from kfac_prune.offload import running_again


@exact_products()
def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add Σ r rᵀ over rows [tokens, n] of any dtype to a total [n, n] in float32.

    Products of 16-bit numbers are exact in float32, so on a GPU the matrix units multiply them as they are.
    """
    if rows.is_cuda and rows.dtype in (torch.bfloat16, torch.float16):
        total += torch.mm(rows.T, rows, out_dtype=torch.float32)
    else:
        rows = rows.float()
        total.addmm_(rows.T, rows)


@dataclass
class InputMoments:
    """Sums over tokens of what enters one or more layers.

    Attributes:
        second: Σ a aᵀ [in, in], float32.
        first: Σ a [in], float32.
        tokens: number of summands.
    """

    second: Tensor
    first: Tensor
    tokens: int = 0

    @classmethod
    def zeros(cls, width: int, device: torch.device) -> InputMoments:
        """Of no token."""
        both = torch.zeros(width + 1, width, dtype=torch.float32, device=device)
        return cls(second=both[1:], first=both[0])

    def add(self, rows: Tensor) -> None:
        """Add rows [tokens, in] of any dtype."""
        add_gram(self.second, rows)
        self.first += rows.float().sum(0)
        self.tokens += rows.shape[0]


@dataclass
class GradientMoments:
    """Sums over tokens of the gradients at one layer's output.

    Attributes:
        second: Σ g gᵀ [out, out], float32.
        tokens: number of summands.
    """

    second: Tensor
    tokens: int = 0

    @classmethod
    def zeros(cls, width: int, device: torch.device) -> GradientMoments:
        """Of no token."""
        return cls(torch.zeros(width, width, dtype=torch.float32, device=device))

    def add(self, rows: Tensor) -> None:
        """Add rows [tokens, out] of any dtype."""
        add_gram(self.second, rows)
        self.tokens += rows.shape[0]


@dataclass
class FactorCapture:
    """Accumulates factors while hooks are in place (use as ``with FactorCapture(layers).hooked() as capture``).

    Layers that read the very same tensor one after the other (q/k/v, gate/up) share one ``InputMoments``.
    Before each forward pass ``token_mask`` says which positions count.

    Attributes:
        layers: to observe.
        blocks: by name, at whose output, the residual stream, gradients are observed too.
        inputs: per layer name.
        gradients: per layer or block name.
        token_mask: [B, T] bool, True = counts, or None = all count.
        per_sequence: layers may see one row [B, features] per sequence (a classifier on the first token), which counts.
        batch: what messages call the batch that is seen at the moment.
    """

    layers: Sequence[Layer]
    blocks: Mapping[str, nn.Module] = field(default_factory=dict)
    inputs: dict[str, InputMoments] = field(default_factory=dict)
    gradients: dict[str, GradientMoments] = field(default_factory=dict)
    token_mask: Tensor | None = None
    per_sequence: bool = False
    batch: str = "the batch"
    #: id of moments -> the batches that were added, and after how many of them, the first ones, the sums were finite
    _finite: dict[int, tuple[list[str], Tensor]] = field(default_factory=dict)
    _last: tuple[str, Tensor, int] | None = None
    _reads_with: dict[str, str] = field(default_factory=dict)  # layer -> the layer whose InputMoments it shares

    @contextmanager
    def hooked(self) -> Iterator[FactorCapture]:
        """Hooks are removed at the end of the block, whatever happens."""
        handles: list[RemovableHandle] = []
        try:
            for layer in self.layers:
                handles += self._hook(layer)
            for name, block in self.blocks.items():
                handles.append(block.register_forward_hook(self._watch(name)))
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self._last = None

    def add_up(self, device: torch.device) -> None:
        """Add what all processes have seen; afterwards each has the sums of all.

        An expert may have seen tokens in one process and none in another, and a process no batch at all.

        Args:
            device: of the sums; that of a layer's weight may be another.
        """
        if ranks.count() == 1:
            return
        widths = {name: len(moments.second) for name, moments in self.gradients.items()}
        said = ranks.gathered((set(self.inputs), self._reads_with, widths))
        read = set().union(*(names for names, _, _ in said))
        reads_with = {name: owner for _, pairs, _ in said for name, owner in pairs.items()}
        widths = {name: width for _, _, found in said for name, width in found.items()}
        for layer in self.layers:
            if layer.name in read - set(reads_with):
                if layer.name not in self.inputs:
                    self.inputs[layer.name] = InputMoments.zeros(layer.shape[1], device)
                moments = self.inputs[layer.name]
                moments.tokens = ranks.counted(moments.tokens, moments.second, moments.first)
        for name in (*(layer.name for layer in self.layers), *self.blocks):
            if name in widths:
                if name not in self.gradients:
                    self.gradients[name] = GradientMoments.zeros(widths[name], device)
                gradients = self.gradients[name]
                gradients.tokens = ranks.counted(gradients.tokens, gradients.second)
        self.inputs |= {name: self.inputs[owner] for name, owner in reads_with.items()}

    def _hook(self, layer: Layer) -> list[RemovableHandle]:
        name = layer.name

        def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._see_input(name, args[0], tokens_of(module))

        return [layer.module.register_forward_pre_hook(before), layer.module.register_forward_hook(self._watch(name))]

    def _watch(self, name: str) -> Callable[..., None]:
        """A forward hook that makes the backward pass leave the gradients at a module's output."""

        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
            output = output[0] if isinstance(output, tuple) else output
            if not output.requires_grad:
                kind = "block" if name in self.blocks else "layer"
                raise InputError(
                    f"{kind} {name}: no gradient flows to its output, since the model calls it on what does not depend "
                    "on the text or detaches what enters it; leave its layers out with --ignore"
                )
            tokens = tokens_of(module)
            output.register_hook(lambda gradient: self._see_gradient(name, gradient, tokens))

        return after

    def _see_input(self, name: str, x: Tensor, tokens: Tensor | None) -> None:
        if running_again():
            return
        owner = None
        if self._last is not None and self._last[1] is x and self._last[2] == x._version:  # not written to since
            owner = self._last[0]
        if name not in self.inputs:
            if owner is not None:
                self._reads_with[name] = owner
                self.inputs[name] = self.inputs[owner]
            else:
                self.inputs[name] = InputMoments.zeros(x.shape[-1], x.device)
        if name in self._reads_with:
            if owner != self._reads_with[name]:
                raise RuntimeError(f"layer {name} read the same tensor as {self._reads_with[name]}, and now another")
            return  # the owner has added these rows
        self._last = (name, x, x._version)
        with torch.no_grad():
            self._add(self.inputs[name], self._rows(name, x, tokens))

    def _see_gradient(self, name: str, gradient: Tensor, tokens: Tensor | None) -> None:
        if name not in self.gradients:
            self.gradients[name] = GradientMoments.zeros(gradient.shape[-1], gradient.device)
        self._add(self.gradients[name], self._rows(name, gradient.detach(), tokens))

    def _add(self, moments: InputMoments | GradientMoments, rows: Tensor) -> None:
        """Add rows, and note on the device, where reading it would wait, whether the sums are finite still."""
        moments.add(rows)
        finite = moments.second.trace().isfinite()
        batches, good = self._finite.setdefault(id(moments), ([], torch.zeros_like(finite, dtype=torch.int32)))
        batches.append(self.batch)
        good += finite

    def broken_by(self, moments: InputMoments | GradientMoments) -> str | None:
        """The first batch after which the sums were NaN or infinite."""
        batches, good = self._finite.get(id(moments), ([], 0))
        return batches[int(good)] if int(good) < len(batches) else None

    def _rows(self, name: str, x: Tensor, tokens: Tensor | None) -> Tensor:
        """The rows [tokens, features] of the positions that count; ``tokens`` says which ones x holds, None = all."""
        rows = x.detach().reshape(-1, x.shape[-1])
        if tokens is not None and self.token_mask is not None:
            return rows[self.token_mask.reshape(-1).to(rows.device)[tokens]]
        if self.token_mask is None or (self.per_sequence and x.ndim == 2 and len(x) == len(self.token_mask)):
            return rows
        if rows.shape[0] != self.token_mask.numel():
            raise InputError(
                f"layer {name} sees {rows.shape[0]} rows where the batch has {self.token_mask.numel()} positions, so "
                "padding cannot be told apart; use windows without padding, or leave the layer out with --ignore"
            )
        return rows[self.token_mask.reshape(-1).to(rows.device)]
