"""What can be pruned in a model, told from its configuration without loading a weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from transformers import PreTrainedModel

from kfac_prune.errors import InputError, reason
from kfac_prune.experts import split_experts
from kfac_prune.loading import LOADERS, class_with_own_widths, head_of, load_config
from kfac_prune.models import Layer, prunable_layers
from kfac_prune.structure.groups import AttentionHeads, ExpertUnits, Group, find_heads, find_widths, saving
from kfac_prune.structure.shrink import accepted_heads


def describe(
    source: str, include: Sequence[str] = (), ignore: Sequence[str] = (), *, trust_remote_code: bool = False
) -> str:
    """A table of the layers that would be pruned, their share of the parameters, and what is left out and why.

    Args:
        source: local folder or hub id.
        include: patterns, as ``prunable_layers``.
        ignore: patterns, as ``prunable_layers``.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        InputError: a model of another kind, or a pattern that matches nothing.
    """
    model = empty_model(source, load_config(source, trust_remote_code=trust_remote_code), trust_remote_code)
    split_experts(model)
    layers = prunable_layers(model, include, ignore)
    width = max(len(layer.name) for layer in layers)
    lines = [f"{'layer':{width}}  {'out x in':>13}  {'weights':>12}  bias  {'2:4 fits':>8}"]
    for layer in layers:
        out_features, in_features = layer.shape
        lines.append(
            f"{layer.name:{width}}  {f'{out_features} x {in_features}':>13}  {out_features * in_features:>12,}  "
            f"{'yes' if layer.bias is not None else 'no':4}  {'yes' if in_features % 4 == 0 else 'no':>8}"
        )
    return "\n".join([*lines, coverage(model, layers), "", structure(model, layers)])


def empty_model(
    source: str, config: Any, trust_remote_code: bool = False, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The model of a configuration, without weights: parameters on the meta device.

    Args:
        source: what the configuration was loaded from, for messages.
        config: from ``load_config``.
        trust_remote_code: run code that comes with the checkpoint.
        dtype: of the parameters; None is torch's default.

    Raises:
        InputError: it gives no model.
    """
    try:
        own = class_with_own_widths(config)
        with init_empty_weights():
            if own is not None:
                model = own(config)
            else:
                options: Any = {"trust_remote_code": trust_remote_code, "dtype": dtype or torch.get_default_dtype()}
                model = LOADERS[head_of(config, source) or "causal"].from_config(config, **options)
        model.tie_weights()
    except Exception as error:  # settings that do not fit together raise what each model's code happens to raise
        raise InputError(f"{source}/config.json gives no model: {reason(error)}") from error
    return cast(PreTrainedModel, model)


def structure(model: PreTrainedModel, layers: Sequence[Layer]) -> str:
    """The groups that structured pruning can remove, their sizes, and what cannot be removed and why.

    Args:
        model: whole; may be without weights.
        layers: to be pruned.
    """
    lines = []
    try:
        heads = find_heads(model, layers)
        reason = "no attention with a layout in which heads can be told apart"
    except InputError as error:
        heads, reason = [], str(error)
    widths = find_widths(model, layers)
    groups: list[Group] = [*widths, *heads]
    width = max((len(group.name) for group in groups), default=5)
    lines.append(f"{'group':{width}}  {'units':>20}  {'weights each':>12}")
    for group in groups:
        everything = group.everything()
        if isinstance(group, AttentionHeads):
            size = f"{group.groups} x {group.per_group} heads"
            one = everything[1:] if group.groups > 1 else everything[:, 1:]
        else:
            many = f"{len(group.experts)} x " if isinstance(group, ExpertUnits) else ""
            size, one = f"{many}{group.units} hidden", everything[..., 1:]
        each = f"{saving(group, one):,}" if one.numel() else "the last"
        lines.append(f"{group.name:{width}}  {size:>20}  {each:>12}")
    if not widths:
        lines.append("FFN units cannot be removed: no FFN has a known layout with all of its layers to be pruned")
    if not heads:
        lines.append(f"heads cannot be removed: {reason}")
    else:
        held = accepted_heads(model, heads[0])
        fits = ", ".join(f"{g} x {q}" for g, q in sorted(held, reverse=True)) or "none"
        lines.append(f"KV groups x query heads that a plain configuration can hold: {fits}")
    return "\n".join(lines)


def coverage(model: PreTrainedModel, layers: Sequence[Layer]) -> str:
    """How much of the model the layers hold, and which other tensors there are.

    Args:
        model: whole.
        layers: to be pruned.
    """
    covered, total = sum(layer.weight.numel() for layer in layers), model.num_parameters()
    names = {f"{layer.name}.weight" for layer in layers}
    rest = [(name, p) for name, p in model.named_parameters() if name not in names]
    matrices = [f"{name} {list(p.shape)}" for name, p in rest if p.ndim > 1]
    shown = matrices if len(matrices) <= 6 else [*matrices[:5], f"{len(matrices) - 5} more"]
    text = (
        f"{len(layers)} layers hold {covered:,} of {total:,} parameters ({covered / total:.1%}). Left as they are: "
        f"{', '.join(shown) or 'no matrix'}, and {sum(p.ndim <= 1 for _, p in rest)} vectors (norms, biases)."
    )
    stacked = sum(p.numel() for _, p in rest if p.ndim > 2)
    if stacked:
        kinds = "convolutions, experts as they are stored"
        text += f" Tensors of three or more dimensions ({kinds}) among them hold {stacked / total:.1%}."
    return text
