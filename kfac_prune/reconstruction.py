"""Reconstruction: the weights left in a block learn to bring the residual stream back to the dense model's.

The dense and the pruned streams pass through the blocks in order. Each block in turn (or each sub-layer: up to and
including a layer that writes into the stream) minimises ``½ E[δᵀ G δ]`` over its kept weights by Adam, δ being the
difference of the streams after it and G the covariance of the gradients there, so that the objective is a KL in nats
per token to second order (DESIGN §7). One of them at a time has gradients and optimizer state. Reconstruction with
G = I is known (Wanda++, Yang et al. 2025); the Fisher metric is ours.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from kfac_prune import ranks
from kfac_prune.curvature.factors import Factors
from kfac_prune.data import Windows
from kfac_prune.errors import InputError
from kfac_prune.memory import arriving
from kfac_prune.models import only_trained
from kfac_prune.offload import resident
from kfac_prune.operators import Damping
from kfac_prune.plan import Plan
from kfac_prune.products import approximately
from kfac_prune.store import Journal, content_hash
from kfac_prune.stream import BlockStack, Shelf, observed
from kfac_prune.sublayers import Part, Unit, sublayers

logger = logging.getLogger("kfac_prune")

#: Tokens per step, in whole windows. Of 2048, 1024 and 512 the smallest was best for the same number of epochs.
STEP_TOKENS = 512
#: One batch in so many is held out: no step is taken on it, and it decides which state is kept.
HELD_OUT = 10
#: Adam's learning rate at the first step; it falls to zero on a cosine. The first block divides it by ``LOWER`` while
#: that helps; the others take over what it found, and divide where that makes them worse. So many are tried per block.
RATE, LOWER, TRIES = 4e-3, 4.0, 3


@dataclass(frozen=True)
class Reconstruction:
    """How to reconstruct.

    Attributes:
        epochs: passes over the calibration windows per block or sub-layer.
        unit: "block" trains attention and FFN together, "sublayer" one after the other.
        seed: of the order of the batches.
        folder: where every finished block is left, from which a run that was interrupted goes on; None: nowhere.
    """

    epochs: int
    unit: Unit = "block"
    seed: int = 0
    folder: Path | None = None


@dataclass(frozen=True)
class Reconstructed:
    """What happened to one block or sub-layer.

    Attributes:
        name: of the block, or of the layer that ends the sub-layer.
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


