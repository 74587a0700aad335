"""Recovery: the weights left in the whole model learn together to give the dense model's outputs (DESIGN §7).

Masked distillation: Adam on KL(dense‖pruned) of the outputs over the calibration windows, the mask fixed. It is no
longer one-shot pruning, needs gradients and optimizer state for the whole model, and overfits where windows are few;
so a tenth of them is held out, training stops when they gain no more, and the best state is kept.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kfac_prune import ranks
from kfac_prune.data import WindowBatch, Windows, held_out
from kfac_prune.errors import InputError
from kfac_prune.masked_training import MaskedParameters, adam, mean_everywhere
from kfac_prune.models import Layer, only_trained
from kfac_prune.objective import CAUSAL, Objective
from kfac_prune.progress import progress
from kfac_prune.quality import compared
from kfac_prune.reconstruction import step_windows

logger = logging.getLogger("kfac_prune")

#: Adam's learning rate at the first step, per root mean square of a layer's kept weights; it falls to zero on a cosine.
#: Where the first epoch does not lower the held-out KL, training starts again with half of it.
RATE = 0.01
#: The lowest that is tried.
LOWEST = RATE / 2**6
#: Training stops after so many epochs without a new best.
PATIENCE = 2


@dataclass(frozen=True)
class Recovered:
    """What the recovery did.

    Attributes:
        before: held-out KL at the start, nats per unit of the objective.
        after: with the weights that were kept; never more.
        epochs: passes over the windows that were made, at all learning rates.
        best_epoch: at ``learning_rate``, the one whose end gave the kept weights; 0 where the start was best.
        learning_rate: that the kept weights were found with, per root mean square of a layer's kept weights; 0 where
            the start was best.
        seconds: spent.
    """

    before: float
    after: float
    epochs: int
    best_epoch: int
    learning_rate: float
    seconds: float


def recover(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    windows: Windows,
    dense: PreTrainedModel | Callable[[], AbstractContextManager[None]],
    *,
    epochs: int,
    masks: Mapping[str, Tensor] | None = None,
    objective: Objective = CAUSAL,
    seed: int = 0,
    quiet: bool = True,
) -> Recovered:
    """Train the kept weights of some layers on KL(dense‖model), in place.

    Under several processes (``accelerate launch``) every one brings the same model and windows; each batch is shared
    out among them and gradients are means over the units of all.

    Args:
        model: pruned.
        layers: of it, whose weights and biases are trained. Where ``dense`` is a context, only such as it swaps.
        windows: calibration tokens [N, T]; masked positions are left out.
        dense: another model, or a context in which ``model`` itself is dense (``WeightSwap.swapped_in``).
        epochs: passes over the windows at the learning rate that helps, at most.
        masks: [out, in] per layer by name, True = kept; layers without one keep every weight.
        objective: what the model computes.
        seed: of the order of the windows.
        quiet: show no progress bar.

    Raises:
        InputError: too few windows to hold some out, or the KL is not finite at the start.
    """
    begin = time.perf_counter()
    processes = ranks.count()
    few = held_out(len(windows))
    if len(windows) - few < processes:
        raise InputError(
            f"recovery holds a tenth of the calibration windows out and there are {len(windows)} for {processes} "
            "processes; add --samples, or use --recover-epochs 0"
        )
    train, held = windows.split(few)
    size = min(-(-step_windows(windows) // processes), len(train) // processes) * processes
    problem = _Distillation(model, dense, layers, masks or {}, objective)
    mine = ranks.share(list(held.batches(max(size // processes, 1))))
    before = best = problem.kl(mine)
    if not math.isfinite(before):
        raise InputError(
            "KL(dense‖pruned) is not finite on the calibration text; try --dtype float32 or bfloat16, or "
            "--recover-epochs 0"
        )
    kept = problem.weights.values()
    per_epoch = len(train) // size  # the few windows over change with every epoch
    best_epoch, passes, rate = 0, 0, RATE
    bar = progress(total=epochs * per_epoch, desc="recover", unit="step", disable=quiet)

    def epochs_at(rate: float) -> Iterator[float]:
        """Train from the kept weights at a rate; the held-out KL after every epoch."""
        problem.weights.assign(kept)
        copies = problem.weights.copies()
        optimizer = adam(copies, rate, (0.9, 0.95))
        generator = torch.Generator().manual_seed(seed)
        step, steps = 0, epochs * per_epoch
        for _ in range(epochs):
            order = torch.randperm(len(train), generator=generator)[: per_epoch * size]
            for rows in order.split(size):
                optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
                step += 1
                loss = problem.gradient(_chosen(train, rows[ranks.index() :: processes]), copies)
                optimizer.step()
                problem.weights.take_over(copies)
                bar.set_postfix_str(f"KL {loss:.4f}, held out {best:.4f}", refresh=False)
                bar.update(1)
            yield problem.kl(mine)

    with bar, only_trained(model, problem.weights.parameters):
        while epochs and before > 0:
            bar.reset()
            for epoch, now in enumerate(epochs_at(rate), 1):
                passes += 1
                if now < best:
                    best, kept, best_epoch = now, problem.weights.values(), epoch
                if not best_epoch or epoch - best_epoch >= PATIENCE or not now < 2 * before:
                    break
            if best_epoch or rate / 2 < LOWEST:
                break
            rate /= 2
            logger.info("recovery: the first epoch does not lower the held-out KL; learning rate %.3g", rate)
    problem.weights.assign(kept)
    if best_epoch == 0 and passes:
        logger.warning("recovery: no learning rate lowered the held-out KL %.4g; the model is left as it was", before)
    chosen = rate if best_epoch else 0.0
    return Recovered(before, best, passes, best_epoch, chosen, time.perf_counter() - begin)


def _chosen(windows: Windows, rows: Tensor) -> WindowBatch:
    """Some rows as one batch, without the columns that pad all of them."""
    return next(windows.chosen(rows).batches(len(rows)))


class _Distillation:
    """The pruned model beside the dense one, and the parameters to train."""

    def __init__(
        self,
        model: PreTrainedModel,
        dense: PreTrainedModel | Callable[[], AbstractContextManager[None]],
        layers: Sequence[Layer],
        masks: Mapping[str, Tensor],
        objective: Objective,
    ) -> None:
        self._model, self._dense, self._objective = model, dense, objective
        self.weights = MaskedParameters(layers, masks)

    def kl(self, batches: Sequence[WindowBatch]) -> float:
        """Mean divergence over the batches of all processes, nats per unit."""
        with torch.no_grad():
            sums = [(float(total), units) for total, units in map(self._divergence, batches)]
        return mean_everywhere(sums, self._model.device)

    def gradient(self, batch: WindowBatch, copies: Sequence[Tensor]) -> float:
        """Leave the gradient of the mean KL with the copies of the parameters; returns that KL."""
        return float(self.weights.differentiate(*self._divergence(batch), copies))

    def _divergence(self, batch: WindowBatch) -> tuple[Tensor, int]:
        """Σ KL(dense‖model) over a batch's units, and their number."""
        with torch.no_grad():
            if isinstance(self._dense, PreTrainedModel):
                p = compared(self._dense, batch, self._objective)
            else:
                with self._dense():
                    p = compared(self._model, batch, self._objective)
        q = compared(self._model, batch, self._objective)
        return self._objective.divergence(p.to(q.device), q).sum(), len(q)
