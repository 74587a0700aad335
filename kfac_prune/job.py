"""What every run of ``prune`` begins and ends with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kfac_prune import ranks
from kfac_prune.config import Recipe
from kfac_prune.curvature.estimate import fit_together
from kfac_prune.curvature.factors import CURVATURE_BYTES
from kfac_prune.data import Windows
from kfac_prune.errors import InputError
from kfac_prune.experts import ExpertLinear
from kfac_prune.export import check_saves
from kfac_prune.inputs import finite_windows, first_window, has_writers, load_inputs
from kfac_prune.inspect_model import coverage
from kfac_prune.loading import load_config
from kfac_prune.models import Layer
from kfac_prune.objective import Objective, find_objective
from kfac_prune.own_text import check_writes, own_text_of
from kfac_prune.quality import Quality
from kfac_prune.reconstruction import own_steps
from kfac_prune.report import Stages
from kfac_prune.store import FOREIGN, check_apart, check_output, earlier_result, work_folder, work_left
from kfac_prune.structure.groups import Group
from kfac_prune.structure.latency import latency_target
from kfac_prune.structure.prune import Target, parameters_target, weights_target


@dataclass(frozen=True)
class Job:
    """What every kind of run begins with."""

    recipe: Recipe
    stages: Stages
    echo: Callable[[str], None]
    quiet: bool
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    objective: Objective
    layers: list[Layer]
    calibration: Windows
    held_out: Windows
    skipped: int  # calibration windows left out


@dataclass(frozen=True)
class Outcome:
    """What every kind of run ends with: a model, its quality and the dense one's, and its own part of the record."""

    model: PreTrainedModel
    dense: Quality
    pruned: Quality
    record: dict[str, Any]


def begin(recipe: Recipe, echo: Callable[[str], None], quiet: bool) -> Job:
    """Load model and text, with every check that needs no long work.

    Args:
        recipe: resolved, with a device that exists.
        echo: receives the lines meant for a person.
        quiet: show no progress bars.

    Raises:
        InputError: something about the input is wrong.
    """
    check_output(recipe.out, overwrite=recipe.overwrite)
    left, folder = len(work_left(recipe.out)), work_folder(recipe.out)
    if left and not recipe.resume and not recipe.overwrite:
        raise InputError(
            f"{folder} holds {left} finished parts of an interrupted run; add --resume to go on with it, or "
            "--overwrite to begin anew"
        )
    if recipe.resume:
        echo(f"going on from {left} finished parts in {folder}" if left else f"nothing to resume in {folder}")
    check_apart(recipe.out, {"model": recipe.model, "data": recipe.data, "eval_data": recipe.eval_data})
    if recipe.overwrite and not earlier_result(recipe.out, ("kfac_prune.json", "*")):
        check_output(recipe.out, overwrite=False, occupied=FOREIGN)
    config = load_config(recipe.model, trust_remote_code=recipe.trust_remote_code)
    objective = find_objective(recipe.objective, recipe.model, config)
    if recipe.fisher != "sampled" and objective.unit == "sequence":
        raise InputError(f"the text holds no labels for the objective {objective.name}; fisher can only be sampled")
    stages = Stages(echo)
    with stages("load"):
        loaded = load_inputs(recipe, objective, echo)
        model, layers, calibration = loaded.model, loaded.layers, loaded.calibration
        room = 3.2 if recipe.structured else 4  # with what is left for --resume: plan, dense weights, trained blocks
        curvature = 4 * sum(m**2 + n**2 for m, n in (layer.shape for layer in layers))
        left = 0 if recipe.structured else min(curvature, CURVATURE_BYTES)
        needed = int(room * model.get_memory_footprint()) + left
        check_output(recipe.out, overwrite=recipe.overwrite, need_bytes=needed)
        check_saves(model, loaded.tokenizer)
    echo(coverage(model, layers))
    for remark in _remarks(recipe, layers, calibration):
        echo(remark)
    if model.device.type == "cpu" and model.dtype.itemsize < 4:
        name = str(model.dtype).removeprefix("torch.")
        echo(f"computes in {name}, which many CPUs multiply much slower than float32: --dtype float32 may save hours")
    if recipe.skip_bad_batches:
        with stages("look for bad batches"):
            calibration = finite_windows(model, layers, calibration, objective, recipe.batch_size)
    skipped = len(loaded.calibration) - len(calibration)
    if skipped:
        echo(
            f"left out {skipped} of {len(loaded.calibration)} calibration windows, on which activations are not finite"
        )
    if len(calibration) < ranks.count():
        raise InputError(
            f"{ranks.count()} processes share {len(calibration)} calibration windows; add --samples, or start fewer"
        )
    elsewhere = recipe.structured or recipe.offload or recipe.max_memory is not None  # with rules of their own
    if recipe.shots != 1 and not elsewhere and not fit_together(layers, model.device):
        what = "the curvature of all layers at a time takes more than half of the memory that is free on the GPU"
        if recipe.shots is not None:
            raise InputError(f"shots is {recipe.shots}, and {what}; use shots 1")
        if not recipe.reconstruct:
            echo(f"one shot: {what}")
        recipe = replace(recipe, shots=1)
    recipe = replace(recipe, own_text=own_text_of(recipe, objective, writes=model.can_generate()))
    if recipe.reconstruct or recipe.refit:
        recipe = _repairs(recipe, model, calibration, echo)
    return Job(
        recipe,
        stages,
        echo,
        quiet,
        model,
        loaded.tokenizer,
        objective,
        layers,
        calibration,
        loaded.held_out,
        skipped,
    )


