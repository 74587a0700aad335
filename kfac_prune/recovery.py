"""Recovery: the weights left in the whole model learn together to give the dense model's outputs (DESIGN §7).

Masked distillation: Adam on KL(dense‖pruned) of the outputs over the calibration windows, the mask fixed. It is no
longer one-shot pruning, needs gradients and optimizer state for the whole model, and overfits where windows are few;
so a tenth of them is held out, training stops when they gain no more, and the best state is kept.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm
from transformers import PreTrainedModel

from kfac_prune import ranks
from kfac_prune.block_training import HELD_OUT
from kfac_prune.data import WindowBatch, Windows
from kfac_prune.errors import InputError
from kfac_prune.models import Layer, only_trained
from kfac_prune.objective import CAUSAL, Objective
from kfac_prune.quality import compared
from kfac_prune.reconstruction import step_windows

logger = logging.getLogger("kfac_prune")

#: Adam's learning rate at the first step; it falls to zero on a cosine.
RATE = 3e-4
#: Training stops after so many epochs without a new best.
PATIENCE = 2


@dataclass(frozen=True)
class Recovered:
    """What the recovery did.

    Attributes:
        before: held-out KL at the start, nats per unit of the objective.
        after: with the weights that were kept; never more.
        epochs: passes over the windows that were made.
        best_epoch: the one whose end gave the kept weights; 0 where the start was best.
        seconds: spent.
    """

    before: float
    after: float
    epochs: int
    best_epoch: int
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
        epochs: passes over the windows, at most.
        masks: [out, in] per layer by name, True = kept; layers without one keep every weight.
        objective: what the model computes.
        seed: of the order of the windows.
        quiet: show no progress bar.

    Raises:
        InputError: too few windows to hold some out, or the KL is not finite at the start.
    """
    begin = time.perf_counter()
    sharing = DataLoaderConfiguration(split_batches=True, even_batches=False)
    accelerator = Accelerator(
        cpu=model.device.type == "cpu", device_placement=False, mixed_precision="no", dataloader_config=sharing
    )
    processes = accelerator.num_processes
    if len(windows) < max(2, processes + 1):
        raise InputError(
            f"recovery holds a tenth of the calibration windows out and there are {len(windows)} for {processes} "
            "processes; add --samples, or use --recover-epochs 0"
        )
    train, held = windows.split(max(len(windows) // HELD_OUT, 1))
    size = min(-(-step_windows(windows) // processes), len(train) // processes) * processes
    problem = _Distillation(model, dense, layers, masks or {}, objective)
    mine = list(held.batches(max(size // processes, 1)))[accelerator.process_index :: processes]
    before = best = problem.kl(mine)
    if not math.isfinite(before):
        raise InputError(
            "KL(dense‖pruned) is not finite on the calibration text; try --dtype float32 or bfloat16, or "
            "--recover-epochs 0"
        )
    kept, best_epoch, epoch = problem.state(), 0, 0
    masters = [p.data.float().clone() for p in problem.parameters]
    optimizer = accelerator.prepare(torch.optim.Adam(masters, lr=RATE, betas=(0.9, 0.95), fused=True))
    generator = torch.Generator().manual_seed(seed)
    per_epoch = len(train) // size  # the few windows over change with every epoch
    step, steps = 0, epochs * per_epoch
    with tqdm(total=steps, desc="recover", unit="step", disable=quiet) as bar, only_trained(model, problem.parameters):
        while epoch < epochs and epoch - best_epoch < PATIENCE and before > 0:
            order = torch.randperm(len(train), generator=generator)[: per_epoch * size].tolist()
            shared = TensorDataset(torch.arange(len(train)))
            for (rows,) in accelerator.prepare(DataLoader(shared, size, sampler=order, generator=generator)):
                optimizer.param_groups[0]["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
                step += 1
                loss = problem.gradient(_chosen(train, rows), masters)
                optimizer.step()
                problem.assign([m.to(p.dtype, copy=True) for m, p in zip(masters, problem.parameters, strict=True)])
                bar.set_postfix_str(f"KL {loss:.4f}, held out {best:.4f}", refresh=False)
                bar.update(1)
            epoch += 1
            now = problem.kl(mine)
            if now < best:
                best, kept, best_epoch = now, problem.state(), epoch
            if not now < 2 * before:  # diverges
                break
    problem.assign(kept)
    accelerator.free_memory()
    if best_epoch == 0 and epoch:
        logger.warning("recovery: no epoch lowered the held-out KL %.4g; the model is left as it was", before)
    return Recovered(before, best, epoch, best_epoch, time.perf_counter() - begin)


def _chosen(windows: Windows, rows: Tensor) -> WindowBatch:
    """Some rows as one batch, without the columns that pad all of them."""
    ids, mask = windows.input_ids, windows.attention_mask
    return next(iter(Windows(ids[rows], None if mask is None else mask[rows]).batches(len(rows))))


class _Distillation:
    """The pruned model beside the dense one, and the parameters to train.

    Weights that are pruned have no gradient, so Adam leaves them at zero. Steps are taken on float32 copies; the
    forward pass uses them as the model's dtype rounds them, so what is measured is what is kept.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        dense: PreTrainedModel | Callable[[], AbstractContextManager[None]],
        layers: Sequence[Layer],
        masks: Mapping[str, Tensor],
        objective: Objective,
    ) -> None:
        self._model, self._dense, self._objective = model, dense, objective
        self.parameters: list[nn.Parameter] = []
        self._masks: list[Tensor | None] = []
        for layer in layers:
            for parameter in layer.parameters():
                mask = masks.get(layer.name) if parameter.ndim > 1 else None
                self.parameters.append(parameter)
                self._masks.append(None if mask is None else layer.stored(mask).to(parameter.device))

    def assign(self, values: Sequence[Tensor]) -> None:
        """Replace the trained parameters; the tensors that they had are not written to."""
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.data = value

    def state(self) -> list[Tensor]:
        """The trained parameters, which ``assign`` takes."""
        return [p.data for p in self.parameters]

    def kl(self, batches: Sequence[WindowBatch]) -> float:
        """Mean divergence over the batches of all processes, nats per unit."""
        with torch.no_grad():
            sums = [(float(total), units) for total, units in map(self._divergence, batches)]
        both = torch.tensor([(0.0, 0), *sums], dtype=torch.float64, device=self._model.device).sum(0)
        total, units = ranks.summed(both)[0].tolist()
        return float(total / units) if units else math.nan

    def gradient(self, batch: WindowBatch, masters: Sequence[Tensor]) -> float:
        """Leave the gradient of the mean KL, zero off the masks, with the float32 copies; returns that KL."""
        total, units = self._divergence(batch)
        # an expert that no token of the batch reaches has no gradient
        found = torch.autograd.grad(total, self.parameters, allow_unused=True, materialize_grads=True)
        kl, everywhere = ranks.summed(torch.stack([total.detach(), total.new_tensor(units)]))[0].unbind()
        for master, gradient, mask in zip(masters, ranks.summed(*found), self._masks, strict=True):
            gradient = gradient.float() / everywhere.clamp_min(1)
            master.grad = gradient if mask is None else gradient * mask
        return float(kl / everywhere.clamp_min(1))

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
