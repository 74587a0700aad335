"""Experts as ordinary linear layers: the 3-D parameters of transformers' experts modules, one matrix per expert.

transformers keeps all experts of a block in two parameters, ``gate_up_proj`` [E, 2F, D] and ``down_proj`` [E, D, F],
and multiplies by slices of them, where no hook can look. ``split_experts`` puts a linear layer in the place of every
slice (``...experts.3.gate_up_proj``), so that all that prunes linear layers sees them too; ``whole_experts`` puts the
parameters back, for saving.

Which modules these are is told by the attributes that transformers' experts interface gives them, not by families, and
by a trial on random tokens. What has another form (biases, transposed or interleaved matrices) stays as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

logger = logging.getLogger("kfac_prune")

#: The parameters of an experts module, [E, out, in] each.
MATRICES = ("gate_up_proj", "down_proj")
#: What the module beside it is called that chooses the experts, in most families with a parameter for a matrix, or that
#: weighs the expert which all tokens share.
ROUTERS = {"gate", "router", "shared_expert_gate"}


class ExpertLinear(nn.Linear):
    """One matrix of one expert.

    Attributes:
        positions: [rows] int64, which of the tokens [B T] of the present forward pass the rows of its input are.
    """

    positions: Tensor | None = None

    @classmethod
    def of(cls, matrix: Tensor, requires_grad: bool) -> ExpertLinear:
        """Around a matrix [out, in], without a copy."""
        layer = cls(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(matrix, requires_grad)
        return layer


def split_experts(model: nn.Module) -> list[str]:
    """Give every expert linear layers of its own, views of the parameters that they replace; the function stays.

    Args:
        model: of transformers; changed in place.

    Returns:
        Names of the experts modules that were split.
    """
    done = []
    for name, module in list(model.named_modules()):
        if not can_be_split(module):
            continue
        trial = None if module.get_parameter(MATRICES[0]).is_meta else _Trial(module)
        _split(module)
        if trial is not None and trial.differs():
            _join(module)
            logger.warning("%s (%s) computes something else than its interface says; left dense", name, type(module))
            continue
        done.append(name)
    return done


@contextmanager
def whole_experts(model: nn.Module) -> Iterator[None]:
    """Within the block the experts are parameters of three dimensions again, as transformers saves and loads them.

    Costs the memory of one experts module, and leaves the layers of a split model with the same weights.
    """
    split = [module for module in model.modules() if _is_split(module)]
    layers = [_join(module) for module in split]
    try:
        yield
    finally:
        for module, experts in zip(split, layers, strict=True):
            _split(module, experts)


def stacked(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace the experts' matrices in a state dict of a split model by those of the whole one; returns these.

    They may have other sizes than the model's, the same for all experts of a module.
    """
    whole = {}
    module: Any
    for name, module in model.named_modules():
        if _is_split(module):
            for matrix in MATRICES:
                each = [state.pop(f"{name}.{number}.{matrix}.weight") for number in range(module.num_experts)]
                whole[f"{name}.{matrix}"] = torch.stack(each)
    state.update(whole)
    return whole


def routers(model: nn.Module) -> list[nn.Linear]:
    """The linear layers that choose among experts, with one output for each, or weigh a shared one, with one."""
    found = []
    for block in model.modules():
        counts = {module.num_experts for module in block.children() if _is_split(module) or can_be_split(module)}
        for name, module in block.named_modules() if counts else ():
            outputs = module.out_features if isinstance(module, nn.Linear) else 0
            if ROUTERS & set(name.split(".")) and outputs in {1, *counts}:
                found.append(module)
    return found


def mean_share(model: PreTrainedModel, experts: int) -> float:
    """Of all tokens, that one of so many experts sees on average: experts per token over experts."""
    config = model.config.get_text_config()
    chosen = getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_top_k", None) or 1
    return min(chosen / experts, 1.0)


def tokens_of(module: nn.Module) -> Tensor | None:
    """Which tokens [rows] of the forward pass an expert's layer sees; None for any other, which sees all."""
    return module.positions if isinstance(module, ExpertLinear) else None


