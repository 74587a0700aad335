"""One block or sub-layer of a pruned model that learns to bring the residual stream back (see ``reconstruction``)."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from kfac_prune.data import held_out
from kfac_prune.errors import InputError
from kfac_prune.masked_training import MaskedParameters, adam, mean_everywhere
from kfac_prune.memory import arriving
from kfac_prune.models import only_trained
from kfac_prune.objective import CAUSAL, Objective
from kfac_prune.products import approximately
from kfac_prune.stream import BlockStack, observed
from kfac_prune.sublayers import Part, Unit

logger = logging.getLogger("kfac_prune")

#: Adam's learning rate at the first step, per root mean square of a layer's kept weights; a share x of the steps later
#: it is 1 − x² of that.
#: The first block tries this one, half of it and so on, for one epoch each, while that brings more; all blocks then
#: learn at twice the best, this one at most, since a whole training averages out the noise that one epoch leaves.
RATE = 0.02
#: The lowest that is tried.
LOWEST = RATE / 2**7
#: Adam's; as few steps as these profit from a short memory.
BETAS = (0.8, 0.95)
#: Nats; a block that loses less is not worth training.
LEAST = 1e-9


@dataclass(frozen=True)
class Reconstruction:
    """How to reconstruct.

    Attributes:
        epochs: passes over the calibration windows per block or sub-layer.
        unit: "block" trains attention and FFN together, "sublayer" one after the other.
        seed: of the order of the batches.
        folder: where every finished block is left, from which a run that was interrupted goes on, and those of other
            runs go; None: nowhere.
        objective: what the model computes; the last block is trained on its KL.
        own_text: windows that the dense model writes itself, per calibration window (see ``kfac_prune.own_text``).
            An epoch then takes as many steps as without, each on text of either kind.
    """

    epochs: int
    unit: Unit = "block"
    seed: int = 0
    folder: Path | None = None
    objective: Objective = CAUSAL
    own_text: int = 0


@dataclass(frozen=True)
class Reconstructed:
    """What happened to one block or sub-layer.

    Attributes:
        name: of the block, or of the layer that ends the sub-layer.
        before: held-out ½ E[δᵀ G δ] at the start, nats per token; of the last block KL(dense‖model), nats per unit of
            the objective.
        after: with the weights that were kept; never more.
        learning_rate: that the kept weights were found with, per root mean square of a layer's kept weights; 0 where
            the start was best.
        seconds: spent.
    """

    name: str
    before: float
    after: float
    learning_rate: float
    seconds: float


@dataclass(frozen=True)
class _Batch:
    """The stream that enters a block or sub-layer and the dense one after it, [B, T, d] each."""

    number: int
    stream: Tensor
    goal: Tensor


@dataclass(frozen=True)
class Teacher:
    """The dense model beyond its last block.

    Attributes:
        stack: of the dense model.
        dense: a context in which it is dense.
        objective: what it computes.
    """

    stack: BlockStack
    dense: Callable[[], AbstractContextManager[None]]
    objective: Objective

    def divergence(self, batch: _Batch, stack: BlockStack) -> tuple[Tensor, int]:
        """Σ KL(dense‖pruned) over a batch's units, and their number.

        Args:
            batch: the stream that enters the last block, and the dense one after it.
            stack: of the pruned model.
        """
        last = len(stack.blocks) - 1
        with torch.no_grad(), self.dense():
            p = self.stack.compared(self.objective, last + 1, batch.number, batch.goal)
        q = stack.compared(self.objective, last, batch.number, batch.stream)
        return self.objective.divergence(p, q).sum(), len(p)


class BlockTraining:
    """The training of one block or sub-layer.

    Its objective is ``½ E[δᵀ G δ]`` or, with a teacher, the KL of the model's outputs.

    Args:
        stack: blocks of the pruned model.
        index: of the block.
        part: it, or its sub-layer.
        stream: that enters the block, per batch.
        masks: [out, in] per layer, True = kept.
        teacher: of the last block.
        further: batches at the beginning that are more text than an epoch has steps; none of them is held out.
    """

    def __init__(
        self,
        stack: BlockStack,
        index: int,
        part: Part,
        stream: Sequence[Tensor],
        masks: Mapping[str, Tensor],
        teacher: Teacher | None = None,
        further: int = 0,
    ) -> None:
        self.part, self._stack, self._index, self._stream, self._teacher = part, stack, index, stream, teacher
        first = len(stream) - held_out(len(stream) - further)
        self._train, self._held, self._steps = range(first), range(first, len(stream)), first - further
        self.weights = MaskedParameters(part.trained, masks)
        self._metric = part.metric.to(self.weights.parameters[0].device)

    def state(self) -> dict[str, Tensor]:
        """The trained parameters by their number."""
        return {str(i): value for i, value in enumerate(self.weights.values())}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` gave."""
        self.weights.assign([state[str(i)].to(p.device) for i, p in enumerate(self.weights.parameters)])

    def solve(self, rate: float | None, settings: Reconstruction) -> Reconstructed:
        """Train at a rate, or at one that is searched first; keep the state that is best where held out.

        A block that its rate does not help halves it, for itself.
        """
        begin = time.perf_counter()
        start = self.weights.values()
        before = self._objective()
        if not math.isfinite(before):
            what = "KL(dense‖pruned)" if self._teacher else "the residual stream"
            raise InputError(
                f"{what} after {self.part.name} is not finite on the calibration text; "
                "try --dtype float32 or bfloat16, or --reconstruct 0"
            )
        loss, kept, chosen = before, start, 0.0

        @cache  # with one epoch a trial is a whole training
        def attempt(rate: float, epochs: int) -> float:
            nonlocal loss, kept, chosen
            now, state = self._descend(rate, start, before, replace(settings, epochs=epochs))
            if now < loss:
                loss, kept, chosen = now, state, rate
            return now

        if before > LEAST:
            rate = rate or _search(before, attempt)
            while not attempt(rate, settings.epochs) < before and rate / 2 >= LOWEST:
                logger.info("reconstruct: %s: a learning rate of %.3g does not help", self.part.name, rate)
                rate /= 2
        self.weights.assign(kept)
        return Reconstructed(self.part.name, before, loss, chosen, time.perf_counter() - begin)

    def _descend(
        self, rate: float, start: list[Tensor], before: float, settings: Reconstruction
    ) -> tuple[float, list[Tensor]]:
        """The lowest held-out objective of one training, and the weights that gave it.

        It is given up where it is no lower after an epoch than at the start.
        """
        self.weights.assign(start)
        copies = self.weights.copies()
        optimizer = adam(copies, rate, BETAS)
        steps = settings.epochs * self._steps
        schedule = LambdaLR(optimizer, lambda step: 1 - (step / steps) ** 2)
        order = self._order(settings.seed)
        best, kept = math.inf, start
        with only_trained(self._stack.model, self.weights.parameters):
            for _ in range(settings.epochs):
                for batch in self._arriving(list(islice(order, self._steps))):
                    with approximately(self.part.trained):
                        self.weights.differentiate(*self._loss(batch), copies)
                    optimizer.step()
                    schedule.step()
                    self.weights.take_over(copies)
                now = self._objective()
                if now < best:
                    best, kept = now, self.weights.values()
                if not now < before:  # too fast: half the rate helps more
                    break
        return best, kept

    def _order(self, seed: int) -> Iterator[int]:
        """Batches to take steps on, without end: all in a random order, then all in another one."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield from torch.randperm(len(self._train), generator=generator).tolist()

    def _objective(self) -> float:
        """Held-out objective, nats per token, or per unit with a teacher."""
        with torch.no_grad():
            sums = [(float(total), tokens) for total, tokens in map(self._loss, self._arriving(self._held))]
        return mean_everywhere(sums, self._metric.device)

    def _arriving(self, numbers: Sequence[int]) -> Iterator[_Batch]:
        """Batches by their numbers, the next one on its way while one is worked on."""
        pairs = ((self._stream[number], self.part.goals[number]) for number in numbers)
        for number, (stream, goal) in zip(numbers, arriving(pairs, self._metric.device), strict=True):
            yield _Batch(number, stream, goal)

    def _loss(self, batch: _Batch) -> tuple[Tensor, int]:
        """Σ ½ δᵀ G δ over a batch's tokens, and their number; with a teacher Σ KL over its units."""
        if self._teacher is not None:
            return self._teacher.divergence(batch, self._stack)
        stack, writers, stream = self._stack, self.part.writers, batch.stream
        if writers is None:
            stream = stack.run(self._index, batch.number, stream)
        else:
            with observed([w.layer for w in writers], detach=False) as seen:
                stack.run(self._index, batch.number, stream, until=writers[-1].layer)
            for writer in writers:
                stream = stream + writer.factor * seen[writer.layer.name][1].reshape(stream.shape)
        delta = (stream - batch.goal).float().flatten(0, 1)  # [B T, d]
        mask = stack.masks[batch.number]
        if mask is not None:
            delta = delta[mask.reshape(-1)]
        return 0.5 * ((delta @ self._metric.float()) * delta).sum(), len(delta)


def _search(before: float, attempt: Callable[[float, int], float]) -> float:
    """Twice the best of ``RATE``, half of it, and so on, in trials of one epoch; ``RATE`` at most.

    The search ends where a rate is no better than the one before it and that one has helped.
    """
    rate, best, found = RATE, math.inf, RATE
    while rate >= LOWEST:
        now = attempt(rate, 1)
        if best < before and not now < best:
            break
        if now < best:
            best, found = now, rate
        rate /= 2
    return min(2 * found, RATE)
