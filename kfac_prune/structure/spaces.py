"""Where channels lie that can be permuted without changing the function: FFN units, head dimensions, the stream."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kfac_prune.errors import InputError
from kfac_prune.models import Layer, prunable_layers
from kfac_prune.structure.groups import FFN_LAYOUTS, HEAD_LAYOUTS, find_ffn, find_heads, matches

logger = logging.getLogger("kfac_prune")

KINDS = ("ffn", "heads", "stream")
#: Attention layers that read and write the stream, and whose heads cannot be told apart by ``find_heads``.
FUSED_LAYOUTS = ((("c_attn",), "c_proj"), (("query_key_value",), "dense"))  # GPT-2, GPT-NeoX


@dataclass(frozen=True)
class Axis:
    """Where the channels of a space lie in one parameter.

    Attributes:
        target: a layer, seen as [out, in], or another parameter of the model.
        dim: 0 = rows (with the bias, where a layer has one), 1 = columns.
        starts: where each copy of the channels begins; what lies between them stays.
    """

    target: Layer | nn.Parameter
    dim: int
    starts: tuple[int, ...] = (0,)

    def index(self, permutation: Tensor) -> Tensor:
        """The permutation of the whole axis."""
        index = torch.arange(self.target.shape[self.dim])
        for start in self.starts:
            index[start : start + len(permutation)] = start + permutation
        return index


@dataclass(frozen=True)
class Space:
    """Channels that can be permuted without changing the function.

    Attributes:
        kind: "ffn", "heads" or "stream".
        name: of the module.
        width: number of channels.
        axes: everywhere they lie.
    """

    kind: str
    name: str
    width: int
    axes: tuple[Axis, ...]

    def readers(self) -> list[tuple[Layer, tuple[int, ...]]]:
        """The layers whose columns are permuted, and where the channels begin in them."""
        return [(axis.target, axis.starts) for axis in self.axes if axis.dim == 1 and isinstance(axis.target, Layer)]


def find_spaces(model: PreTrainedModel, kind: str, m: int) -> list[Space]:
    """The spaces of one kind that the architecture has.

    Heads narrower than whole groups of m are left out, since their groups would straddle two heads.

    Args:
        model: whose shapes and names decide.
        kind: "ffn", "heads" or "stream".
        m: inputs per group.
    """
    linear = prunable_layers(model)
    if kind == "ffn":
        found = []
        for ffn in find_ffn(model, linear):
            starts = [tuple(range(0, layer.shape[0], ffn.units)) for layer in ffn.producers]
            rows = [Axis(layer, 0, start) for layer, start in zip(ffn.producers, starts, strict=True)]
            found.append(Space(kind, ffn.name, ffn.units, (*rows, Axis(ffn.consumer, 1))))
        return found
    if kind == "heads":
        return list(_heads(model, linear, m))
    return [stream] if (stream := _stream(model, linear)) is not None else []


def _heads(model: PreTrainedModel, linear: Sequence[Layer], m: int) -> Iterator[Space]:
    """One space for each KV group: rows of its values, columns of every query head that reads them."""
    try:
        attentions = find_heads(model, linear)
    except InputError as error:  # a norm over all heads; it is told about removal
        logger.info("permute: no head dimensions: %s", error)
        return
    for one in attentions:
        if one.head_dim % m:
            continue
        values, d = one.producers[-1], one.head_dim
        first = values.shape[0] - one.groups * d  # of the values, where queries and keys are stacked on them
        for group in range(one.groups):
            queries = range(group * one.per_group, (group + 1) * one.per_group)
            columns = Axis(one.consumer, 1, tuple(query * d for query in queries))
            yield Space("heads", f"{one.name}.{group}", d, (Axis(values, 0, (first + group * d,)), columns))


def _stream(model: PreTrainedModel, linear: Sequence[Layer]) -> Space | None:
    """The residual stream, if every parameter of the model is known to touch it in a known way or not at all."""
    embedded, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    assert isinstance(embedded, nn.Parameter)
    d = embedded.shape[1]
    attentions = matches(model, linear, (*HEAD_LAYOUTS, *FUSED_LAYOUTS))
    axes: list[Axis] = []
    for _, readers, writer in (*matches(model, linear, FFN_LAYOUTS), *attentions):
        axes += [*(Axis(reader, 1) for reader in readers), Axis(writer, 0)]
    known = {id(p) for axis in axes if isinstance(axis.target, Layer) for p in axis.target.parameters()}
    known |= {id(p) for name, _, _ in attentions for p in model.get_submodule(name).parameters()}  # norms of q and k
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    if head is not None:
        tables.add(id(head.weight))
        known.add(id(head.bias) if getattr(head, "bias", None) is not None else 0)  # one for every token
    for name, parameter in model.named_parameters():
        if id(parameter) in known:
            continue
        if parameter.ndim == 1 or id(parameter) in tables:  # norms and biases; embeddings and head
            axes.append(Axis(parameter, parameter.ndim - 1))
        else:
            logger.info("permute: the residual stream stays: %s %s is not understood", name, list(parameter.shape))
            return None
    wrong = [axis for axis in axes if axis.target.shape[axis.dim] != d]
    return None if wrong else Space("stream", model.base_model_prefix, d, tuple(axes))
