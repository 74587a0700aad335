"""The plan of a run: how sparse every layer becomes, with which weights, and what that is predicted to cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from kfac_prune.allocate import LossCurve, allocate
from kfac_prune.curvature.estimate import Factors, Method
from kfac_prune.data import Windows
from kfac_prune.errors import InputError
from kfac_prune.linalg import kth_largest
from kfac_prune.models import Layer, WeightSwap
from kfac_prune.objective import CAUSAL, Objective
from kfac_prune.obs import FAST, NM, Solution, Unstructured, saliency, solve
from kfac_prune.operators import Curvature, Damping, DampingRecord, quadratic_loss
from kfac_prune.quality import evaluate

#: Sparsities at which a layer's loss curve is computed.
CURVE_POINTS = (0.3, 0.5, 0.7, 0.9)
#: A measured loss below this fraction of the predicted one is taken for noise of a small sample.
MIN_FACTOR = 0.5
#: Calibration windows that a probe is made of.
PROBE_WINDOWS = 16


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
        kkt: relative KKT residual of the method's own problem (0 = optimal compensation).
        damping: what was added to the factors.
        groups_fit: False where an n:m pattern does not divide the width: the last group is shorter than m, and
            hardware that needs whole groups cannot use the layer.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    mask: Tensor
    predicted: float
    kkt: float
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
        method: curvature used.
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
    sparsity: float = 0.5,
    pattern: NM | None = None,
    method: Method = "kfac",
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
        sparsity: fraction of all weights to remove, in [0, 1); ignored with an n:m pattern.
        pattern: n:m, or None for unstructured.
        method: curvature to prune by.
        allocation: "curves", "uniform" or "global" (see ``Recipe``); ignored with an n:m pattern.
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
    if pattern is not None:
        allocation = "uniform"
    factor: dict[str, float] = {}
    if allocation == "uniform" or sparsity == 0:
        sparsities = dict.fromkeys((layer.name for layer in layers), sparsity)
    elif allocation == "global":
        sparsities = _global_threshold(layers, problems, sparsity)
    elif allocation == "curves":
        if curves is None:
            curves = loss_curves(layers, factors, method=method, damping=problems.damping, quiet=quiet)
        sparsities, factor = _by_curves(layers, problems, sparsity, curves, probe, quiet)
    else:
        raise InputError(f"allocation is {allocation!r}; choose one of curves, uniform, global")
    planned = []
    for layer in tqdm(layers, desc="solve", unit="layer", disable=quiet):
        weight, operator, records = problems(layer)
        solution = solve(weight, operator, pattern or Unstructured(sparsities[layer.name]))
        made = _planned(layer, problems, weight, operator, solution, records, pattern)
        if probe is not None and layer.name not in factor:
            factor[layer.name] = probe.factor(layer, made)
        planned.append(replace(made, predicted=made.predicted * factor.get(layer.name, 1.0)))
    return Plan(tuple(planned), method, allocation)


@dataclass(frozen=True)
class Probe:
    """Measures what pruning one layer alone costs, where all others are dense.

    The second-order prediction holds for most layers and can be several times too small for a few: in the demo model
    for two matrices of the first block, where K-FAC's assumption that activations and gradients are independent
    presumably fails. Left uncorrected, just these layers look cheap and are given up.

    Attributes:
        model: dense.
        windows: calibration tokens to measure on; a few thousand do.
        batch_size: windows per pass.
        objective: what the model computes.
    """

    model: PreTrainedModel
    windows: Windows
    batch_size: int = 4
    objective: Objective = CAUSAL

    @classmethod
    def on(
        cls, model: PreTrainedModel, calibration: Windows, batch_size: int = 4, objective: Objective = CAUSAL
    ) -> Probe:
        """A probe on the last few calibration windows."""
        few = calibration.split(PROBE_WINDOWS)[1] if len(calibration) > PROBE_WINDOWS else calibration
        return cls(model, few, batch_size, objective)

    def __call__(self, layer: Layer, planned: PlannedLayer) -> float:
        """KL(dense‖model with this layer pruned), nats per token; the model is dense again afterwards."""
        dense = WeightSwap([layer])
        layer.assign(planned.weight, planned.bias)
        try:
            kl = evaluate(
                self.model,
                self.windows,
                objective=self.objective,
                dense=dense.swapped_in,
                batch_size=self.batch_size,
            ).kl
        finally:
            dense.restore()
        assert kl is not None
        return kl

    def factor(self, layer: Layer, planned: PlannedLayer) -> float:
        """Measured over predicted loss, at least ``MIN_FACTOR``; 1 where nothing is predicted to be lost."""
        return max(self(layer, planned) / planned.predicted, MIN_FACTOR) if planned.predicted > 0 else 1.0


@dataclass(frozen=True)
class Problems:
    """The pruning problem of each layer under one method.

    Attributes:
        factors: of all layers.
        method: which curvature they give.
        damping: of the factors.
    """

    factors: Factors
    method: Method
    damping: Damping

    def __call__(self, layer: Layer) -> tuple[Tensor, Curvature, list[DampingRecord]]:
        """W [out, in] in float32, its curvature, and what damping that took."""
        operator, records = self.factors.layers[layer.name].operator(self.method, self.damping, where=layer.name)
        return layer.weight.to(torch.float32), operator, records


def loss_curves(
    layers: Sequence[Layer],
    factors: Factors,
    *,
    method: Method = "kfac",
    damping: Damping | None = None,
    quiet: bool = True,
) -> dict[str, LossCurve]:
    """The predicted loss of every layer against its sparsity, by the fast variant of the real solver.

    They serve plans at any sparsity. Arguments as ``make_plan``.
    """
    problems, curves = Problems(factors, method, damping or Damping()), {}
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
            weight, operator, records = problems(layer)
            solution = solve(weight, operator, Unstructured(chosen))
            loss = solution.loss
            if probe is not None:
                made = _planned(layer, problems, weight, operator, solution, records, None)
                factor[layer.name] = probe.factor(layer, made)
                loss *= factor[layer.name]
            corrected[layer.name] = curves[layer.name].corrected(chosen, loss)
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


def _planned(
    layer: Layer,
    problems: Problems,
    weight: Tensor,
    operator: Curvature,
    solution: Solution,
    records: Sequence[DampingRecord],
    pattern: NM | None,
) -> PlannedLayer:
    """Solution to plan: rounded to the model's dtype, bias compensated where the method compensates, loss predicted."""
    statistics = problems.factors.layers[layer.name]
    rounded = solution.weight.to(layer.weight.dtype)
    change = rounded.to(weight.dtype) - weight
    bias = layer.bias
    shift = torch.zeros_like(weight[:, 0])
    if bias is not None and problems.method in ("kfac", "layerwise"):
        shift = statistics.bias_update(change)
        bias = (bias.to(weight.dtype) + shift).to(bias.dtype)
    fisher = operator  # the unit of every prediction, whatever the method pruned by
    if problems.method != "kfac":
        fisher, _ = statistics.operator("kfac", problems.damping, where=layer.name)
    return PlannedLayer(
        name=layer.name,
        weight=rounded,
        bias=bias,
        mask=solution.mask,
        predicted=quadratic_loss(fisher, change) + statistics.bias_loss(change, shift),
        kkt=solution.kkt,
        damping=tuple(records),
        groups_fit=pattern is None or layer.shape[1] % pattern.m == 0,
    )


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