def can_be_split(module: nn.Module) -> bool:
    """Two parameters of the known form, in a module that the experts interface runs."""
    up, down = (module._parameters.get(name) for name in MATRICES)
    if up is None or down is None or up.ndim != 3 or down.ndim != 3:
        return False
    known = getattr(module, "has_gate", False) and getattr(module, "is_concatenated", False)
    strange = ("has_bias", "is_transposed", "has_post_expert_norm")
    fits = up.shape[1:] == (2 * down.shape[2], down.shape[1]) and len(up) == len(down) == module.num_experts
    return known and fits and not any(getattr(module, name, True) for name in strange)


def _is_split(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    return isinstance(forward, MethodType) and forward.__func__ is _forward


def _split(module: Any, experts: list[nn.ModuleDict] | None = None) -> None:
    """Replace the parameters by the experts' layers; by those given, which then are views of the parameters."""
    whole = {name: module._parameters.pop(name) for name in MATRICES}
    for number in range(len(whole["down_proj"])):
        layers = experts[number] if experts else nn.ModuleDict()
        for name, parameter in whole.items():
            if experts:
                layers[name].weight.data = parameter.data[number]
            else:
                layers[name] = ExpertLinear.of(parameter.data[number], parameter.requires_grad)
        module.add_module(str(number), layers)
    module.forward = MethodType(_forward, module)


def _join(module: Any) -> list[nn.ModuleDict]:
    """Replace the experts' layers by the parameters; returns what was replaced, now views of them."""
    experts: list[Any] = [module._modules.pop(str(number)) for number in range(module.num_experts)]
    for name in MATRICES:
        weights = [expert[name].weight for expert in experts]
        stacked = torch.stack([weight.data for weight in weights])
        for weight, view in zip(weights, stacked, strict=True):
            weight.data = view
        module.register_parameter(name, nn.Parameter(stacked, weights[0].requires_grad))
    del module.forward
    return experts


def _forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What the experts add: ``Σ_k w_k · down(gate(up(x)))`` over the experts chosen for every token.

    Args:
        module: of the experts.
        hidden_states: [tokens, D].
        top_k_index: [tokens, k], numbers of experts; those beyond the last one are none.
        top_k_weights: [tokens, k].
    """
    tokens, k = top_k_index.shape
    chosen = top_k_index.reshape(-1)  # [tokens · k]
    slots, outputs = [], []
    for number in chosen.unique().tolist():
        if not 0 <= number < module.num_experts:
            continue
        expert = module._modules[str(number)]
        slot = (chosen == number).nonzero().squeeze(1)
        up, down = (expert[name] for name in MATRICES)
        up.positions = down.positions = slot // k
        x = down(module._apply_gate(up(hidden_states[slot // k])))
        slots.append(slot)
        outputs.append(x * top_k_weights.reshape(-1)[slot].unsqueeze(1))
    if not outputs:
        return torch.zeros_like(hidden_states)
    y = torch.cat(outputs)  # [tokens · k or fewer, D]
    every = y.new_zeros(tokens * k, y.shape[1]).index_copy(0, torch.cat(slots), y)
    return every.view(tokens, k, -1).sum(1).to(hidden_states.dtype)


class _Trial:
    """Random tokens through an experts module, each to two experts, before it is split and after."""

    def __init__(self, module: nn.Module) -> None:
        self._module: Any = module
        up = module.get_parameter(MATRICES[0])
        experts, width = len(up), up.shape[2]
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(experts, width, generator=generator)
        index = torch.stack([torch.arange(experts), torch.arange(experts).roll(1)], dim=1)
        weights = torch.rand(experts, 2, generator=generator)
        self._inputs = x.to(up), index.to(up.device), weights.to(up)
        self._before = self._output()

    @torch.no_grad()
    def _output(self) -> Tensor:
        y: Tensor = self._module(*self._inputs)
        return y

    def differs(self) -> bool:
        """By more than rounding."""
        off = (self._output() - self._before).double().norm() / self._before.double().norm().clamp_min(1e-300)
        return not float(off) <= torch.finfo(self._before.dtype).eps ** 0.5
