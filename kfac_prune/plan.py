"""The plan of a run: how sparse every layer becomes, with which weights, and what that is predicted to cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from kfac_prune.allocate import LossCurve, allocate, least_subset
from kfac_prune.baselines import sparsegpt, wanda
from kfac_prune.config import ALLOCATIONS
from kfac_prune.curvature.estimate import Factors, Method
from kfac_prune.data import WindowBatch, Windows
from kfac_prune.errors import InputError
from kfac_prune.linalg import kth_largest
from kfac_prune.models import Layer, WeightSwap, prunable_layers
from kfac_prune.objective import CAUSAL, Objective
from kfac_prune.obs import FAST, NM, Pattern, Unstructured, saliency, solve
from kfac_prune.operators import Curvature, Damping, DampingRecord, quadratic_loss
from kfac_prune.quality import evaluate
from kfac_prune.stream import BlockStack, begun_at

#: How a layer can be pruned: by one of the curvatures, or by a method of the field.
PruningMethod = Method | Literal["sparsegpt", "wanda"]
#: Sparsities at which a layer's loss curve is computed.
CURVE_POINTS = (0.3, 0.5, 0.7, 0.9)
#: A measured loss below this fraction of the predicted one is taken for noise of a small sample.
MIN_FACTOR = 0.5
#: Calibration tokens of a probe, and how many passes over the calibration windows all layers together may take (but a
#: probe has at least 4 windows: with 4 of 256 tokens the loss was at most 6 % above that with 16 or 32).
PROBE_TOKENS, PROBE_PASSES = 4096, 8


@dataclass(frozen=True)
class PlannedLayer:
    """One layer of a plan.

    Attributes:
        name: of the layer.
        weight: [out, in], pruned and compensated, in the model's dtype.
        bias: [out] or None.
        mask: [out, in] bool, True = kept.
        predicted: nats per token that the change costs: under the damped G ⊗ A whatever the method, times what a probe
            found between measured and predicted.
        kkt: relative KKT residual of the method's own problem (0 = optimal compensation); None where none was
            solved.
        damping: what was added to the factors.
        groups_fit: False where an n:m pattern does not divide the width: the last group is shorter than m, and
            hardware that needs whole groups cannot use the layer.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    mask: Tensor
    predicted: float
    kkt: float | None
    damping: tuple[DampingRecord, ...]
    groups_fit: bool = True

    @property
    def sparsity(self) -> float:
        """Fraction of weights removed."""
        return 1 - int(self.mask.sum()) / self.mask.numel()


