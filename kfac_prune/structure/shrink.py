"""From a model and the units that stay to a smaller model of the same kind."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from kfac_prune.errors import InputError
from kfac_prune.experts import ExpertLinear, split_experts, stacked
from kfac_prune.pruned_model import with_own_widths
from kfac_prune.structure.groups import AttentionHeads, ExpertUnits, FfnUnits, Member

#: What configurations call the width of an FFN, by its kind; the first that a configuration has counts.
WIDTH_FIELDS = {
    "ffn": ("intermediate_size", "ffn_dim", "n_inner"),
    "experts": ("moe_intermediate_size", "intermediate_size"),
    "shared": ("shared_expert_intermediate_size",),
}
#: Classes under which transformers finds a model with widths of its own.
AUTO_CLASSES: dict[str, Mapping[str, str | Sequence[str]]] = {
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForImageClassification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
}


class CannotBeStored(InputError):
    """No checkpoint of the wanted kind can hold the smaller model."""


@dataclass(frozen=True)
class Cut:
    """What stays of one FFN, expert or attention, and the consumer's new weights.

    Attributes:
        group: of the model that is cut.
        kept: its selection.
        weight: of the consumer, [out, columns that stay].
        bias: of the consumer, [out], or None.
    """

    group: Member
    kept: Tensor
    weight: Tensor
    bias: Tensor | None


def shrink(model: PreTrainedModel, cuts: Sequence[Cut], *, plain: bool = False) -> PreTrainedModel:
    """A new, smaller model: producers' rows sliced, consumers' weights replaced, all other tensors but experts' shared.

    Where every FFN of a kind has one width and every attention the same heads, and an architecture can say so, the
    result is a plain model with a plain configuration. Otherwise it is one with widths of its own (``pruned_model``).

    Args:
        model: stays as it is; its experts are split, and so are the result's.
        cuts: of its groups; of the experts of one module all, to one width.
        plain: insist on a plain configuration.

    Raises:
        InputError: a cut leaves nothing of a group; names it.
        CannotBeStored: no (plain) configuration holds the result; names the numbers.
    """
    state = model.state_dict()
    shapes: dict[str, list[int]] = dict(getattr(model.config, "pruned_shapes", {}))
    heads: dict[str, list[int]] = dict(getattr(model.config, "pruned_head_counts", {}))
    for cut in cuts:
        if cut.kept.numel() == 0:
            raise InputError(f"{cut.group.name} would lose all of its units; at least one must stay")
        for layer, rows in cut.group.rows(cut.kept):
            rows = rows.to(layer.weight.device)
            _put(state, layer.name, layer.module, layer.weight[rows], None if layer.bias is None else layer.bias[rows])
            shapes[layer.name] = [len(rows), layer.shape[1]]
        consumer = cut.group.consumer
        _put(state, consumer.name, consumer.module, cut.weight, cut.bias)
        shapes[consumer.name] = list(cut.weight.shape)
        if isinstance(cut.group, AttentionHeads):
            heads[cut.group.name] = [cut.kept.numel(), len(cut.kept)]
    matrices = stacked(model, state)
    shapes = {name: shape for name, shape in shapes.items() if f"{name}.weight" in state}
    shapes |= {name: list(matrix.shape) for name, matrix in matrices.items()}
    widths: dict[str, set[int]] = {}
    for cut in cuts:
        if isinstance(cut.group, FfnUnits):
            widths.setdefault(ffn_kind(cut.group), set()).add(len(cut.kept))
    counts = {(len(cut.kept), cut.kept.shape[1]) for cut in cuts if isinstance(cut.group, AttentionHeads)}
    if len(counts) <= 1 and all(len(sizes) == 1 for sizes in widths.values()):
        head_dim = next((cut.group.head_dim for cut in cuts if isinstance(cut.group, AttentionHeads)), None)
        one = {kind: min(sizes) for kind, sizes in widths.items()}
        for empty in _plain_models(model, one, min(counts, default=None), head_dim):
            if _shapes(empty) == {name: tensor.shape for name, tensor in state.items()}:
                return filled(empty, state, model)
    if plain:
        raise CannotBeStored(_refusal(model, cuts, widths, counts))
    base = base_class(model)
    config = copy.deepcopy(model.config)
    config.pruned_shapes, config.pruned_head_counts = shapes, heads
    config.auto_map = {auto_class(base): f"pruned_model.Pruned{base.__name__}"}
    with torch.device("meta"):
        empty = with_own_widths(base)(config)
    return filled(empty, state, model)


def ffn_kind(group: FfnUnits | ExpertUnits) -> str:
    """Which width of a configuration is that of an FFN: a key of ``WIDTH_FIELDS``."""
    if isinstance(group, ExpertUnits) or isinstance(group.consumer.module, ExpertLinear):
        return "experts"
    return "shared" if "shared" in group.name.rpartition(".")[2] else "ffn"


def base_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The class of transformers that a model is of, or is a version with widths of its own of."""
    kind = type(model)
    if not hasattr(model.config, "pruned_shapes"):
        return kind
    return next(c for c in kind.__mro__ if c.__module__.startswith("transformers.models."))


def auto_class(base: type[PreTrainedModel]) -> str:
    """The Auto class of transformers that finds the versions of a class with widths of their own.

    Raises:
        CannotBeStored: there is none, or the class is not one of transformers, from which such versions are made.
    """
    if getattr(transformers, base.__name__, None) is not base:
        raise CannotBeStored(f"the code of {base.__name__} is not in transformers, and widths per layer need that")
    for name, classes in AUTO_CLASSES.items():
        if any(base.__name__ in ((c,) if isinstance(c, str) else c) for c in classes.values()):
            return name
    raise CannotBeStored(f"no Auto class of transformers loads {base.__name__}, so widths per layer cannot be saved")


