"""The stages of a run in order: text, factors, plan, pruned model, figures, checkpoint."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kfac_prune.config import Recipe, parse_pattern
from kfac_prune.curvature.estimate import estimate_factors
from kfac_prune.data import Windows, consecutive_windows, read_documents, sample_windows, token_stream
from kfac_prune.errors import InputError
from kfac_prune.export import save_model, verify_saved
from kfac_prune.inspect_model import coverage
from kfac_prune.models import Layer, context_length, load_config, load_model, load_tokenizer, prunable_layers
from kfac_prune.obs import NM
from kfac_prune.operators import Damping
from kfac_prune.permute import Permuted, permute_model
from kfac_prune.plan import Probe, make_plan, prune
from kfac_prune.quality import Quality, evaluate
from kfac_prune.reconstruction import BATCH, Reconstructed, Reconstruction, metrics, reconstruct
from kfac_prune.refitting import Refitted, refit
from kfac_prune.report import Stages, model_card, plan_record, result_record, shrunk_record, summary
from kfac_prune.store import check_output, new_folder
from kfac_prune.stream import BlockStack
from kfac_prune.structure.latency import latency_target, speeds
from kfac_prune.structure.prune import Settings, find_groups, parameters_target, prune_structured, weights_target
from kfac_prune.structure.repair import reconstruct_smaller

logger = logging.getLogger("kfac_prune")

#: Share of --data that is kept from calibration and measured on when no --eval-data is given.
HELD_OUT = 0.1


@dataclass(frozen=True)
class Job:
    """What every kind of run begins with."""

    recipe: Recipe
    stages: Stages
    echo: Callable[[str], None]
    quiet: bool
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layers: list[Layer]
    calibration: Windows
    held_out: Windows


@dataclass(frozen=True)
class Outcome:
    """What every kind of run ends with: a model, its quality and the dense one's, and its own part of the record."""

    model: PreTrainedModel
    dense: Quality
    pruned: Quality
    record: dict[str, Any]