@dataclass(frozen=True)
class Plan:
    """The solved layers; nothing in the model has changed yet.

    Attributes:
        layers: in the order of the model.
        method: used.
        allocation: rule used.
    """

    layers: tuple[PlannedLayer, ...]
    method: str
    allocation: str

    @property
    def predicted(self) -> float:
        """Predicted KL(dense‖pruned), nats per token: the sum over layers."""
        return sum(layer.predicted for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Fraction of all prunable weights that are removed."""
        kept = sum(int(layer.mask.sum()) for layer in self.layers)
        return 1 - kept / sum(layer.mask.numel() for layer in self.layers)

    def table(self, unit: str = "token") -> str:
        """Layer by layer: shape, sparsity, predicted loss per unit of the objective, as aligned text."""
        width = max(len("total"), *(len(layer.name) for layer in self.layers))
        lines = [f"{'layer':{width}}  {'out x in':>13}  sparsity  predicted loss (nats/{unit})"]
        for layer in self.layers:
            shape = f"{layer.mask.shape[0]} x {layer.mask.shape[1]}"
            notes = [f"damping of {r.factor} raised to {r.relative:g}" for r in layer.damping if r.raised]
            notes += [] if layer.groups_fit else ["width is no multiple of m, its last group is shorter"]
            note = f"  ({'; '.join(notes)})" if notes else ""
            lines.append(f"{layer.name:{width}}  {shape:>13}  {layer.sparsity:8.1%}  {layer.predicted:.6f}{note}")
        weights = sum(layer.mask.numel() for layer in self.layers)
        lines.append(f"{'total':{width}}  {f'{weights:,}':>13}  {self.sparsity:8.1%}  {self.predicted:.6f}")
        return "\n".join(lines)


def make_plan(
    layers: Sequence[Layer],
    factors: Factors,
    *,
    sparsity: float | None = None,
    pattern: NM | None = None,
    method: PruningMethod = "kfac",
    allocation: str = "curves",
    damping: Damping | None = None,
    curves: Mapping[str, LossCurve] | None = None,
    probe: Probe | None = None,
    quiet: bool = True,
) -> Plan:
    """Decide every layer's sparsity, select its mask and solve for its weights. The model is not changed.

    Args:
        layers: to prune, all with factors.
        factors: their curvature.
        sparsity: fraction of all weights to remove, in [0, 1); None is 0.5, or with a pattern all that it removes. Less
            than that leaves whole layers dense: those whose pruning is predicted to cost most for what it removes.
        pattern: n:m, or None for unstructured.
        method: to prune by.
        allocation: "curves", "uniform" or "global" (see ``Recipe``); where a pattern leaves nothing to choose, ignored.
        damping: of the factors; None is ``Damping()``.
        curves: from ``loss_curves``, for allocation "curves"; None computes them.
        probe: measures single pruned layers, to correct the predictions and with them allocation "curves"; None trusts
            the predictions as they are.
        quiet: show no progress bars.
    """
    missing = [layer.name for layer in layers if layer.name not in factors.layers]
    if missing:
        raise InputError(f"no curvature was estimated for layer {missing[0]} ({len(missing)} layers in all)")
    problems = Problems(factors, method, damping or Damping())
    if sparsity is None:
        sparsity = 0.5 if pattern is None else float(pattern.sparsity)
    target: int | None = None  # weights to remove where a pattern is to leave some layers dense
    if pattern is not None and abs(sparsity - pattern.sparsity) > 1e-6:
        target = _removed(layers, pattern, sparsity)
        if allocation != "curves":
            raise InputError(f"layers that stay dense are chosen by allocation 'curves', not by {allocation!r}")
    elif pattern is not None:
        allocation = "uniform"
    if allocation not in ALLOCATIONS[method]:
        raise InputError(
            f"method {method} cannot allocate by {allocation!r}; choose {' or '.join(ALLOCATIONS[method])}"
        )
    factor: dict[str, float] = {}
    if pattern is not None or allocation == "uniform" or sparsity == 0:
        sparsities = dict.fromkeys((layer.name for layer in layers), sparsity)
    elif allocation == "global":
        sparsities = _global_threshold(layers, problems, sparsity)
    else:
        if curves is None:
            curves = loss_curves(layers, factors, damping=problems.damping, quiet=quiet)
        sparsities, factor = _by_curves(layers, problems, sparsity, curves, probe, quiet)
    planned = []
    for layer in tqdm(layers, desc="solve", unit="layer", disable=quiet):
        made = problems.solve(layer, pattern or Unstructured(sparsities[layer.name]))
        if probe is not None and layer.name not in factor:
            factor[layer.name] = probe.factor(layer, made)
        planned.append(replace(made, predicted=made.predicted * factor.get(layer.name, 1.0)))
    if target is not None:
        planned = _cheapest(layers, planned, target)
    return Plan(tuple(planned), method, allocation)


class Probe:
    """Measures what pruning one layer alone costs, where all others are dense.

    The second-order prediction holds for most layers and can be several times too small for a few: in the demo model
    for two matrices of the first block, where K-FAC's assumption that activations and gradients are independent
    presumably fails. Left uncorrected, just these layers look cheap and are given up.

    The dense residual stream before every block is kept, so that a measurement runs only the blocks from the layer's
    own on.

    Args:
        model: dense at this moment.
        windows: calibration tokens to measure on; a few thousand do.
        batch_size: windows per pass.
        objective: what the model computes.
    """

    def __init__(
        self, model: PreTrainedModel, windows: Windows, batch_size: int = 4, objective: Objective = CAUSAL
    ) -> None:
        self.model, self.windows, self.objective = model, windows, objective
        self._stack = stack = BlockStack(model, windows, batch_size)
        trimmed = map(WindowBatch.trimmed, windows.batches(batch_size))  # as ``evaluate`` does with sequences
        self._batches = [Windows(batch.input_ids, batch.attention_mask) for batch in trimmed]
        self._streams = [stack.entries]  # [block][batch]
        with torch.no_grad():
            for block in range(len(stack.names) - 1):
                self._streams.append([stack.keep(stack.run(block, i, x)) for i, x in enumerate(self._streams[-1])])

    @classmethod
    def on(
        cls, model: PreTrainedModel, calibration: Windows, batch_size: int = 4, objective: Objective = CAUSAL
    ) -> Probe:
        """A probe on the last few calibration windows, fewer where the model has many layers."""
        affordable = PROBE_PASSES * len(calibration) // len(prunable_layers(model))
        count = max(min(affordable, PROBE_TOKENS * len(calibration) // calibration.tokens), 4)
        few = calibration.split(count)[1] if len(calibration) > count else calibration
        return cls(model, few, batch_size, objective)

    def __call__(self, layer: Layer, planned: PlannedLayer) -> float:
        """KL(dense‖model with this layer pruned), nats per token; the model is dense again afterwards."""
        block = next((i for i, name in enumerate(self._stack.names) if layer.name.startswith(f"{name}.")), None)
        dense = WeightSwap([layer])
        layer.assign(planned.weight, planned.bias)
        total = tokens = 0.0
        try:
            for batch, stream in zip(self._batches, self._streams[block or 0], strict=True):
                begin = stream[:, : batch.input_ids.shape[1]]
                with nullcontext() if block is None else begun_at(self._stack, block, begin):
                    quality = evaluate(
                        self.model, batch, objective=self.objective, dense=dense.swapped_in, batch_size=len(batch)
                    )
                assert quality.kl is not None
                total += quality.kl * quality.tokens
                tokens += quality.tokens
        finally:
            dense.restore()
        return total / tokens

    def factor(self, layer: Layer, planned: PlannedLayer) -> float:
        """Measured over predicted loss, at least ``MIN_FACTOR``; 1 where nothing is predicted to be lost."""
        return max(self(layer, planned) / planned.predicted, MIN_FACTOR) if planned.predicted > 0 else 1.0


@dataclass(frozen=True)
class Problems:
    """The pruning problem of each layer under one method.

    Attributes:
        factors: of all layers.
        method: by which layers are pruned.
        damping: of the factors.
    """

    factors: Factors
    method: PruningMethod
    damping: Damping

    def __call__(self, layer: Layer) -> tuple[Tensor, Curvature, list[DampingRecord]]:
        """W [out, in] in float32, its curvature, and what damping that took; for methods with a curvature."""
        assert self.method != "sparsegpt"
        assert self.method != "wanda"
        operator, records = self.factors.layers[layer.name].operator(self.method, self.damping, where=layer.name)
        return layer.weight.to(torch.float32), operator, records

    def solve(self, layer: Layer, pattern: Pattern) -> PlannedLayer:
        """Prune one layer by the method, round to the model's dtype, and predict what that costs."""
        statistics = self.factors.layers[layer.name]
        weight, bias = layer.weight.to(torch.float32), layer.bias
        fisher: Curvature | None = None
        kkt: float | None = None
        records: list[DampingRecord] = []
        if self.method == "wanda":
            mask = wanda(weight, statistics.a, pattern)
            x = weight * mask
        elif self.method == "sparsegpt":
            x, mask, record = sparsegpt(weight, statistics.a, pattern, where=layer.name)
            records = [record]
        else:
            weight, operator, records = self(layer)
            solution = solve(weight, operator, pattern)
            x, mask, kkt = solution.weight, solution.mask, solution.kkt
            fisher = operator if self.method == "kfac" else None
        if fisher is None:  # the unit of every prediction, whatever the method pruned by
            fisher, _ = statistics.operator("kfac", self.damping, where=layer.name)
        rounded = x.to(layer.weight.dtype)
        change = rounded.to(weight.dtype) - weight
        shift = torch.zeros_like(weight[:, 0])
        if bias is not None and self.method in ("kfac", "layerwise"):
            shift = statistics.bias_update(change)
            bias = (bias.to(weight.dtype) + shift).to(bias.dtype)
        return PlannedLayer(
            name=layer.name,
            weight=rounded,
            bias=bias,
            mask=mask,
            predicted=quadratic_loss(fisher, change) + statistics.bias_loss(change, shift),
            kkt=kkt,
            damping=tuple(records),
            groups_fit=not isinstance(pattern, NM) or layer.shape[1] % pattern.m == 0,
        )


def loss_curves(
    layers: Sequence[Layer],
    factors: Factors,
    *,
    damping: Damping | None = None,
    quiet: bool = True,
) -> dict[str, LossCurve]:
    """The predicted loss of every layer against its sparsity, under G ⊗ A, by the fast variant of the real solver.

    They serve plans at any sparsity. Arguments as ``make_plan``.
    """
    problems, curves = Problems(factors, "kfac", damping or Damping()), {}
    for layer in tqdm(layers, desc="loss curves", unit="layer", disable=quiet):
        weight, operator, _ = problems(layer)
        points = {s: solve(weight, operator, Unstructured(s), FAST).loss for s in CURVE_POINTS}
        curves[layer.name] = LossCurve(points, weight.numel())
    return curves


def _by_curves(
    layers: Sequence[Layer],
    problems: Problems,
    sparsity: float,
    curves: Mapping[str, LossCurve],
    probe: Probe | None,
    quiet: bool,
) -> tuple[dict[str, float], dict[str, float]]:
    """Allocate, correct every curve where it was used, allocate again.

    Returns:
        Sparsity per layer, and the factor that the probe found between measured and predicted loss.
    """
    first = allocate(curves, sparsity)
    corrected, factor = dict(curves), {}
    for layer in tqdm(layers, desc="refine curves", unit="layer", disable=quiet):
        chosen = first[layer.name]
        if chosen > 0:
            made = problems.solve(layer, Unstructured(chosen))
            factor[layer.name] = 1.0 if probe is None else probe.factor(layer, made)
            corrected[layer.name] = curves[layer.name].corrected(chosen, made.predicted * factor[layer.name])
    return allocate(corrected, sparsity), factor


def _global_threshold(layers: Sequence[Layer], problems: Problems, sparsity: float) -> dict[str, float]:
    """The sparsities that one threshold on the single-weight saliencies of all layers gives."""
    scores = {}
    for layer in layers:
        weight, operator, _ = problems(layer)
        scores[layer.name] = saliency(weight, operator).reshape(-1)
    everything = torch.cat([s.cpu() for s in scores.values()])
    keep = max(everything.numel() - round(sparsity * everything.numel()), 1)
    threshold = kth_largest(everything, keep)
    most = 1 - 1e-6  # every layer keeps at least one weight
    return {name: min(float((s < threshold.to(s.device)).float().mean()), most) for name, s in scores.items()}


def _removed(layers: Sequence[Layer], pattern: NM, sparsity: float) -> int:
    """How many weights a sparsity is to remove; refused if the pattern cannot on these layers."""
    total = sum(layer.weight.numel() for layer in layers)
    most = total - sum(layer.shape[0] * pattern.kept_of(layer.shape[1]) for layer in layers)
    target = math.ceil(sparsity * total - 1e-6)
    if target > most:
        raise InputError(
            f"sparsity is {sparsity:.4g}, and pattern {pattern.n}:{pattern.m} removes only {most / total:.4g} of the "
            "weights; lower the sparsity"
        )
    return target


def _cheapest(layers: Sequence[Layer], planned: Sequence[PlannedLayer], target: int) -> list[PlannedLayer]:
    """Those pruned layers that together remove a number of weights at the least predicted loss; the others dense."""
    taken = least_subset([int((~p.mask).sum()) for p in planned], [p.predicted for p in planned], target)
    assert taken is not None
    return [made if pruned else _dense(layer) for layer, made, pruned in zip(layers, planned, taken, strict=True)]


def _dense(layer: Layer) -> PlannedLayer:
    """A layer that stays as it is."""
    mask = torch.ones_like(layer.weight, dtype=torch.bool)
    return PlannedLayer(layer.name, layer.weight.clone(), layer.bias, mask, predicted=0.0, kkt=None, damping=())


def prune(layers: Sequence[Layer], plan: Plan) -> WeightSwap:
    """Put a plan's weights into the model, in place.

    Args:
        layers: of the model that the plan was made for.
        plan: to apply.

    Returns:
        The dense weights, which can be put back: for a moment (``swapped_in``) or for good (``restore``).
    """
    by_name = {layer.name: layer for layer in layers}
    targets = [by_name[planned.name] for planned in plan.layers]
    dense = WeightSwap(targets)
    for layer, planned in zip(targets, plan.layers, strict=True):
        layer.assign(planned.weight, planned.bias)
    return dense
