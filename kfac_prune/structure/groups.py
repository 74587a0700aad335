"""What falls together when a transformer is made smaller: FFN hidden units, those of experts, and attention heads.

Removing a unit means removing a column of its *consumer* (the layer that reads it: down projection, attention output)
and the rows of its *producers*. Which layers these are is told by the table of layouts below, not by families: most
families share a layout, and shapes decide whether it fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kfac_prune.errors import InputError
from kfac_prune.experts import ExpertLinear
from kfac_prune.models import Layer, prunable_layers

#: Producers (below one module) and consumer of FFN units; a single producer may stack gate and up.
FFN_LAYOUTS = (
    (("gate_proj", "up_proj"), "down_proj"),  # Llama, Mistral, Qwen, Gemma, Olmo, Granite
    (("gate_up_proj",), "down_proj"),  # Phi-3; an expert
    (("fc1",), "fc2"),  # OPT, ViT
    (("c_fc",), "c_proj"),  # GPT-2
    (("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX
    (("intermediate.dense",), "output.dense"),  # BERT
)
#: The same for attention; a single producer stacks queries, keys and values in this order.
HEAD_LAYOUTS = (
    (("q_proj", "k_proj", "v_proj"), "o_proj"),  # Llama, Mistral, Qwen, Gemma, Granite, ViT
    (("q_proj", "k_proj", "v_proj"), "out_proj"),  # OPT
    (("qkv_proj",), "o_proj"),  # Phi-3
)


@dataclass(frozen=True)
class FfnUnits:
    """The hidden units of one FFN. A selection of them is a sorted int64 tensor [kept].

    Attributes:
        name: of the module that holds the layers.
        producers: layers whose rows make the units: up; gate and up; or one layer that stacks both.
        consumer: the layer whose columns read them.
    """

    name: str
    producers: tuple[Layer, ...]
    consumer: Layer

    @property
    def units(self) -> int:
        """How many there are."""
        return self.consumer.shape[1]

    def everything(self) -> Tensor:
        """The selection that keeps all."""
        return torch.arange(self.units)

    def size(self, kept: Tensor) -> tuple[int, ...]:
        """Of a selection: (units,)."""
        return (len(kept),)

    def members(self, kept: Tensor) -> list[tuple[Member, Tensor]]:
        """Itself, with the selection."""
        return [(self, kept)]

    def columns(self, kept: Tensor) -> Tensor:
        """Columns of the consumer that stay."""
        return kept

    def rows(self, kept: Tensor) -> list[tuple[Layer, Tensor]]:
        """Rows of every producer that stay."""
        return [
            (layer, torch.cat([kept + start for start in range(0, layer.shape[0], self.units)]))
            for layer in self.producers
        ]


@dataclass(frozen=True)
class ExpertUnits:
    """The hidden units of the experts of one module. A selection is an int64 tensor [experts, kept], its rows sorted.

    Every expert keeps as many units as the others, since a checkpoint holds their matrices as one tensor, but others.

    Attributes:
        name: of the module that holds the experts.
        experts: all of them.
    """

    name: str
    experts: tuple[FfnUnits, ...]

    @property
    def units(self) -> int:
        """How many every expert has."""
        return self.experts[0].units

    def everything(self) -> Tensor:
        """The selection that keeps all."""
        return torch.arange(self.units).repeat(len(self.experts), 1)

    def size(self, kept: Tensor) -> tuple[int, ...]:
        """Of a selection: (units of every expert,)."""
        return (kept.shape[1],)

    def members(self, kept: Tensor) -> list[tuple[Member, Tensor]]:
        """Every expert with its selection."""
        return list(zip(self.experts, kept, strict=True))


@dataclass(frozen=True)
class AttentionHeads:
    """The query heads of one attention. A selection is an int64 tensor [kv groups, heads per group] of head numbers.

    Every row belongs to one KV group and all rows are equally long, since a checkpoint can hold nothing else.

    Attributes:
        name: of the attention module.
        producers: q, k, v projections, or one layer that stacks them.
        consumer: the output projection.
        groups: KV groups.
        per_group: query heads in each.
        head_dim: width of a head.
    """

    name: str
    producers: tuple[Layer, ...]
    consumer: Layer
    groups: int
    per_group: int
    head_dim: int

    def everything(self) -> Tensor:
        """The selection that keeps all."""
        return torch.arange(self.groups * self.per_group).view(self.groups, self.per_group)

    def size(self, kept: Tensor) -> tuple[int, ...]:
        """Of a selection: (KV groups, query heads in each)."""
        return tuple(kept.shape)

    def members(self, kept: Tensor) -> list[tuple[Member, Tensor]]:
        """Itself, with the selection."""
        return [(self, kept)]

    def _wide(self, heads: Tensor) -> Tensor:
        return (heads.reshape(-1, 1) * self.head_dim + torch.arange(self.head_dim)).reshape(-1)

    def columns(self, kept: Tensor) -> Tensor:
        """Columns of the consumer that stay."""
        return self._wide(kept)

    def rows(self, kept: Tensor) -> list[tuple[Layer, Tensor]]:
        """Rows of every producer that stay."""
        q, kv = self._wide(kept), self._wide(kept[:, 0] // self.per_group)
        if len(self.producers) == 3:
            return list(zip(self.producers, (q, kv, kv), strict=True))
        k, v = self.groups * self.per_group * self.head_dim, self.groups * (self.per_group + 1) * self.head_dim
        return [(self.producers[0], torch.cat([q, kv + k, kv + v]))]


#: What has one consumer, and what is given a size.
Member = FfnUnits | AttentionHeads
Group = Member | ExpertUnits


def consumers_of(groups: Sequence[Group]) -> list[Layer]:
    """The layers that read the units of the groups."""
    return [member.consumer for group in groups for member, _ in group.members(group.everything())]


def saving(group: Group, kept: Tensor) -> int:
    """How many weights go with all that is not kept (biases not counted)."""
    total = 0
    for member, stays in group.members(kept):
        out, columns = member.consumer.shape
        rows = sum((layer.shape[0] - len(r)) * layer.shape[1] for layer, r in member.rows(stays))
        total += out * (columns - len(member.columns(stays))) + rows
    return total


def find_ffn(model: PreTrainedModel, layers: Sequence[Layer]) -> list[FfnUnits]:
    """The FFNs whose layers are all among ``layers``, in the order of the model.

    One with a further vector as long as it has units (a norm between its layers) couples them and is left out.
    """
    found, biases = [], {f"{layer.name}.bias" for layer in prunable_layers(model)}
    for name, producers, consumer in matches(model, layers, FFN_LAYOUTS):
        rows = {layer.shape[0] for layer in producers}
        stacked = 2 if len(producers) == 1 else 1
        fits = rows in ({consumer.shape[1]}, {stacked * consumer.shape[1]})
        others = _others(model, name, (*producers, consumer))
        coupled = any(p.shape == consumer.shape[1:] and f"{name}.{n}" not in biases for n, p in others)
        if fits and (not coupled or consumer.shape[0] == consumer.shape[1]):
            found.append(FfnUnits(name, producers, consumer))
    return found


def find_widths(model: PreTrainedModel, layers: Sequence[Layer]) -> list[FfnUnits | ExpertUnits]:
    """What has a width of its own: the FFNs of ``find_ffn``, with the experts of one module as one.

    Experts are left out where some of their module are not among ``layers``.
    """
    found: dict[str, FfnUnits | ExpertUnits] = {}
    experts: dict[str, list[FfnUnits]] = {}
    for ffn in find_ffn(model, layers):
        if not isinstance(ffn.consumer.module, ExpertLinear):
            found[ffn.name] = ffn
            continue
        module = ffn.name.rpartition(".")[0]
        experts.setdefault(module, []).append(ffn)
        if len(experts[module]) == model.get_submodule(module).num_experts:
            found[module] = ExpertUnits(module, tuple(experts[module]))
    return list(found.values())


def same_kinds(groups: Sequence[Group], model: PreTrainedModel) -> list[Group]:
    """All that a model has of the kinds that some groups are of."""
    layers, heads = prunable_layers(model), [isinstance(group, AttentionHeads) for group in groups]
    found: list[Group] = [] if all(heads) else [*find_widths(model, layers)]
    return [*found, *find_heads(model, layers)] if any(heads) else found


def find_heads(model: PreTrainedModel, layers: Sequence[Layer]) -> list[AttentionHeads]:
    """The attentions whose heads can be told apart, in the order of the model.

    Raises:
        InputError: a normalisation over all heads couples them; names the attention.
    """
    found = []
    for name, producers, consumer in matches(model, layers, HEAD_LAYOUTS):
        width = getattr(model.get_submodule(name), "head_dim", None)
        if not isinstance(width, int) or any(layer.shape[0] % width for layer in producers):
            continue
        heads, rows = consumer.shape[1] // width, sum(layer.shape[0] for layer in producers) // width
        groups = (rows - heads) // 2  # the rest are keys and values
        if not 1 <= groups <= heads:
            continue
        one = AttentionHeads(name, producers, consumer, groups, heads // groups, width)
        if [len(r) for _, r in one.rows(one.everything())] != [layer.shape[0] for layer in producers]:
            continue
        for other, parameter in _others(model, name, (*producers, consumer)):
            a_list = any(part.isdigit() for part in other.split("."))  # of norms, one for every head
            per_head = "." not in other and parameter.numel() in (heads, groups)  # such as attention sinks
            if parameter.ndim > 1 or parameter.numel() > width or a_list or per_head:
                raise InputError(
                    f"the heads of {name} cannot be removed: its {other} {list(parameter.shape)} belongs to several "
                    f"heads of width {width} together, so the others would change; use --structured ffn"
                )
        found.append(one)
    return found


def _others(model: PreTrainedModel, module: str, layers: Sequence[Layer]) -> list[tuple[str, Tensor]]:
    """The parameters of a module that are not those of the layers."""
    known = {id(parameter) for layer in layers for parameter in layer.parameters()}
    return [(n, p) for n, p in model.get_submodule(module).named_parameters() if id(p) not in known]


def matches(
    model: PreTrainedModel, layers: Sequence[Layer], layouts: Sequence[tuple[tuple[str, ...], str]]
) -> list[tuple[str, tuple[Layer, ...], Layer]]:
    """(module, producers, consumer) of every place where a layout's names are all layers to prune."""
    by_name = {layer.name: layer for layer in layers}
    found = []
    for name, _ in model.named_modules():
        for producers, consumer in layouts:
            names = [f"{name}.{part}" for part in (*producers, consumer)]
            if all(n in by_name for n in names):
                *first, last = (by_name[n] for n in names)
                found.append((name, tuple(first), last))
                break
    return found