def _repairs(recipe: Recipe, model: PreTrainedModel, calibration: Windows, echo: Callable[[str], None]) -> Recipe:
    """The recipe without the refit and reconstruction that the model does not allow, which is said."""
    kind, stack = type(model).__name__, first_window(model, calibration)
    if not stack.blocks:
        echo(f"no refit and no reconstruction: {kind} has no list of blocks")
        return replace(recipe, reconstruct=0, refit=False)
    if not stack.calls_once():
        echo(f"no refit and no reconstruction: {kind} runs a block several times, and they would see the first alone")
        return replace(recipe, reconstruct=0, refit=False)
    if recipe.reconstruct:  # refused now rather than once the plan is made
        own_steps(calibration)
        if recipe.own_text:
            check_writes(model, calibration)
    if recipe.refit and not has_writers(stack):
        echo(
            f"no refit: no layers of {kind} give together what its first block adds to the residual stream (it may be "
            "normalised first, or come from experts)"
        )
        recipe = replace(recipe, refit=False)
    return recipe


def _remarks(recipe: Recipe, layers: Sequence[Layer], calibration: Windows) -> Iterator[str]:
    """What makes figures look better than they are."""
    data, eval_data = Path(recipe.data), Path(recipe.eval_data or "")
    if recipe.eval_data and data.exists() and data.resolve() == eval_data.resolve():
        yield "data and eval_data are one text: the model is measured on what it is calibrated on"
    plain = [layer for layer in layers if not isinstance(layer.module, ExpertLinear)]
    widest = max(plain, key=lambda layer: layer.shape[1], default=None)
    if widest is not None and calibration.tokens < widest.shape[1]:
        yield (
            f"the calibration has {calibration.tokens:,} tokens, fewer than {widest.name} has inputs "
            f"({widest.shape[1]:,}): other text will lose more than predicted; add --samples"
        )


def target_of(job: Job, groups: Sequence[Group]) -> Target:
    """What a smaller model must save."""
    recipe, model = job.recipe, job.model
    if recipe.target_params is not None:
        return parameters_target(model, job.layers, recipe.target_params)
    if recipe.target_latency is not None:
        with job.stages("time blocks"):
            return latency_target(model, groups, recipe.seqlen, recipe.target_latency)
    assert recipe.sparsity is not None
    return weights_target(model, job.layers, recipe.sparsity)