def run(recipe: Recipe, *, echo: Callable[[str], None] = logger.info, quiet: bool = True) -> dict[str, Any]:
    """Prune a model as the recipe says and write the result to ``recipe.out``.

    Args:
        recipe: what to do.
        echo: receives the lines meant for a person (stages, plan, figures).
        quiet: show no progress bars.

    Returns:
        The content of kfac_prune.json.

    Raises:
        InputError: something about the input is wrong; nothing has been written.
    """
    recipe = replace(recipe.resolved(), device=resolve_device(recipe.device))
    job = _load(recipe, echo, quiet)
    outcome = _shrink(job) if recipe.structured else _mask(job)
    with new_folder(recipe.out, overwrite=recipe.overwrite) as folder:
        with job.stages("save"):
            save_model(outcome.model, job.tokenizer, folder)
            verify_saved(outcome.model, folder, trust_remote_code=recipe.trust_remote_code)
        record = result_record(
            recipe, job.calibration, outcome.dense, outcome.pruned, job.stages, own_part=outcome.record
        )
        (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        (folder / "kfac_prune.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(model_card(recipe, record), encoding="utf-8")
    echo(summary(record))
    echo(f"saved to {recipe.out}")
    return record


def _load(recipe: Recipe, echo: Callable[[str], None], quiet: bool) -> Job:
    """Model and text, with every check that needs no long work."""
    check_output(recipe.out, overwrite=recipe.overwrite)
    load_config(recipe.model, trust_remote_code=recipe.trust_remote_code)
    stages = Stages(echo)
    with stages("load"):
        tokenizer = load_tokenizer(recipe.model, trust_remote_code=recipe.trust_remote_code)
        calibration, held_out = load_data(recipe, tokenizer)
        model = load_model(
            recipe.model,
            dtype=None if recipe.dtype == "auto" else recipe.dtype,
            device=recipe.device,
            trust_remote_code=recipe.trust_remote_code,
        )
        check_tokens(model, calibration, held_out)
        layers = prunable_layers(model, recipe.include, recipe.ignore)
        check_output(recipe.out, overwrite=recipe.overwrite, need_bytes=int(1.1 * model.get_memory_footprint()))
    echo(coverage(model, layers))
    return Job(recipe, stages, echo, quiet, model, tokenizer, layers, calibration, held_out)


def _mask(job: Job) -> Outcome:
    """Unstructured and n:m pruning: zeros, in place."""
    recipe, model, layers, stages = job.recipe, job.model, job.layers, job.stages
    options: Any = {"batch_size": recipe.batch_size, "quiet": job.quiet}
    with stages("curvature"):
        fisher: Any = recipe.fisher  # the recipe has checked it
        factors = estimate_factors(model, layers, job.calibration, fisher=fisher, seed=recipe.seed, **options)
    groups = parse_pattern(recipe.pattern)
    assert recipe.sparsity is not None
    assert recipe.allocation is not None
    assert recipe.damping is not None
    method: Any = recipe.method  # the recipe has checked it
    pattern, damping = NM(*groups) if groups else None, Damping(recipe.damping)
    permuted: list[Permuted] = []
    if recipe.permute:
        assert pattern is not None
        with stages("permute"):
            permuted = permute_model(
                model, layers, factors, pattern, job.calibration, method=method, damping=damping, seed=recipe.seed
            )
    with stages("plan"):
        plan = make_plan(
            layers,
            factors,
            sparsity=recipe.sparsity,
            pattern=pattern,
            method=method,
            allocation=recipe.allocation,
            damping=damping,
            probe=Probe.on(model, job.calibration, recipe.batch_size),
            quiet=job.quiet,
        )
        job.echo(plan.table())
    with stages("measure dense"):
        dense_quality = evaluate(model, job.held_out, label="dense", **options)
    dense = prune(layers, plan)
    refitted: list[Refitted] = []
    if recipe.refit and plan.sparsity > 0:
        with stages("refit"):
            plan, refitted = refit(
                model,
                layers,
                plan,
                factors,
                job.calibration,
                dense.swapped_in,
                pattern=pattern,
                damping=damping,
                **options,
            )
    reconstructed: list[Reconstructed] = []
    if recipe.reconstruct and plan.sparsity > 0:
        with stages("reconstruct"):
            with dense.swapped_in():
                stack = BlockStack(model, layers, job.calibration, BATCH)
            linear = {layer.name: layer for layer in prunable_layers(model)}
            masks = {layer.name: layer.mask for layer in plan.layers}
            reconstructed = reconstruct(
                stack,
                linear,
                stack,
                linear,
                metrics(factors),
                _reconstruction(recipe),
                trained=masks,
                masks=masks,
                dense=dense.swapped_in,
                quiet=job.quiet,
            )
    with stages("measure pruned"):
        pruned_quality = evaluate(model, job.held_out, dense=dense.swapped_in, label="pruned", **options)
    covered = sum(layer.mask.numel() for layer in plan.layers) / model.num_parameters()
    return Outcome(model, dense_quality, pruned_quality, plan_record(plan, permuted, refitted, reconstructed, covered))


def _shrink(job: Job) -> Outcome:
    """Structured pruning: a smaller model beside the dense one."""
    recipe, model, stages = job.recipe, job.model, job.stages
    kinds: Any = recipe.kinds  # the recipe has checked them, and the other literal types below
    method: Any = recipe.method
    fisher: Any = recipe.fisher
    widths: Any = recipe.widths
    assert recipe.damping is not None
    assert recipe.refit is not None
    groups = find_groups(model, job.layers, kinds)  # refused before any long work
    if recipe.target_params is not None:
        target = parameters_target(model, job.layers, recipe.target_params)
    elif recipe.target_latency is not None:
        with stages("time blocks"):
            target = latency_target(model, groups, recipe.seqlen, recipe.target_latency)
    else:
        assert recipe.sparsity is not None
        target = weights_target(model, job.layers, recipe.sparsity)
    with stages("measure dense"):
        dense = evaluate(model, job.held_out, batch_size=recipe.batch_size, quiet=job.quiet, label="dense")
    with stages("shrink"):
        best, others = prune_structured(
            model,
            job.layers,
            job.calibration,
            target,
            kinds=kinds,
            widths=widths,
            settings=Settings(
                method=method,
                shots=recipe.shots,
                refit=recipe.refit,
                multiple=recipe.multiple,
                damping=Damping(recipe.damping),
                fisher=fisher,
                seed=recipe.seed,
                batch_size=recipe.batch_size,
                quiet=job.quiet,
            ),
            echo=job.echo,
        )
        job.echo(best.table())
    reconstructed: list[Reconstructed] = []
    if recipe.reconstruct and best.kl > 0:
        with stages("reconstruct"):
            consumers = [group.consumer for group in groups]
            factors = estimate_factors(
                model,
                consumers,
                job.calibration,
                fisher=fisher,
                seed=recipe.seed,
                batch_size=recipe.batch_size,
                quiet=job.quiet,
            )
            reconstructed = reconstruct_smaller(
                model, best.model, job.layers, factors, job.calibration, _reconstruction(recipe), quiet=job.quiet
            )
    with stages("measure pruned"):
        pruned = evaluate(
            best.model, job.held_out, dense=model, batch_size=recipe.batch_size, quiet=job.quiet, label="pruned"
        )
    with stages("measure speed"):
        speed = speeds([model, best.model], recipe.seqlen)
    if recipe.target_latency is not None and speed[1].prefill_ms > recipe.target_latency:
        job.echo(
            f"prefill takes {speed[1].prefill_ms:.3g} ms (dense {speed[0].prefill_ms:.3g}), more than --target-latency "
            f"{recipe.target_latency:g}: timings on {recipe.device} vary, or blocks are not all of it; ask for less"
        )
    return Outcome(
        best.model, dense, pruned, shrunk_record(recipe, model, job.layers, best, others, reconstructed, speed)
    )


def _reconstruction(recipe: Recipe) -> Reconstruction:
    unit: Any = recipe.reconstruct_unit  # the recipe has checked it
    assert recipe.reconstruct is not None
    return Reconstruction(recipe.reconstruct, unit, recipe.seed)


def resolve_device(name: str) -> str:
    """Turn "auto" into a device that exists, and check any other.

    Raises:
        InputError: torch does not know the device or cannot use it.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except Exception as error:  # torch raises RuntimeError, AssertionError or AcceleratorError by kind of device
        raise InputError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return name


def load_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[Windows, Windows]:
    """Calibration windows at random starts, and held-out windows that share no text with them.

    Raises:
        InputError: a text is missing, empty or too short.
    """
    options: Any = {"separator": recipe.separator, "field": recipe.text_field}
    stream = token_stream(tokenizer, read_documents(recipe.data, **options))
    if recipe.eval_data is not None:
        documents = read_documents(recipe.eval_data, **options, split="test")
        held, name = token_stream(tokenizer, documents), recipe.eval_data
    else:
        cut = len(stream) - int(HELD_OUT * len(stream))
        stream, held, name = stream[:cut], stream[cut:], f"the last tenth of {recipe.data}"
    if len(held) < recipe.seqlen:
        raise InputError(
            f"{name} gives {len(held)} tokens to measure on; a window needs {recipe.seqlen}: "
            "add text, name --eval-data, or lower --seqlen"
        )
    count = min(recipe.eval_samples, len(held) // recipe.seqlen)
    return (
        sample_windows(stream, recipe.samples, recipe.seqlen, recipe.seed, name=recipe.data),
        consecutive_windows(held, count, recipe.seqlen, name=name),
    )


def check_tokens(model: PreTrainedModel, *windows: Windows) -> None:
    """The model can read these windows: not longer than its context, no token outside its vocabulary.

    Raises:
        InputError: it cannot.
    """
    limit = context_length(model)
    vocabulary = vocabulary_size(model)
    for one in windows:
        length, largest = one.input_ids.shape[1], int(one.input_ids.max())
        if limit is not None and length > limit:
            raise InputError(f"--seqlen is {length}, and the model's context is {limit} tokens; lower --seqlen")
        if largest >= vocabulary:
            raise InputError(
                f"the tokenizer gives token {largest}, and the model knows {vocabulary}; they do not belong together"
            )


def vocabulary_size(model: PreTrainedModel) -> int:
    """Rows of the input embeddings."""
    embeddings = model.get_input_embeddings().weight
    assert isinstance(embeddings, torch.Tensor)
    return embeddings.shape[0]


def measure(recipe: Recipe, *, dense_source: str | None = None, quiet: bool = True) -> str:
    """Loss, perplexity, sparsity and, with a dense model, KL of a model on the first windows of a text.

    Args:
        recipe: of which model, data, their options, eval_samples, seqlen, batch_size, device and dtype are used.
        dense_source: the model before pruning, or None.
        quiet: show no progress bar.

    Returns:
        A small table.
    """
    device = resolve_device(recipe.device)
    dtype = None if recipe.dtype == "auto" else recipe.dtype
    options: Any = {"dtype": dtype, "device": device, "trust_remote_code": recipe.trust_remote_code}
    for source in (recipe.model, dense_source):
        if source is not None:
            load_config(source, trust_remote_code=recipe.trust_remote_code)
    tokenizer = load_tokenizer(recipe.model, trust_remote_code=recipe.trust_remote_code)
    documents = read_documents(recipe.data, separator=recipe.separator, field=recipe.text_field, split="test")
    stream = token_stream(tokenizer, documents)
    if len(stream) < recipe.seqlen:
        raise InputError(
            f"{recipe.data} gives {len(stream)} tokens; a window needs {recipe.seqlen}: add text, or lower --seqlen"
        )
    count = min(recipe.eval_samples, len(stream) // recipe.seqlen)
    windows = consecutive_windows(stream, count, recipe.seqlen, name=recipe.data)
    model = load_model(recipe.model, **options)
    dense = load_model(dense_source, **options) if dense_source is not None else None
    for one in (model, dense):
        if one is not None:
            check_tokens(one, windows)
    if dense is not None and vocabulary_size(dense) != vocabulary_size(model):
        raise InputError(
            f"{recipe.model} knows {vocabulary_size(model)} tokens and {dense_source} {vocabulary_size(dense)}: "
            "not the same vocabulary, so there is no KL between them"
        )
    quality = evaluate(model, windows, dense=dense, batch_size=recipe.batch_size, quiet=quiet)
    layers = prunable_layers(model)
    zeros = sum(int((layer.weight == 0).sum()) for layer in layers)
    rows = [
        ("loss (nats/token)", f"{quality.loss:.4f}"),
        ("perplexity", f"{quality.perplexity:.3f}"),
        ("sparsity of linear layers", f"{zeros / sum(layer.weight.numel() for layer in layers):.1%}"),
        ("tokens", f"{quality.tokens:,}"),
    ]
    if dense is not None:
        assert quality.kl is not None
        dense_loss = evaluate(dense, windows, batch_size=recipe.batch_size, quiet=quiet).loss
        rows.append(("loss increase (nats/token)", f"{quality.loss - dense_loss:.4f}"))
        rows.append(("KL (nats/token)", f"{quality.kl:.4f}"))
    return "\n".join(f"{name:28}{value:>10}" for name, value in rows)