def empty_of(kind: Any, values: dict[str, Any], model: PreTrainedModel) -> PreTrainedModel:
    """A model on the meta device.

    Args:
        kind: its class.
        values: of its configuration.
        model: whose ways to compute attention and experts it gets.
    """
    config = kind.config_class.from_dict(values)
    for choice in ("_attn_implementation", "_experts_implementation"):
        setattr(config, choice, getattr(model.config, choice, None))
    with torch.device("meta"):
        empty: PreTrainedModel = kind(config)
    return empty


def filled(empty: PreTrainedModel, state: Mapping[str, Tensor], model: PreTrainedModel) -> PreTrainedModel:
    """Give an empty model its tensors, and from another one the buffers that no checkpoint holds (rotary frequencies).

    Args:
        empty: on the meta device; its experts are split at the end.
        state: all of its tensors.
        model: of the same family.
    """
    empty.load_state_dict(state, assign=True)
    empty.tie_weights()
    for name, buffer in model.named_buffers():
        parent, _, child = name.rpartition(".")
        empty.get_submodule(parent)._buffers[child] = buffer
    rest = [name for name, tensor in (*empty.named_parameters(), *empty.named_buffers()) if tensor.is_meta]
    assert not rest, f"{rest[0]} was left empty"
    if model.can_generate():
        empty.generation_config = copy.deepcopy(model.generation_config)
    empty.eval()
    split_experts(empty)
    return empty


def accepted_heads(model: PreTrainedModel, attention: AttentionHeads) -> set[tuple[int, int]]:
    """The (KV groups, query heads per group), up to the present ones, that a plain configuration can hold."""
    accepted = set()
    for groups in range(1, attention.groups + 1):
        for per_group in range(1, attention.per_group + 1):
            kept = attention.everything()[:groups, :per_group]
            wanted = {layer.name: len(rows) for layer, rows in attention.rows(kept)}
            for empty in _plain_models(model, {}, (groups, per_group), attention.head_dim):
                if all(_rows(empty.get_submodule(name)) == rows for name, rows in wanted.items()):
                    accepted.add((groups, per_group))
    return accepted


def _plain_models(
    model: PreTrainedModel, widths: Mapping[str, int], counts: tuple[int, int] | None, head_dim: int | None
) -> Iterator[PreTrainedModel]:
    """Empty models (on the meta device) of plain configurations with these sizes, as far as any accepts them.

    That of a model whose code comes with its checkpoint says where the code is.
    """
    base = base_class(model)
    known = getattr(transformers, base.__name__, None) is base
    drop = ("pruned_shapes", "pruned_head_counts", *(("auto_map",) if known else ()))
    fields: dict[str, Any] = {k: v for k, v in model.config.to_dict().items() if k not in drop}
    for kind, width in widths.items():
        named = [name for name in WIDTH_FIELDS[kind] if hasattr(model.config, name)]
        fields |= dict.fromkeys(named[:1], width)
    if counts is not None:
        groups, per_group = counts
        fields |= {"num_attention_heads": groups * per_group, "num_key_value_heads": groups}
        fields["head_dim"] = head_dim
    kinds: list[tuple[Any, dict[str, Any]]] = [(base, fields)]
    if known and fields["model_type"] == "llama" and not fields.get("attention_bias") and not fields.get("mlp_bias"):
        # Llama's configuration refuses head counts that do not divide hidden_size; Mistral's is the same network
        mistral = getattr(transformers, base.__name__.replace("Llama", "Mistral"), None)
        if mistral is not None:
            renamed = {"model_type": "mistral", "sliding_window": None, "architectures": [mistral.__name__]}
            kinds.append((mistral, fields | renamed))
    for kind, values in kinds:
        try:
            empty = empty_of(kind, values, model)
        except Exception:  # each configuration refuses in its own way; there is no plain model of it then
            continue
        yield empty


def _put(state: dict[str, Tensor], name: str, module: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Set a layer's weight [out, in] and bias in a state dict, in the dtype and layout of its module."""
    dtype = state[f"{name}.weight"].dtype
    state[f"{name}.weight"] = (weight.T if isinstance(module, Conv1D) else weight).to(dtype, copy=True).contiguous()
    if bias is not None:
        state[f"{name}.bias"] = bias.to(dtype, copy=True)


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _rows(module: nn.Module) -> int:
    """Output width of a linear layer."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[1 if isinstance(module, Conv1D) else 0]


def _refusal(
    model: PreTrainedModel, cuts: Sequence[Cut], widths: Mapping[str, set[int]], counts: set[tuple[int, int]]
) -> str:
    kind = model.config.model_type
    most = max([len(counts), *(len(sizes) for sizes in widths.values())])
    if most > 1:
        return f"a plain {kind} configuration holds one width for all blocks, and these have {most}"
    attention = next((cut.group for cut in cuts if isinstance(cut.group, AttentionHeads)), None)
    if attention is None or not counts:
        called = {"ffn": "FFNs", "experts": "experts", "shared": "shared experts"}
        sizes = " and ".join(f"{called[k]} of width {min(s)}" for k, s in widths.items()) or "these sizes"
        return f"a plain {kind} configuration cannot hold {sizes} with the rest as it is; use --widths per-layer"
    fits = ", ".join(f"{g * q} in {g} KV groups" for g, q in sorted(accepted_heads(model, attention)))
    groups, per_group = min(counts)
    return (
        f"a {kind} configuration cannot hold {groups * per_group} heads in {groups} KV groups; it can hold "
        f"{fits or 'no other than its own'}"
    )
