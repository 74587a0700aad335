"""Measures what pruning a few layers costs, to correct second-order predictions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import repeat

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kfac_prune import ranks
from kfac_prune.data import Windows
from kfac_prune.errors import InputError
from kfac_prune.models import Layer, WeightSwap, prunable_layers
from kfac_prune.objective import CAUSAL, Objective
from kfac_prune.problems import PlannedLayer
from kfac_prune.progress import progress
from kfac_prune.quality import evaluate
from kfac_prune.stream import BlockStack, begun_at, block_of

#: A measured loss below this fraction of the predicted one is taken for noise of a small sample.
MIN_FACTOR = 0.5
#: Calibration tokens of a probe, and how many passes over the calibration windows all layers together may take (but a
#: probe has at least 4 windows: with 4 of 256 tokens the loss was at most 6 % above that with 16 or 32).
PROBE_TOKENS, PROBE_PASSES = 4096, 8
#: What the dense model gives is kept up to so many bytes, and computed again for every measurement beyond.
KEPT_BYTES = 2**30


def last_few(windows: Windows, measurements: int, passes: int) -> Windows:
    """The last windows: at most ``PROBE_TOKENS``, and so few that all measurements together take so many passes.

    Never fewer than 4, where there are as many.

    Args:
        windows: to measure on.
        measurements: that are due, each on all windows that are chosen.
        passes: over ``windows``.
    """
    count = max(min(passes * len(windows) // measurements, PROBE_TOKENS * len(windows) // windows.tokens), 4)
    return windows.split(count)[1] if len(windows) > count else windows


class Probe:
    """Measures what pruning one layer alone costs, or those of one block, where all others are dense.

    The second-order prediction holds for most layers and can be several times too small for a few: in the demo model
    for two matrices of the first block, where K-FAC's assumption that activations and gradients are independent
    presumably fails. Left uncorrected, just these layers look cheap and are given up.

    The dense residual stream before every block is kept, so that a measurement runs only the blocks from the layer's
    own on; models that run a block several times run as a whole. So is what the dense model gives, unless that is
    large: then its last block runs again.

    Args:
        model: dense at this moment.
        windows: calibration tokens to measure on; a few thousand do.
        batch_size: windows per pass.
        objective: what the model computes.
    """

    def __init__(
        self, model: PreTrainedModel, windows: Windows, batch_size: int = 4, objective: Objective = CAUSAL
    ) -> None:
        self.model, self.windows, self.objective = model, windows, objective
        self._stack = stack = BlockStack(model, windows, batch_size)
        self._batches = [Windows(batch.input_ids, batch.attention_mask) for batch in windows.batches(batch_size)]
        self._streams = [stack.entries]  # [block][batch]
        self._outputs: list[Tensor] | None = None  # rows of every batch
        self._whole = not stack.blocks or not stack.calls_once()
        if self._whole:
            return
        with torch.no_grad():
            for block in range(len(stack.names) - 1):
                self._streams.append([stack.keep(stack.run(block, i, x)) for i, x in enumerate(self._streams[-1])])
        self._outputs = []
        with torch.inference_mode():
            for index, stream in enumerate(self._streams[-1]):
                self._outputs.append(stack.compared(objective, len(stack.names) - 1, index, stream))
                if self._outputs[0].nbytes * len(self._batches) > KEPT_BYTES:
                    self._outputs = None
                    break

    @classmethod
    def on(
        cls, model: PreTrainedModel, calibration: Windows, batch_size: int = 4, objective: Objective = CAUSAL
    ) -> Probe:
        """A probe on the last few calibration windows, fewer where the model has many layers."""
        few = last_few(calibration, len(prunable_layers(model)), PROBE_PASSES)
        return cls(model, few, batch_size, objective)

    def __call__(self, layers: Sequence[Layer], planned: Sequence[PlannedLayer]) -> float:
        """KL(dense‖model with these layers pruned), nats per token; the model is dense again afterwards."""
        swap = WeightSwap(layers)
        for layer, made in zip(layers, planned, strict=True):
            layer.assign(made.weight, made.bias)
        try:
            return self.kl(layers, swap)
        finally:
            swap.restore()

    def kl(self, changed: Sequence[Layer], dense: WeightSwap) -> float:
        """KL(dense‖model as it is), nats per token.

        Args:
            changed: layers in which it differs from the dense model, and no others.
            dense: what they had before.
        """
        first = min(block_of(layer, self._stack.names) for layer in changed)
        total = tokens = 0.0
        for index, batch in enumerate(self._batches):
            known = partial(self._dense, dense, index) if self._outputs is None else [self._outputs[index]]
            with self._begun(first, index):
                quality = evaluate(
                    self.model,
                    batch,
                    objective=self.objective,
                    dense=known,
                    batch_size=len(batch),
                    alone=True,
                )
            assert quality.kl is not None
            total += quality.kl * quality.tokens
            tokens += quality.tokens
        return total / tokens

    def factors(
        self, layers: Sequence[Layer], planned: Sequence[PlannedLayer], *, together: bool = False, quiet: bool = True
    ) -> dict[str, float]:
        """Measured over predicted loss by layer name, at least ``MIN_FACTOR``; 1 where nothing is predicted to be lost.

        Args:
            layers: to measure, dense.
            planned: the same layers pruned.
            together: measure all layers of a block at once, which is faster and gives them one factor.
            quiet: show no progress bar.
        """
        groups: dict[str | int, list[int]] = {}
        for i, layer in enumerate(layers):
            groups.setdefault(block_of(layer, self._stack.names) if together else layer.name, []).append(i)
        found: dict[str, float] = {}
        own = ranks.share(list(groups.values()))
        for members in progress(own, desc="probe", unit="block" if together else "layer", disable=quiet):
            some, made = [layers[i] for i in members], [planned[i] for i in members]
            predicted = sum(one.predicted for one in made)
            measured = self(some, made) if predicted > 0 else 0.0
            if not math.isfinite(measured):
                raise InputError(
                    f"KL(dense‖pruned) is {measured} where {some[0].name} alone is pruned; try --dtype float32 or "
                    "bfloat16, or leave the layer out with --ignore"
                )
            factor = max(measured / predicted, MIN_FACTOR) if predicted > 0 else 1.0
            found |= dict.fromkeys((layer.name for layer in some), factor)
        return {name: factor for part in ranks.gathered(found) for name, factor in part.items()}

    @contextmanager
    def _begun(self, block: int, batch: int) -> Iterator[None]:
        """Forward passes of a batch begin at a block; they are whole at −1, of layers outside all blocks."""
        if block < 0 or self._whole:
            yield
            return
        with begun_at(self._stack, block, repeat(self._streams[block][batch])):
            yield

    @contextmanager
    def _dense(self, swap: WeightSwap, batch: int) -> Iterator[None]:
        with swap.swapped_in(), self._begun(len(self._streams) - 1, batch):
            yield
