"""What ``kfac-prune eval`` tells of a saved model: loss, sparsity, and how far it is from its dense form."""

from __future__ import annotations

from typing import Any

from kfac_prune.config import Recipe
from kfac_prune.curvature.estimate import participants
from kfac_prune.errors import InputError
from kfac_prune.experts import split_experts
from kfac_prune.inputs import check_runs, check_tokens, evaluation_windows, resolve_device, vocabulary_size
from kfac_prune.loading import load_config, load_model, load_tokenizer
from kfac_prune.models import prunable_layers
from kfac_prune.objective import CAUSAL, find_objective
from kfac_prune.quality import evaluate
from kfac_prune.report import DIVERGENCES, LIKENESS


def measure(recipe: Recipe, *, dense_source: str | None = None, quiet: bool = True) -> str:
    """What a model is worth on a text: its sparsity, and what its objective tells.

    A causal language model has a loss and a perplexity on the first windows; any model has, with a dense one beside it,
    the divergence of its outputs, and where it is of sequences also how alike they are.

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
    objectives = [
        find_objective(recipe.objective, source, load_config(source, trust_remote_code=recipe.trust_remote_code))
        for source in (recipe.model, dense_source)
        if source is not None
    ]
    objective = objectives[0]
    if objectives[-1] != objective:
        what = f"{recipe.model} computes {objective.name} and {dense_source} {objectives[-1].name}"
        raise InputError(f"{what}, or not in the same way; they cannot be compared")
    causal = objective == CAUSAL
    if dense_source is None and not causal:
        raise InputError(
            f"{recipe.model} has the objective {objective.name}, which has no loss or perplexity on plain text; add "
            "--dense, the model before pruning, to measure how far it is from that"
        )
    tokenizer = load_tokenizer(recipe.model, trust_remote_code=recipe.trust_remote_code)
    windows = evaluation_windows(recipe, tokenizer, objective)
    model = load_model(recipe.model, **options)
    dense = load_model(dense_source, **options) if dense_source is not None else None
    if dense is not None and vocabulary_size(dense) != vocabulary_size(model):
        raise InputError(
            f"{recipe.model} knows {vocabulary_size(model)} tokens and --dense {dense_source} "
            f"{vocabulary_size(dense)}: no KL between two vocabularies; name the model that it was pruned from"
        )
    for one in (model, dense):
        if one is not None:
            split_experts(one)
            check_tokens(one, windows)
            check_runs(one, windows, objective)
    measured: Any = {"objective": objective, "batch_size": recipe.batch_size, "quiet": quiet}
    quality = evaluate(model, windows, dense=dense, **measured)
    layers = prunable_layers(model)
    if objective.unit == "sequence":
        layers = participants(model, layers, windows, objective)
    zeros = sum(int((layer.weight == 0).sum()) for layer in layers)
    rows = []
    if quality.loss is not None:
        rows += [("loss (nats/token)", f"{quality.loss:.4f}"), ("perplexity", f"{quality.perplexity:.3f}")]
    rows += [
        ("sparsity of linear layers", f"{zeros / sum(layer.weight.numel() for layer in layers):.1%}"),
        (f"{objective.unit}s", f"{quality.tokens:,}"),
    ]
    if dense is not None:
        assert quality.kl is not None
        if quality.loss is not None:
            dense_loss = evaluate(dense, windows, **measured).loss
            assert dense_loss is not None
            rows.append(("loss increase (nats/token)", f"{quality.loss - dense_loss:.4f}"))
        name = DIVERGENCES.get(objective.name, "KL")
        rows.append((f"{name} (nats/{objective.unit})", f"{quality.kl:.4f}"))
        rows += [(label, f"{quality.likeness[key]:.4f}") for key, label in LIKENESS if key in quality.likeness]
    width = 28 if causal else 38
    return "\n".join(f"{name:{width}}{value:>10}" for name, value in rows)