def step_windows(windows: Windows) -> int:
    """Windows per step, so few that a tenth of the steps can be held out."""
    return max(min(STEP_TOKENS // windows.input_ids.shape[1], len(windows) // HELD_OUT), 1)


def own_steps(windows: Windows) -> tuple[Windows, int]:
    """What this process trains on: its windows, and how many of them it takes per step.

    Alone it takes all. Several processes take a step together, on ``step_windows`` windows or at least one each; what
    is left over when the steps are whole takes no part.

    Raises:
        InputError: the windows are too few for so many processes.
    """
    size, processes = step_windows(windows), ranks.count()
    if processes == 1:
        return windows, size
    each = -(-size // processes)
    steps = len(windows) // (each * processes)
    if steps < 2:
        raise InputError(
            f"reconstruction holds a tenth of the calibration windows out, and {processes} processes take "
            f"{each * processes} of the {len(windows)} per step; add --samples, start fewer processes, or use "
            "--reconstruct 0"
        )
    return windows.every(processes, ranks.index(), steps * each * processes), each


def metrics(factors: Factors, damping: Damping, unit: Unit) -> dict[str, Tensor]:
    """The metric G [d, d], damped, after every block by its name; for sub-layers also where a layer may end one."""
    found = dict(factors.streams)
    if unit == "sublayer":
        widths = {len(g) for g in found.values()}
        found |= {name: layer.g for name, layer in factors.layers.items() if len(layer.g) in widths}
    return {name: damping(g, name="G", where=name)[0] for name, g in found.items()}


def table(records: Sequence[Reconstructed]) -> str:
    """Block by block: held-out objective before and after, and seconds, as aligned text."""
    width = max([len("reconstructed"), *(len(record.name) for record in records)])
    lines = [f"{'reconstructed':{width}}    before     after  learning rate  seconds   (held-out, nats as above)"]
    lines += [
        f"{r.name:{width}}  {r.before:8.6f}  {r.after:8.6f}  {r.learning_rate:13.2g}  {r.seconds:7.1f}" for r in records
    ]
    return "\n".join(lines)


def reconstruct_sparse(
    model: PreTrainedModel,
    plan: Plan,
    factors: Factors,
    windows: Windows,
    dense: Callable[[], AbstractContextManager[None]],
    settings: Reconstruction,
    *,
    damping: Damping | None = None,
    shelf: Shelf = "cpu",
    quiet: bool = True,
) -> list[Reconstructed]:
    """Reconstruct a model with zeros in place; its masks stay as they are.

    Args:
        model: pruned by the plan.
        plan: that was applied.
        factors: of the dense model, for the metric.
        windows: calibration tokens [N, T]; masked positions are left out.
        dense: a context in which the model has its dense weights (``WeightSwap.swapped_in``).
        settings: epochs, unit, seed, folder.
        damping: of the metric; None is ``Damping()``.
        shelf: where streams wait.
        quiet: show no progress bar.
    """
    with dense():
        stack = BlockStack(model, *own_steps(windows), shelf)
    masks = {layer.name: layer.mask for layer in plan.layers}
    metric = metrics(factors, damping or Damping(), settings.unit)
    return reconstruct(stack, stack, metric, settings, trained=masks, masks=masks, dense=dense, quiet=quiet)


def reconstruct(
    dense_stack: BlockStack,
    stack: BlockStack,
    metric: Mapping[str, Tensor],
    settings: Reconstruction,
    *,
    trained: Collection[str],
    masks: Mapping[str, Tensor] | None = None,
    dense: Callable[[], AbstractContextManager[None]] = nullcontext,
    quiet: bool = True,
) -> list[Reconstructed]:
    """Reconstruct all blocks in order, in place.

    Under several processes (``torch.distributed``) every one brings its own windows, in equally many batches; gradients
    and held-out objectives are then means over the tokens of all of them.

    Args:
        dense_stack: blocks of the dense model.
        stack: blocks of the pruned model, in batches as steps are taken on (``step_windows``); the same object where
            ``dense`` makes one model the other.
        metric: G [d, d], damped, after every block by its name (``metrics``). With unit "sublayer" a layer that writes
            into the stream ends a sub-layer where there is a metric under its name.
        settings: epochs, unit, seed and folder.
        trained: names of the layers that may change.
        masks: [out, in] per layer, True = kept; layers without one keep every weight.
        dense: a context in which ``dense_stack`` is dense.
        quiet: show no progress bar.

    Raises:
        InputError: too few batches to hold one out, a stream that is not finite (names the block), or a file in the
            folder that is broken or from another run.
    """
    batches = len(stack.entries)
    if batches < 2:
        raise InputError(
            "reconstruction holds a tenth of the calibration windows out and there is one batch; add --samples, or use "
            "--reconstruct 0"
        )
    most, least = ranks.largest(batches, stack.device), -ranks.largest(-batches, stack.device)
    if most != least:
        raise InputError(f"{least} batches in one process and {most} in another; share the windows out evenly")
    masks = masks or {}
    journal = None
    if settings.folder is not None and ranks.leads():
        journal = Journal(settings.folder, "reconstruction", _fingerprint(stack, settings, masks, dense))
    dense_stream, stream = list(dense_stack.entries), list(dense_stack.entries)
    records: list[Reconstructed] = []
    rate = None
    with tqdm(total=len(stack.names), desc="reconstruct", unit="block", disable=quiet) as bar:
        for index in range(len(stack.names)):
            with dense():
                parts, dense_stream = sublayers(dense_stack, stack, index, dense_stream, metric, settings.unit)
            for part in parts:
                part = replace(part, trained=[layer for layer in part.trained if layer.name in trained])
                if not part.trained:
                    continue
                with resident(stack.blocks[index], stack.device):
                    problem = _Problem(stack, index, part, stream, masks)
                    record = _journaled(problem, rate, settings, journal, f"{len(records):04} {part.name}")
                records.append(record)
                rate = record.learning_rate or rate
                bar.set_postfix_str(f"{record.name} {record.before:.2e} -> {record.after:.2e}")
            with torch.no_grad():
                stream = [stack.keep(stack.run(index, batch, x)) for batch, x in enumerate(stream)]
            bar.update(1)
    return records


def _journaled(
    problem: _Problem, rate: float | None, settings: Reconstruction, journal: Journal | None, entry: str
) -> Reconstructed:
    """Solve a problem, or take over what the journal has of it; the process that leads keeps one."""
    finished = None if journal is None else journal.read(entry)
    kept = ranks.told(None if finished is None else finished[1])
    if kept is not None:
        if finished is not None:
            problem.restore(finished[0])
        problem.assign([ranks.sent(p.data) for p in problem.parameters])
        return Reconstructed(**kept)
    record = problem.solve(rate, settings)
    if journal is not None:
        journal.write(entry, problem.state(), asdict(record))
    return record


@dataclass(frozen=True)
class _Batch:
    """The stream that enters a block or sub-layer and the dense one after it, [B, T, d] each."""

    number: int
    stream: Tensor
    goal: Tensor


class _Problem:
    """The training of one block or sub-layer.

    Weights that are pruned have no gradient, so Adam leaves them at zero. Steps are taken on float32 copies; the
    forward pass uses them as the model's dtype rounds them, so what is measured is what is kept.
    """

    def __init__(
        self, stack: BlockStack, index: int, part: Part, stream: Sequence[Tensor], masks: Mapping[str, Tensor]
    ) -> None:
        self.part, self._stack, self._index, self._stream = part, stack, index, stream
        first = len(stream) - max(len(stream) // HELD_OUT, 1)
        self._train, self._held = range(first), range(first, len(stream))
        self.parameters: list[nn.Parameter] = []
        self._masks: list[Tensor | None] = []
        for layer in part.trained:
            for parameter in layer.parameters():
                mask = masks.get(layer.name) if parameter.ndim > 1 else None
                self.parameters.append(parameter)
                self._masks.append(None if mask is None else layer.stored(mask).to(parameter.device))
        self._metric = part.metric.to(self.parameters[0].device)

    def assign(self, values: Sequence[Tensor]) -> None:
        """Replace the trained parameters; the tensors that they had are not written to."""
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.data = value

    def state(self) -> dict[str, Tensor]:
        """The trained parameters by their number."""
        return {str(i): p.data for i, p in enumerate(self.parameters)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` gave."""
        self.assign([state[str(i)].to(p.device) for i, p in enumerate(self.parameters)])

    def solve(self, rate: float | None, settings: Reconstruction) -> Reconstructed:
        """Train at the rate that served the block before, or find one; keep the state that is best where held out."""
        begin = time.perf_counter()
        start = [p.data for p in self.parameters]
        before = self._objective()
        if not math.isfinite(before):
            raise InputError(
                f"the residual stream after {self.part.name} is not finite on the calibration text; "
                "try --dtype float32 or bfloat16, or --reconstruct 0"
            )
        best, kept, chosen = before, start, 0.0
        search, rate = rate is None, rate or RATE
        for _ in range(TRIES):
            self.assign(start)
            loss, state = self._trained(rate, before, settings)
            if loss < best:
                best, kept, chosen = loss, state, rate
                if not search:
                    break
            elif chosen:  # a lower rate is no better
                break
            else:
                logger.info("reconstruct: %s: a learning rate of %.3g does not help; lowered", self.part.name, rate)
            rate /= LOWER
        self.assign(kept)
        return Reconstructed(self.part.name, before, best, chosen, time.perf_counter() - begin)

    def _trained(self, rate: float, before: float, settings: Reconstruction) -> tuple[float, list[Tensor]]:
        """The lowest held-out objective of one training, and the weights that gave it; given up where it diverges."""
        masters = [p.data.float().clone(memory_format=torch.contiguous_format) for p in self.parameters]
        optimizer = torch.optim.Adam(masters, lr=rate, betas=(0.9, 0.95), fused=True)
        generator = torch.Generator().manual_seed(settings.seed)
        steps = settings.epochs * len(self._train)
        step, best, kept = 0, math.inf, [p.data for p in self.parameters]
        with only_trained(self._stack.blocks[self._index], self.parameters):
            for _ in range(settings.epochs):
                for batch in self._arriving(torch.randperm(len(self._train), generator=generator).tolist()):
                    optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
                    step += 1
                    self._gradient(batch, masters)
                    optimizer.step()
                    self.assign([m.to(p.dtype, copy=True) for m, p in zip(masters, self.parameters, strict=True)])
                now = self._objective()
                if now < best:
                    best, kept = now, [p.data for p in self.parameters]
                if not now < 2 * before:  # diverges
                    break
        return best, kept

    def _gradient(self, batch: _Batch, masters: Sequence[Tensor]) -> None:
        """Leave the gradient of one step's objective, zero off the masks, with the float32 copies."""
        with approximately(self.part.trained):
            total, tokens = self._loss(batch)
            # an expert that no token of the batch reaches has no gradient
            gradients = torch.autograd.grad(total, self.parameters, allow_unused=True, materialize_grads=True)
        (everywhere,) = ranks.summed(total.new_tensor(tokens))
        for master, gradient, mask in zip(masters, ranks.summed(*gradients), self._masks, strict=True):
            gradient = gradient.float() / everywhere
            gradient = gradient if mask is None else gradient * mask
            master.grad = gradient.contiguous()  # fused Adam takes both for laid out alike

    def _objective(self) -> float:
        """Held-out objective, nats per token."""
        with torch.no_grad():
            sums = [(float(total), tokens) for total, tokens in map(self._loss, self._arriving(self._held))]
        both = torch.tensor(sums, dtype=torch.float64, device=self._metric.device).sum(0)
        total, tokens = ranks.summed(both)[0].tolist()
        return float(total / tokens)

    def _arriving(self, numbers: Sequence[int]) -> Iterator[_Batch]:
        """Batches by their numbers, the next one on its way while one is worked on."""
        pairs = ((self._stream[number], self.part.goals[number]) for number in numbers)
        for number, (stream, goal) in zip(numbers, arriving(pairs, self._metric.device), strict=True):
            yield _Batch(number, stream, goal)

    def _loss(self, batch: _Batch) -> tuple[Tensor, int]:
        """Σ ½ δᵀ G δ over a batch's tokens, and their number."""
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


def _fingerprint(
    stack: BlockStack,
    settings: Reconstruction,
    masks: Mapping[str, Tensor],
    dense: Callable[[], AbstractContextManager[None]],
) -> str:
    """Of all that decides the result: weights before and after pruning, masks, the stream that enters, settings."""
    entries = {f"entry {batch}": stream for batch, stream in enumerate(stack.entries)}
    parts = [str(replace(settings, folder=None)), content_hash(entries), content_hash(masks)]
    for context in (dense, nullcontext):
        with context():
            parts += [content_hash(block.state_dict()) for block in stack.blocks]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()
