"""Reconstruction: the weights left in a sub-block learn to bring the residual stream back to the dense model's.

The dense and the pruned streams pass through the blocks in order. Each sub-block in turn (up to and including a layer
that writes into the stream; or a whole block) minimises ``½ E[δᵀ G δ]`` over its kept weights by Adam, δ being the
difference of the streams after it and G the covariance of the gradients there, so that the objective is a KL in nats
per token to second order (DESIGN §7). One sub-block at a time has gradients and optimizer state. Reconstruction with
G = I is known (Wanda++, Yang et al. 2025); the Fisher metric is ours.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from kfac_prune.curvature.estimate import Factors
from kfac_prune.errors import InputError
from kfac_prune.models import Layer
from kfac_prune.operators import Damping
from kfac_prune.refitting import dense_pass
from kfac_prune.stream import BlockStack, Writer, find_writers, observed

logger = logging.getLogger("kfac_prune")

Unit = Literal["sublayer", "block"]
#: Learning rates that the first sub-block tries; the one with the lowest held-out objective serves all.
LEARNING_RATES = (5e-4, 1e-3, 2e-3, 4e-3)
#: Windows per step.
BATCH = 8
#: One batch in so many is held out: no step is taken on it, and it decides which state is kept.
HELD_OUT = 10


@dataclass(frozen=True)
class Reconstruction:
    """How to reconstruct.

    Attributes:
        epochs: passes over the calibration windows per sub-block.
        unit: "sublayer" trains attention and FFN one after the other, "block" both together.
        seed: of the order of the batches.
    """

    epochs: int
    unit: Unit = "sublayer"
    seed: int = 0


@dataclass(frozen=True)
class Reconstructed:
    """What happened to one sub-block.

    Attributes:
        name: of the layer that ends it.
        before: held-out ½ E[δᵀ G δ] at the start, nats per token.
        after: with the weights that were kept; never more.
        learning_rate: that the kept weights were found with; 0 where the start was best.
        seconds: spent.
    """

    name: str
    before: float
    after: float
    learning_rate: float
    seconds: float


def reconstruct(
    dense_stack: BlockStack,
    dense_layers: Mapping[str, Layer],
    stack: BlockStack,
    layers: Mapping[str, Layer],
    metric: Mapping[str, Tensor],
    settings: Reconstruction,
    *,
    trained: Collection[str],
    masks: Mapping[str, Tensor] | None = None,
    dense: Callable[[], AbstractContextManager[None]] = nullcontext,
    quiet: bool = True,
) -> list[Reconstructed]:
    """Reconstruct all sub-blocks in order, in place.

    Args:
        dense_stack: blocks of the dense model.
        dense_layers: all linear layers of the dense model by name.
        stack: blocks of the pruned model, in batches as steps are taken on; the same object where ``dense`` makes one
            model the other.
        layers: all linear layers of the pruned model, under the same names.
        metric: G [out, out], damped, per layer that writes into the stream.
        settings: epochs, unit and seed.
        trained: names of the layers that may change.
        masks: [out, in] per layer, True = kept; layers without one keep every weight.
        dense: a context in which ``dense_stack`` is dense.
        quiet: show no progress bar.

    Raises:
        InputError: too few batches to hold one out, or a stream that is not finite; names the block.
    """
    batches = len(stack.entries)
    if batches < 2:
        raise InputError(
            "reconstruction holds a tenth of the calibration windows out and there is one batch; add --samples, or use "
            "--reconstruct 0"
        )
    held = max(batches // HELD_OUT, 1)
    masks = masks or {}
    dense_stream, stream = list(dense_stack.entries), list(dense_stack.entries)
    records: list[Reconstructed] = []
    rates: Sequence[float] = LEARNING_RATES
    with tqdm(total=len(stack.names), desc="reconstruct", unit="block", disable=quiet) as bar:
        for index, block in enumerate(stack.names):
            inside = [layer for name, layer in dense_layers.items() if name.startswith(f"{block}.")]
            with dense():
                writers = find_writers(dense_stack, index, dense_stream[0], inside)
                order, goals, dense_stream = dense_pass(dense_stack, index, inside, writers, dense_stream)
            for part in _parts(block, order, writers, goals, layers, metric, settings.unit):
                part = replace(part, trained=[layer for layer in part.trained if layer.name in trained])
                if not part.trained:
                    continue
                problem = _Problem(stack, index, part, stream, masks, held, block)
                record = problem.solve(settings, rates)
                rates = [record.learning_rate] if record.learning_rate and len(rates) > 1 else rates
                records.append(record)
                bar.set_postfix_str(f"{part.writers[-1].layer.name} {record.before:.2e} -> {record.after:.2e}")
            with torch.no_grad():
                stream = [stack.run(index, batch, x).cpu() for batch, x in enumerate(stream)]
            bar.update(1)
    return records


def metrics(factors: Factors) -> dict[str, Tensor]:
    """G [out, out] of every layer, damped as usual."""
    damping = Damping()
    return {name: damping(layer.g, name="G", where=name)[0] for name, layer in factors.layers.items()}


@dataclass(frozen=True)
class _Part:
    """One sub-block: the layers that are trained, all writers up to its end, and the dense stream there."""

    trained: list[Layer]
    writers: list[Writer]
    goals: Sequence[Tensor]
    metric: Tensor


def _parts(
    block: str,
    order: Sequence[str],
    writers: Sequence[Writer],
    goals: Sequence[Sequence[Tensor]],
    layers: Mapping[str, Layer],
    metric: Mapping[str, Tensor],
    unit: Unit,
) -> Iterator[_Part]:
    """Cut a block into sub-blocks: each ends with a writer and holds the layers that run since the one before."""
    if not writers:
        if order:
            logger.warning("reconstruct: %s adds to the stream what no sum of its layers gives; left as it is", block)
        return
    ends = [i for i, writer in enumerate(writers) if writer.layer.name in metric]
    ends = ends[-1:] if unit == "block" else ends
    start = 0
    for end in ends:
        stop = list(order).index(writers[end].layer.name) + 1
        mine = [Writer(layers[w.layer.name], w.factor) for w in writers[: end + 1]]
        trained = [layers[name] for name in order[start:stop]]
        start = stop
        yield _Part(trained, mine, goals[end], metric[writers[end].layer.name])


class _Problem:
    """The training of one sub-block.

    Weights that are pruned have no gradient, so Adam leaves them at zero. Steps are taken on float32 copies.
    """

    def __init__(
        self,
        stack: BlockStack,
        index: int,
        part: _Part,
        stream: Sequence[Tensor],
        masks: Mapping[str, Tensor],
        held: int,
        block: str,
    ) -> None:
        self._stack, self._index, self._part, self._stream, self._block = stack, index, part, stream, block
        self._train, self._held = range(len(stream) - held), range(len(stream) - held, len(stream))
        self._parameters: list[torch.nn.Parameter] = []
        self._masks: list[Tensor | None] = []
        for layer in part.trained:
            for parameter in layer.parameters():
                mask = masks.get(layer.name) if parameter.ndim > 1 else None
                self._parameters.append(parameter)
                self._masks.append(None if mask is None else layer.stored(mask).to(parameter.device))

    def solve(self, settings: Reconstruction, rates: Sequence[float]) -> Reconstructed:
        """Train with each learning rate from the same start; keep the best state by the held-out objective."""
        begin = time.perf_counter()
        start = [p.data for p in self._parameters]
        before = self._objective()
        if not math.isfinite(before):
            raise InputError(
                f"the residual stream after {self._part.writers[-1].layer.name} is not finite on the calibration text; "
                "try --dtype float32 or bfloat16, or --reconstruct 0"
            )
        best, kept, chosen = before, start, 0.0
        for rate in rates:
            for parameter, value in zip(self._parameters, start, strict=True):
                parameter.data = value
            loss, state = self._trained(rate, settings)
            if loss < best:
                best, kept, chosen = loss, state, rate
            elif len(rates) == 1 and chosen == 0.0:
                logger.info("reconstruct: %s: a learning rate of %g does not help", self._block, rate)
        for parameter, value in zip(self._parameters, kept, strict=True):
            parameter.data = value
        return Reconstructed(self._part.writers[-1].layer.name, before, best, chosen, time.perf_counter() - begin)

    def _trained(self, rate: float, settings: Reconstruction) -> tuple[float, list[Tensor]]:
        """The lowest held-out objective of one training, and the weights that gave it."""
        masters = [p.data.float().clone() for p in self._parameters]
        optimizer = torch.optim.Adam(masters, lr=rate, betas=(0.9, 0.95))
        generator = torch.Generator().manual_seed(settings.seed)
        steps = settings.epochs * len(self._train)
        step, best, kept = 0, math.inf, [p.data for p in self._parameters]
        with self._gradients():
            for _ in range(settings.epochs):
                for batch in torch.randperm(len(self._train), generator=generator).tolist():
                    optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
                    step += 1
                    loss = self._loss(batch)[0]
                    gradients = torch.autograd.grad(loss, self._parameters)
                    for master, gradient, mask in zip(masters, gradients, self._masks, strict=True):
                        master.grad = gradient.float() if mask is None else gradient.float() * mask
                    optimizer.step()
                    for parameter, master in zip(self._parameters, masters, strict=True):
                        parameter.data = master.to(parameter.dtype, copy=True)
                loss_now = self._objective()
                if loss_now < best:
                    best, kept = loss_now, [p.data for p in self._parameters]
                if not math.isfinite(loss_now):
                    break
        return best, kept

    def _objective(self) -> float:
        """Held-out objective, nats per token."""
        with torch.no_grad():
            sums = [self._loss(batch) for batch in self._held]
        return sum(float(loss) * tokens for loss, tokens in sums) / sum(tokens for _, tokens in sums)

    def _loss(self, batch: int) -> tuple[Tensor, int]:
        """½ mean δᵀ G δ over a batch's tokens, and their number."""
        stack, part, stream = (
            self._stack,
            self._part,
            self._stream[batch].to(self._part.writers[-1].layer.weight.device),
        )
        with observed([w.layer for w in part.writers], detach=False) as seen:
            stack.run(self._index, batch, stream, until=part.writers[-1].layer)
        for writer in part.writers:
            stream = stream + writer.factor * seen[writer.layer.name][1].reshape(stream.shape)
        delta = (stream - part.goals[batch].to(stream.device)).float().flatten(0, 1)  # [B T, d]
        mask = stack.masks[batch]
        if mask is not None:
            delta = delta[mask.reshape(-1)]
        return 0.5 * ((delta @ part.metric.to(delta.dtype)) * delta).sum(-1).mean(), len(delta)

    @contextmanager
    def _gradients(self) -> Iterator[None]:
        """Only the trained parameters require gradients."""
        everything = list(self._stack.blocks[self._index].parameters())
        flags = [p.requires_grad for p in everything]
        try:
            for p in everything:
                p.requires_grad_(False)
            for p in self._parameters:
                p.requires_grad_(True)
            with torch.enable_grad():
                yield
        finally:
            for p, flag in zip(everything, flags, strict=True):
                p.requires_grad_(flag)
