"""Reconstruction: the weights left in a block learn to bring the residual stream back to the dense model's.

The dense and the pruned streams pass through the blocks in order. Each block in turn (or each sub-layer: up to and
including a layer that writes into the stream) minimises ``½ E[δᵀ G δ]`` over its kept weights by Adam, δ being the
difference of the streams after it and G the covariance of the gradients there, so that the objective is a KL in nats
per token to second order (DESIGN §7). After the last block only norm and head follow, so it minimises the KL itself,
which is not quadratic where much is lost. One of them at a time has gradients and optimizer state. Reconstruction with
G = I is known (Wanda++, Yang et al. 2025); the Fisher metric is ours.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kfac_prune import ranks
from kfac_prune.block_training import BlockTraining, Reconstructed, Reconstruction, Teacher
from kfac_prune.curvature.factors import Factors
from kfac_prune.data import Windows, held_out
from kfac_prune.errors import InputError
from kfac_prune.offload import resident
from kfac_prune.operators import Damping
from kfac_prune.own_text import continued
from kfac_prune.plan import Plan
from kfac_prune.progress import progress
from kfac_prune.store import Journal, content_hash
from kfac_prune.stream import BlockStack, Shelf
from kfac_prune.sublayers import Unit, sublayers

logger = logging.getLogger("kfac_prune")

#: Tokens per step, in whole windows. Of 2048, 1024 and 512 the smallest was best for the same number of epochs.
STEP_TOKENS = 512
#: Batches per epoch, those held out included, where so little text is given that they would be fewer; a step then takes
#: fewer windows, one at least.
BATCHES = 64


def step_windows(windows: Windows) -> int:
    """Windows per step."""
    return max(min(STEP_TOKENS // windows.input_ids.shape[1], len(windows) // BATCHES), 1)


def own_steps(windows: Windows) -> tuple[Windows, int]:
    """What this process trains on: its windows, and how many of them it takes per step.

    Alone it takes all. Several processes take a step together, on ``step_windows`` windows or at least one each; what
    is left over when the steps are whole takes no part.

    Raises:
        InputError: the windows are too few for so many processes.
    """
    size, processes = step_windows(windows), ranks.count()
    if processes == 1:
        if len(windows) < 2:
            raise InputError(
                "reconstruction holds a tenth of the calibration windows out and there is one; add --samples, or use "
                "--reconstruct 0"
            )
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


def with_own_text(
    model: PreTrainedModel, windows: Windows, size: int, settings: Reconstruction, *, quiet: bool = True
) -> tuple[Windows, int]:
    """Windows as ``own_steps`` gives them, behind those that the model writes itself; how many batches the latter are.

    Windows that will be held out are not continued.

    Args:
        model: while it is dense.
        windows: that this process takes its steps on.
        size: windows per step.
        settings: which say how many to write.
        quiet: show no progress bar.
    """
    if not settings.own_text:
        return windows, 0
    steps = -(-len(windows) // size)
    steps -= held_out(steps)
    begun = windows.chosen(range(steps * size))
    text = continued(model, begun, settings.own_text, seed=settings.seed, quiet=quiet)
    mask = windows.attention_mask  # of windows that are held out
    if mask is not None:
        mask = torch.cat([torch.ones_like(text.input_ids, dtype=torch.bool), mask])
    return Windows(torch.cat([text.input_ids, windows.input_ids]), mask), settings.own_text * steps


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
    note = "(on windows that it was not trained on, units as above; the last block's is the loss itself)"
    lines = [f"{'reconstructed':{width}}    before     after  learning rate  seconds   {note}"]
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
        settings: epochs, unit, seed, folder, objective, text of the model's own.
        damping: of the metric; None is ``Damping()``.
        shelf: where streams wait.
        quiet: show no progress bar.
    """
    windows, size = own_steps(windows)
    with dense():
        windows, further = with_own_text(model, windows, size, settings, quiet=quiet)
        stack = BlockStack(model, windows, size, shelf)
    masks = {layer.name: layer.mask for layer in plan.layers}
    metric = metrics(factors, damping or Damping(), settings.unit)
    pruned = stack.entered_anew(masks)
    return reconstruct(
        stack, pruned, metric, settings, trained=masks, masks=masks, dense=dense, further=further, quiet=quiet
    )


