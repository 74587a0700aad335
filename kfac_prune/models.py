"""The weight matrices of a model that can be pruned, and its blocks."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from kfac_prune import ranks
from kfac_prune.errors import InputError
from kfac_prune.experts import routers

#: Classes whose own forward pass is that of nn.Linear, written out.
PLAIN = {"FalconLinear"}


@dataclass(frozen=True)
class Layer:
    """A module with one weight matrix, seen as ``W: [out, in]`` whatever the module's own layout.

    Attributes:
        name: in the model, e.g. ``model.layers.0.mlp.down_proj``.
        module: nn.Linear, or GPT-2's Conv1D, whose weight is stored [in, out].
    """

    name: str
    module: nn.Module

    @property
    def _parameter(self) -> nn.Parameter:
        parameter = self.module.weight
        assert isinstance(parameter, nn.Parameter)
        return parameter

    @property
    def weight(self) -> Tensor:
        """W [out, in], a view of the parameter, without gradient."""
        stored = self._parameter.detach()
        return stored.T if isinstance(self.module, Conv1D) else stored

    @property
    def bias(self) -> Tensor | None:
        """[out], a view of the parameter, or None."""
        bias = self.module.bias
        return bias.detach() if isinstance(bias, Tensor) else None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.weight.shape[0], self.weight.shape[1]

    def parameters(self) -> list[nn.Parameter]:
        """The weight and, where there is one, the bias."""
        return [p for p in (self._parameter, self.module.bias) if isinstance(p, nn.Parameter)]

    def stored(self, matrix: Tensor) -> Tensor:
        """A matrix [out, in] in the layout in which the module stores its weight."""
        return matrix.T if isinstance(self.module, Conv1D) else matrix

    def assign(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Replace W [out, in] (and the bias [out]) by these, in the parameter's dtype and on its device.

        Where they are so already, the parameter takes over the tensors themselves. The old ones are not written to:
        whoever holds them (``WeightSwap``) keeps their values.
        """
        _replace(self._parameter, self.stored(weight))
        if bias is not None:
            assert isinstance(self.module.bias, nn.Parameter)
            _replace(self.module.bias, bias)


def _replace(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.data = value.to(dtype=parameter.dtype, device=parameter.device).contiguous()


class WeightSwap:
    """Holds the present weights of some layers, so that they can be put back for a moment or for good.

    Costs no copy: ``Layer.assign`` never writes into a tensor that is held here.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._parameters = [p for layer in layers for p in (layer._parameter, layer.module.bias) if p is not None]
        self._held = [p.data for p in self._parameters]

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within the block the model has the held weights."""
        present = [p.data for p in self._parameters]
        try:
            self.restore()
            yield
        finally:
            for parameter, value in zip(self._parameters, present, strict=True):
                parameter.data = value

    def restore(self) -> None:
        """Put the held weights back for good."""
        for parameter, value in zip(self._parameters, self._held, strict=True):
            parameter.data = value


@contextmanager
def only_trained(module: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within the block autograd is on, and of a module's parameters just these require gradients."""
    flags = [(p, p.requires_grad) for p in module.parameters()]
    try:
        module.requires_grad_(False)
        for p in parameters:
            p.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


def prunable_layers(model: PreTrainedModel, include: Sequence[str] = (), ignore: Sequence[str] = ()) -> list[Layer]:
    """Every linear layer of the model but its head and routers, filtered by shell patterns on the names.

    Args:
        model: a transformers model.
        include: patterns such as ``*.mlp.*``; empty means all.
        ignore: patterns of layers to leave dense.

    Raises:
        InputError: a pattern matches no layer, or none is left.
    """
    head = model.get_output_embeddings() or _classifier(model)
    embedded = model.get_input_embeddings()
    tied = {id(m.weight) for m in (head, embedded, *routers(model)) if m is not None and hasattr(m, "weight")}
    layers: list[Layer] = []
    for name, module in model.named_modules():
        if is_plain(module) and module is not head and id(module.weight) not in tied:
            layers.append(Layer(name, module))
            if 0 in layers[-1].shape:
                raise InputError(f"layer {name} is {list(layers[-1].shape)} [out, in], which holds no weight")
            tied.add(id(module.weight))  # a matrix that two modules share is one matrix
    for pattern in (*include, *ignore):
        if not any(fnmatch.fnmatchcase(layer.name, pattern) for layer in layers):
            raise InputError(
                f"the layer pattern {pattern!r} matches none of the {len(layers)} linear layers "
                f"(the first is {layers[0].name!r}); `kfac-prune inspect` lists them"
                if layers
                else f"the layer pattern {pattern!r} matches nothing: {type(model).__name__} has no linear layer"
            )
    kept = [
        layer
        for layer in layers
        if (not include or any(fnmatch.fnmatchcase(layer.name, p) for p in include))
        and not any(fnmatch.fnmatchcase(layer.name, p) for p in ignore)
    ]
    if not kept:
        raise InputError(f"no layer of {type(model).__name__} is left to prune after --include and --ignore")
    return kept


def is_plain(module: nn.Module) -> bool:
    """Whether a module computes ``x Wᵀ + b``: a subclass of nn.Linear with a forward pass of its own need not."""
    return type(module).forward in (nn.Linear.forward, Conv1D.forward) or type(module).__name__ in PLAIN


def _classifier(model: PreTrainedModel) -> nn.Module | None:
    """The last linear layer of a sequence classifier, if it gives the classes' logits."""
    if "ForSequenceClassification" not in type(model).__name__:
        return None
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return linear[-1] if linear and linear[-1].out_features == model.config.num_labels else None


def find_blocks(model: nn.Module, layers: Iterable[Layer]) -> tuple[list[str], list[nn.Module]]:
    """Names and modules of the repeated blocks: the list of modules that holds most of the layers."""
    names = [layer.name for layer in layers]
    best: tuple[int, list[str], list[nn.Module]] = (0, [], [])
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            count = sum(one.startswith(f"{name}.") for one in names)
            if count > best[0]:
                best = (count, [f"{name}.{i}" for i in range(len(module))], list(module))
    return best[1], best[2]


def owners(layers: Sequence[Layer]) -> list[int]:
    """Which process solves which layer; balanced by the multiplications that factorisations and products take."""
    sizes = [layer.shape for layer in layers]
    return ranks.owners([float(r**3 + c**3 + r * c * (r + c)) for r, c in sizes])
