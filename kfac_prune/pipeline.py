"""The stages of a run in order: text, factors, plan, pruned model, figures, checkpoint."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from kfac_prune import ranks, resume
from kfac_prune.block_training import Reconstructed, Reconstruction
from kfac_prune.config import BASELINES, SEQUENCE_METHODS, Recipe, parse_pattern
from kfac_prune.curvature.estimate import estimate_factors, participants
from kfac_prune.curvature.factors import Factors
from kfac_prune.curvature.sequences import SequenceFisher, check_memory
from kfac_prune.errors import InputError
from kfac_prune.experts import ExpertLinear
from kfac_prune.export import save_model, save_side_files, verify_saved
from kfac_prune.inputs import resolve_device
from kfac_prune.job import Job, Outcome, begin, target_of
from kfac_prune.loading import head_of
from kfac_prune.models import Layer, find_blocks, prunable_layers
from kfac_prune.obs import NM
from kfac_prune.operators import Damping
from kfac_prune.permute import Permuted, permute_model
from kfac_prune.plan import experts_told, make_plan, prune
from kfac_prune.probe import Probe
from kfac_prune.quality import evaluate
from kfac_prune.recipe_file import from_anywhere
from kfac_prune.reconstruction import reconstruct_sparse, table
from kfac_prune.recovery import recover
from kfac_prune.refitting import Refitted, refit
from kfac_prune.report import (
    model_card,
    plan_record,
    recovery_record,
    result_record,
    shrunk_record,
    summary,
)
from kfac_prune.shots import Correction, correct, shots_of
from kfac_prune.store import clear_work, new_folder, work_folder
from kfac_prune.stream import block_of
from kfac_prune.structure.latency import speeds
from kfac_prune.structure.prune import Settings, Shrunk, find_groups, prune_structured
from kfac_prune.structure.repair import reconstruct_smaller

logger = logging.getLogger("kfac_prune")


def run(
    recipe: Recipe,
    *,
    processes: int | None = None,
    echo: Callable[[str], None] = logger.info,
    quiet: bool = True,
) -> dict[str, Any]:
    """Prune a model as the recipe says and write the result to ``recipe.out``.

    Several processes, as torchrun and accelerate launch start them, share the work; the first of them writes and
    speaks, and all return the same.

    Args:
        recipe: what to do.
        processes: refuse to run in any other number of them; None takes what there is.
        echo: receives the lines meant for a person (stages, plan, figures).
        quiet: show no progress bars.

    Returns:
        The content of kfac_prune.json.

    Raises:
        InputError: something about the input is wrong; nothing has been written.
    """
    ranks.join(recipe.device, processes)
    asked = recipe.device
    recipe = replace(recipe.resolved(), device=resolve_device(asked))
    if not ranks.leads():
        echo, quiet = _silent, True
    job = begin(recipe, echo, quiet)
    if not recipe.resume and ranks.leads():
        clear_work(recipe.out)  # which was to be overwritten, if there was any
    outcome = _shrink(job) if recipe.structured else _mask(job)
    record = ranks.told(_written(job, outcome, asked) if ranks.leads() else {})
    ranks.wait()  # for those that are still reading
    return record


def _silent(text: str) -> None:
    """What the processes say that do not lead."""


def _written(job: Job, outcome: Outcome, device: str) -> dict[str, Any]:
    """Write the result, whole or not at all; returns the content of kfac_prune.json.

    The recipe that is left asks for the device that was asked for, and replaces nothing.
    """
    recipe, echo = job.recipe, job.echo
    with new_folder(recipe.out, overwrite=recipe.overwrite) as folder:
        with job.stages("save"):
            save_model(outcome.model, job.tokenizer, folder)
            save_side_files(recipe.model, folder)
            verify_saved(outcome.model, folder, trust_remote_code=recipe.trust_remote_code)
        loading = {
            "head": head_of(job.model.config, recipe.model),
            "sentence_transformers": (folder / "modules.json").is_file(),
            "own_code": any(folder.glob("*.py")),
        }
        record = result_record(
            recipe,
            job.objective,
            job.calibration,
            job.skipped,
            outcome.dense,
            outcome.pruned,
            job.stages,
            own_part=loading | outcome.record,
        )
        again = replace(from_anywhere(recipe), device=device, resume=False, overwrite=False)
        (folder / "recipe.yaml").write_text(again.to_yaml(), encoding="utf-8")
        (folder / "kfac_prune.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(model_card(recipe, record), encoding="utf-8")
    clear_work(recipe.out)
    echo(summary(record))
    echo(f"saved to {recipe.out}")
    return record


def _planned(job: Job, estimate: Callable[[], Factors], pattern: NM | None, damping: Damping) -> resume.Planned:
    """Curvature, order of channels and plan, or what an interrupted run has left of them."""
    recipe, model, layers, stages = job.recipe, job.model, job.layers, job.stages
    method: Any = recipe.method  # the recipe has checked it, and the Fisher
    fisher: Any = recipe.fisher
    assert recipe.sparsity is not None
    assert recipe.allocation is not None
    journal = resume.journal_of(recipe, model, job.calibration)
    if recipe.resume and (finished := resume.read_planned(journal, model)) is not None:
        job.echo("- plan: as the interrupted run left it")
        if resume.needs_layers(recipe) and not finished.factors.layers:
            with stages("curvature"):
                finished = finished._replace(factors=estimate())
        return finished
    if method in SEQUENCE_METHODS:
        check_memory(method, layers, job.calibration, job.objective)
    factors = resume.read_factors(journal, model, _bytes(recipe)) if recipe.resume else None
    if factors is not None:
        job.echo("- curvature: as the interrupted run left it")
    else:
        with stages("curvature"):
            factors = estimate()
            resume.write_factors(journal, factors)
    layers = [layer for layer in layers if layer.name in factors.layers]  # experts without tokens are left
    if not layers:
        raise InputError("no token of the calibration text is routed to the chosen experts; add --samples, or others")
    permuted: list[Permuted] = []
    if recipe.permute:
        assert pattern is not None
        with stages("permute"):
            permuted = permute_model(
                model,
                layers,
                factors,
                pattern,
                job.calibration,
                objective=job.objective,
                method="layerwise" if method in BASELINES else "kfac" if method in SEQUENCE_METHODS else method,
                damping=damping,
                seed=recipe.seed,
                known=resume.read_order(journal),
            )
            resume.write_order(journal, permuted)
    sequences = None
    if method in SEQUENCE_METHODS:
        sequences = SequenceFisher(
            method, model, layers, factors, job.calibration,
            objective=job.objective, fisher=fisher, seed=recipe.seed, quiet=job.quiet,
        )  # fmt: skip
    with stages("plan"):
        plan = make_plan(
            layers,
            factors,
            sparsity=recipe.sparsity,
            pattern=pattern,
            method=method,
            allocation=recipe.allocation,
            damping=damping,
            probe=Probe.on(model, job.calibration, recipe.batch_size, job.objective),
            estimate=estimate,
            sequences=sequences,
            journal=journal,
            quiet=job.quiet,
        )
    planned = resume.Planned(plan, factors, permuted)
    resume.write_planned(journal, recipe, model, planned)
    return planned


def _bytes(recipe: Recipe) -> int | None:
    """That factors may take at a time."""
    return None if recipe.max_memory is None else int(recipe.max_memory * 2**30)


def _estimation(job: Job) -> dict[str, Any]:
    """How curvature is estimated, in arguments."""
    recipe = job.recipe
    return {
        "objective": job.objective,
        "fisher": recipe.fisher,
        "seed": recipe.seed,
        "batch_size": recipe.batch_size,
        "max_memory": _bytes(recipe),
        "quiet": job.quiet,
    }


def _factors(job: Job, layers: Sequence[Layer]) -> Factors:
    """Of some layers of the model."""
    return estimate_factors(job.model, layers, job.calibration, **_estimation(job))


def _mask(job: Job) -> Outcome:
    """Unstructured and n:m pruning: zeros, in place."""
    recipe, model, layers, stages = job.recipe, job.model, job.layers, job.stages
    options: Any = {"batch_size": recipe.batch_size, "quiet": job.quiet}
    measured: Any = {"objective": job.objective, **options}
    fisher: Any = recipe.fisher  # the recipe has checked it
    estimate = partial(_factors, job, layers)
    groups = parse_pattern(recipe.pattern)
    assert recipe.damping is not None
    pattern, damping = NM(*groups) if groups else None, Damping(recipe.damping)
    plan, factors, permuted = _planned(job, estimate, pattern, damping)
    chosen = {layer.name for layer in plan.layers}
    idle = [layer.name for layer in layers if layer.name not in chosen]
    layers = [layer for layer in layers if layer.name in chosen]
    job.echo(plan.table(job.objective.unit))
    if told := experts_told(plan, idle):
        job.echo(told)
    with stages("measure dense"):
        dense_quality = evaluate(model, job.held_out, label="dense", **measured)
    dense = prune(layers, plan)
    refitted: list[Refitted] = []
    if recipe.refit and plan.sparsity > 0:
        with stages("refit"):
            plan, refitted = refit(
                model, layers, plan, factors, job.calibration, dense.swapped_in,
                pattern=pattern, damping=damping, **options,
            )  # fmt: skip
    if recipe.reconstruct_unit == "block":  # what follows asks for the streams' alone
        factors = replace(factors, layers={})
    corrected: list[Correction] = []
    if plan.sparsity > 0 and (shots := shots_of(recipe, plan.predicted)) > 1:
        with stages("shots"):
            again: Any = {"pattern": pattern, "damping": damping, "fisher": fisher, "seed": recipe.seed, **measured}
            plan, corrected = correct(model, layers, plan, job.calibration, dense.swapped_in, shots - 1, **again)
    plan = plan.without_weights()
    reconstructed: list[Reconstructed] = []
    if recipe.reconstruct and plan.sparsity > 0:
        with stages("reconstruct"):
            shelf: Any = recipe.streams  # the recipe has checked it
            reconstructed = reconstruct_sparse(
                model,
                plan,
                factors,
                job.calibration,
                dense.swapped_in,
                _reconstruction(job),
                damping=damping,
                shelf=shelf,
                quiet=job.quiet,
            )
        job.echo(table(reconstructed))
    masks = {layer.name: layer.mask for layer in plan.layers}
    recovery = _recover(job, model, layers, dense.swapped_in, masks)
    with stages("measure pruned"):
        pruned_quality = evaluate(model, job.held_out, dense=dense.swapped_in, label="pruned", **measured)
    covered = sum(layer.mask.numel() for layer in plan.layers) / model.num_parameters()
    record = plan_record(plan, permuted, refitted, corrected, reconstructed, covered)
    return Outcome(model, dense_quality, pruned_quality, record | {"experts_without_tokens": idle} | recovery)


def _smaller(job: Job) -> tuple[Shrunk, list[dict[str, Any]]]:
    """The smaller model and figures of the plans that lost, or what an interrupted run has left of them."""
    recipe, model = job.recipe, job.model
    kinds: Any = recipe.kinds  # the recipe has checked them, and the other literal types below
    method: Any = recipe.method
    widths: Any = recipe.widths
    assert recipe.damping is not None
    assert recipe.refit is not None
    groups = find_groups(model, job.layers, kinds)  # refused before any long work
    journal = resume.journal_of(recipe, model, job.calibration)
    if recipe.resume and (finished := resume.read_shrunk(journal, model)) is not None:
        job.echo("- shrink: as the interrupted run left it")
        return finished
    target = target_of(job, groups)
    settings = Settings(
        method=method,
        shots=recipe.cuts,
        refit=recipe.refit,
        multiple=recipe.multiple,
        damping=Damping(recipe.damping),
        **_estimation(job),
    )
    with job.stages("shrink"):
        best, lost = prune_structured(
            model, job.layers, job.calibration, target, kinds=kinds, widths=widths, settings=settings, echo=job.echo
        )
        others = [{"widths": o.widths, "shots": o.shots, "kl_calibration": o.kl} for o in lost]
        resume.write_shrunk(journal, best, others)
    return best, others


def _shrink(job: Job) -> Outcome:
    """Structured pruning: a smaller model beside the dense one."""
    recipe, model, stages = job.recipe, job.model, job.stages
    shelf: Any = recipe.streams  # the recipe has checked it
    measured: Any = {"objective": job.objective, "batch_size": recipe.batch_size, "quiet": job.quiet}
    best, others = _smaller(job)
    job.echo(best.table())
    with stages("measure dense"):
        dense = evaluate(model, job.held_out, label="dense", **measured)
    reconstructed: list[Reconstructed] = []
    if recipe.reconstruct and best.kl > 0:
        with stages("reconstruct"):
            factors = _factors(job, _observed(job))
            reconstructed = reconstruct_smaller(
                model, best.model, job.layers, factors, job.calibration, _reconstruction(job),
                shelf=shelf, quiet=job.quiet,
            )  # fmt: skip
        job.echo(table(reconstructed))
    smaller = [Layer(layer.name, best.model.get_submodule(layer.name)) for layer in job.layers]
    recovery = _recover(job, best.model, smaller, model)
    with stages("measure pruned"):
        pruned = evaluate(best.model, job.held_out, dense=model, label="pruned", **measured)
    with stages("measure speed"):
        speed = speeds([model, best.model], recipe.seqlen)
    if recipe.target_latency is not None and speed[1].prefill_ms > recipe.target_latency:
        job.echo(
            f"prefill takes {speed[1].prefill_ms:.3g} ms (dense {speed[0].prefill_ms:.3g}), more than --target-latency "
            f"{recipe.target_latency:g}: timings on {recipe.device} vary, or blocks are not all of it; ask for less"
        )
    record = shrunk_record(recipe, model, job.layers, best, others, reconstructed, speed)
    return Outcome(best.model, dense, pruned, record | recovery)


def _observed(job: Job) -> list[Layer]:
    """Layers whose factors a smaller model's reconstruction needs, beside those of the streams after every block."""
    model = job.model
    layers = [layer for layer in prunable_layers(model) if not isinstance(layer.module, ExpertLinear)]
    if job.objective.unit == "sequence":
        layers = participants(model, layers, job.calibration, job.objective)
    if job.recipe.reconstruct_unit == "sublayer":
        width = model.config.get_text_config().hidden_size
        return [layer for layer in layers if layer.shape[0] == width]  # all that write into the stream, and others
    names, _ = find_blocks(model, layers)
    inside = [layer for layer in layers if block_of(layer, names) >= 0]
    return [min(inside, key=lambda layer: sum(layer.shape))]  # any of them says where the blocks are


def _reconstruction(job: Job) -> Reconstruction:
    recipe = job.recipe
    unit: Any = recipe.reconstruct_unit  # the recipe has checked it
    assert recipe.reconstruct is not None
    own_text = recipe.own_text or 0
    return Reconstruction(recipe.reconstruct, unit, recipe.seed, work_folder(recipe.out), job.objective, own_text)


def _recover(
    job: Job,
    model: PreTrainedModel,
    layers: Sequence[Layer],
    dense: PreTrainedModel | Callable[[], AbstractContextManager[None]],
    masks: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Distil the whole model where the recipe asks for it; its part of the record, with the figures before."""
    recipe, objective = job.recipe, job.objective
    if not recipe.recover_epochs:
        return {"recovery": None}
    with job.stages("measure before recovery"):
        before = evaluate(
            model, job.held_out, dense=dense, objective=objective, batch_size=recipe.batch_size, quiet=job.quiet
        )
    with job.stages("recover"):
        recovered = recover(
            model,
            layers,
            job.calibration,
            dense,
            epochs=recipe.recover_epochs,
            masks=masks,
            objective=objective,
            seed=recipe.seed,
            quiet=job.quiet,
        )
    return {"recovery": recovery_record(before, recovered)}