def reconstruct(
    dense_stack: BlockStack,
    stack: BlockStack,
    metric: Mapping[str, Tensor],
    settings: Reconstruction,
    *,
    trained: Collection[str],
    masks: Mapping[str, Tensor] | None = None,
    dense: Callable[[], AbstractContextManager[None]] = nullcontext,
    further: int = 0,
    quiet: bool = True,
) -> list[Reconstructed]:
    """Reconstruct all blocks in order, in place.

    Under several processes (``torch.distributed``) every one brings its own windows, in equally many batches; gradients
    and held-out objectives are then means over the tokens of all of them.

    Args:
        dense_stack: blocks of the dense model.
        stack: blocks of the pruned model, in batches as steps are taken on (``step_windows``); the same object where
            ``dense`` makes one model the other and what enters the blocks is the same.
        metric: G [d, d], damped, after every block by its name (``metrics``). With unit "sublayer" a layer that writes
            into the stream ends a sub-layer where there is a metric under its name.
        settings: epochs, unit, seed, folder and objective.
        trained: names of the layers that may change.
        masks: [out, in] per layer, True = kept; layers without one keep every weight.
        dense: a context in which ``dense_stack`` is dense.
        further: batches at the beginning that are text of the model's own (``with_own_text``).
        quiet: show no progress bar.

    Raises:
        InputError: the model has no list of blocks or runs one several times, too few batches to hold one out, a stream
            that is not finite (names the block), or a file in the folder that is broken.
    """
    if not stack.blocks:
        raise InputError(f"{type(stack.model).__name__} has no list of blocks to reconstruct; use --reconstruct 0")
    stack.check_calls("reconstruction sees the first alone; use --reconstruct 0")
    batches = len(stack.entries)
    if batches - further < 2:
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
        key = _fingerprint(dense_stack, stack, metric, settings, trained, masks, dense)
        journal = Journal(settings.folder, "reconstruction", key)
        if others := journal.drop_others():
            logger.warning("reconstruct: %d blocks in %s are of other options or another model", others, journal.folder)
    dense_stream, stream = list(dense_stack.entries), list(stack.entries)
    records: list[Reconstructed] = []
    rate = None
    with progress(total=len(stack.names), desc="reconstruct", unit="block", disable=quiet) as bar:
        for index in range(len(stack.names)):
            with dense():
                parts, dense_stream = sublayers(dense_stack, stack, index, dense_stream, metric, settings.unit)
            for part in parts:
                part = replace(part, trained=[layer for layer in part.trained if layer.name in trained])
                if not part.trained:
                    continue
                ends = index + 1 == len(stack.names) and part.writers is None
                teacher = Teacher(dense_stack, dense, settings.objective) if ends else None
                with resident(stack.blocks[index], stack.device):
                    problem = BlockTraining(stack, index, part, stream, masks, teacher, further)
                    record = _journaled(problem, rate, settings, journal, f"{len(records):04} {part.name}")
                records.append(record)
                rate = rate or record.learning_rate or None
                bar.set_postfix_str(f"{record.name} {record.before:.2e} -> {record.after:.2e}", refresh=False)
            with torch.no_grad():
                stream = [stack.keep(stack.run(index, batch, x)) for batch, x in enumerate(stream)]
            bar.update(1)
    return records


def _journaled(
    problem: BlockTraining, rate: float | None, settings: Reconstruction, journal: Journal | None, entry: str
) -> Reconstructed:
    """Solve a problem, or take over what the journal has of it; the process that leads keeps one."""
    finished = None if journal is None else journal.read(entry)
    kept = ranks.told(None if finished is None else finished[1])
    if kept is not None:
        if finished is not None:
            problem.restore(finished[0])
        problem.weights.assign([ranks.sent(value) for value in problem.weights.values()])
        return Reconstructed(**kept)
    record = problem.solve(rate, settings)
    if journal is not None:
        journal.write(entry, problem.state(), asdict(record))
    return record


def _fingerprint(
    dense_stack: BlockStack,
    stack: BlockStack,
    metric: Mapping[str, Tensor],
    settings: Reconstruction,
    trained: Collection[str],
    masks: Mapping[str, Tensor],
    dense: Callable[[], AbstractContextManager[None]],
) -> str:
    """Of all that decides the result: weights before and after pruning, the streams that enter, and the arguments."""
    padding = {str(batch): mask for batch, mask in enumerate(stack.masks) if mask is not None}
    entries = {str(batch): stream for batch, stream in enumerate(stack.entries)}
    parts = [str(replace(settings, folder=None)), str(sorted(trained))]
    parts += map(content_hash, (entries, padding, metric, masks))
    with dense():
        parts.append(content_hash(dense_stack.model.state_dict()))
    parts.append(content_hash(stack.model.state_dict()))
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()
