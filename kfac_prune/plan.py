"""The plan of a run: how sparse every layer becomes, with which weights, and what that is predicted to cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kfac_prune import ranks
from kfac_prune.allocate import LossCurve, allocate, least_subset
from kfac_prune.baselines import llm_surgeon, owl
from kfac_prune.config import ALLOCATIONS
from kfac_prune.curvature.factors import Factors
from kfac_prune.curvature.sequences import STATISTICS, SequenceFisher
from kfac_prune.curves import curves_of
from kfac_prune.errors import InputError
from kfac_prune.linalg import kth_largest
from kfac_prune.models import Layer, WeightSwap
from kfac_prune.obs import FAST, NM, saliency
from kfac_prune.operators import Damping
from kfac_prune.probe import Probe
from kfac_prune.problems import PlannedLayer, Problems, PruningMethod
from kfac_prune.store import Journal


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

    def without_weights(self) -> Plan:
        """Masks and figures: what there is to know of it once a model has its weights."""
        layers = [replace(layer, weight=layer.weight.new_empty(0), bias=None) for layer in self.layers]
        return replace(self, layers=tuple(layers))

    def table(self, unit: str = "token") -> str:
        """Layer by layer: shape, sparsity, predicted loss per unit of the objective, as aligned text."""
        width = max(len("total"), *(len(layer.name) for layer in self.layers))
        lines = [f"{'layer':{width}}  {'out x in':>13}  sparsity  predicted loss (nats/{unit})"]
        for layer in self.layers:
            shape = f"{layer.mask.shape[0]} x {layer.mask.shape[1]}"
            notes = [f"damping of {r.factor} raised to {r.relative:g}" for r in layer.damping if r.raised]
            notes += [] if layer.groups_fit else ["width is no multiple of m, its last group is shorter"]
            if (few := layer.few) is not None:
                shrunk = f"A and G shrunk by {few.shrinkage_a:.2f} and {few.shrinkage_g:.2f}"
                notes.append(f"{few.tokens:,} tokens, {few.share:.1%}; {shrunk}")
            note = f"  ({'; '.join(notes)})" if notes else ""
            lines.append(f"{layer.name:{width}}  {shape:>13}  {layer.sparsity:8.1%}  {layer.predicted:.6f}{note}")
        weights = sum(layer.mask.numel() for layer in self.layers)
        lines.append(f"{'total':{width}}  {f'{weights:,}':>13}  {self.sparsity:8.1%}  {self.predicted:.6f}")
        return "\n".join(lines)


def experts_told(plan: Plan, idle: Sequence[str]) -> str:
    """How many tokens the experts saw, and which of them none; empty where there are no experts.

    Args:
        plan: of all layers with curvature.
        idle: names of the experts' layers that saw no token and stay dense.
    """
    lines = []
    if few := [layer.few for layer in plan.layers if layer.few is not None]:
        counts = sorted(one.tokens for one in few)
        a, g = (sorted(x) for x in zip(*((one.shrinkage_a, one.shrinkage_g) for one in few), strict=True))
        lines.append(
            f"{len(few)} layers of experts saw {counts[0]:,} to {counts[-1]:,} tokens (median "
            f"{counts[len(few) // 2]:,}); their factors are shrunk towards the identity, A by "
            f"{a[0]:.2f} to {a[-1]:.2f}, G by {g[0]:.2f} to {g[-1]:.2f}"
        )
    if idle:
        lines.append(f"left dense, since no token of the calibration text was routed to them: {', '.join(idle)}")
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
    estimate: Callable[[], Factors] | None = None,
    sequences: SequenceFisher | None = None,
    journal: Journal | None = None,
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
        allocation: "curves", "uniform", "global" or "owl" (see ``Recipe``); ignored where a pattern leaves no choice.
        damping: of the factors; None is ``Damping()``.
        curves: from ``loss_curves``, for allocation "curves"; None computes them.
        probe: measures pruned layers, to correct the predictions and with them what is chosen by "curves"; None trusts
            the predictions as they are.
        estimate: gives the factors of the model as it is at that moment, for methods that prune it in several shots;
            it is dense again afterwards.
        sequences: the curvatures of ``method`` "ek-fac", "woodfisher" or "m-fac".
        journal: has the curve and the solution of every layer that is finished, and the allocation, from which an
            interrupted run goes on.
        quiet: show no progress bars.
    """
    missing = [layer.name for layer in layers if layer.name not in factors.layers]
    if missing:
        raise InputError(f"no curvature was estimated for layer {missing[0]} ({len(missing)} layers in all)")
    if method in STATISTICS and (sequences is None or sequences.method != method):
        raise InputError(
            f"method {method} needs the gradients of whole sequences; give make_plan a SequenceFisher "
            "(kfac_prune.curvature.sequences) for it"
        )
    if method in ("kfac", "obd", "layerwise"):
        _check_live(layers, factors, with_g=method != "layerwise")
    problems = Problems(factors, method, damping or Damping(), sequences)
    if sparsity is None:
        sparsity = 0.5 if pattern is None else float(pattern.sparsity)
    if not 0 <= sparsity < 1:
        raise InputError(f"sparsity is {sparsity}; it must be at least 0 and below 1")
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
    if method == "llm-surgeon":
        planned = _in_shots(layers, problems, sparsity, pattern, allocation, estimate)
    else:
        if pattern is not None or allocation == "uniform" or sparsity == 0:
            sparsities = dict.fromkeys((layer.name for layer in layers), sparsity)
        elif allocation == "owl":
            sparsities = _by_outliers(layers, factors, sparsity)
        elif allocation == "global":
            sparsities = _global_threshold(layers, problems, sparsity)
        else:
            known = ranks.told(None if journal is None else journal.read("allocation"))
            if known is None:
                curves = curves or curves_of(layers, problems, journal=journal, quiet=quiet)
                sparsities, factor = _by_curves(layers, problems, sparsity, curves, probe, quiet)
                if journal is not None and ranks.leads():
                    journal.write("allocation", {}, {"sparsities": sparsities, "factor": factor})
            else:
                sparsities, factor = known[1]["sparsities"], known[1]["factor"]
        planned = problems.solve_all(layers, pattern, sparsities, label="solve", journal=journal, quiet=quiet)
    if probe is not None and not factor:
        factor = probe.factors(layers, planned, together=target is None, quiet=quiet)
    planned = [replace(made, predicted=made.predicted * factor.get(made.name, 1.0)) for made in planned]
    if target is not None:
        planned = _cheapest(layers, planned, target)
    return Plan(tuple(planned), method, allocation)


def _check_live(layers: Sequence[Layer], factors: Factors, *, with_g: bool) -> None:
    """Text enters every layer and, where G counts, a gradient reaches what it puts out."""
    dead = []
    for layer in layers:
        known = factors.layers[layer.name]
        if known.a.trace() == 0 or (with_g and known.g.trace() == 0):
            dead.append(layer.name)
    if dead:
        raise InputError(
            f"{len(dead)} of {len(layers)} layers see only zeros, or no gradient, on the calibration text (blocks that "
            f"add nothing?), so no loss can be predicted for them; leave them out with --ignore {' '.join(dead)}"
        )


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
    chosen = [layer for layer in layers if first[layer.name] > 0]
    planned = problems.solve_all(chosen, None, first, label="refine curves", schedule=FAST, quiet=quiet)
    factor = dict.fromkeys(first, 1.0) if probe is None else probe.factors(chosen, planned, quiet=quiet)
    corrected = dict(curves)
    for made in planned:
        point, measured = first[made.name], made.predicted * factor[made.name]
        corrected[made.name] = curves[made.name].corrected(point, measured)
    return allocate(corrected, sparsity), factor


def _global_threshold(layers: Sequence[Layer], problems: Problems, sparsity: float) -> dict[str, float]:
    """The sparsities that one threshold on the single-weight saliencies of all layers gives."""
    scores = {}
    for layer in layers:
        weight, operator, _ = problems(layer)
        scores[layer.name] = saliency(weight, operator).reshape(-1).cpu()  # a number per weight of the model
    everything = torch.cat(list(scores.values()))
    keep = max(everything.numel() - round(sparsity * everything.numel()), 1)
    threshold = kth_largest(everything, keep)
    below = {name: int((s < threshold).sum()) for name, s in scores.items()}
    equal = {name: int((s == threshold).sum()) for name, s in scores.items()}
    share = (everything.numel() - keep - sum(below.values())) / sum(equal.values())  # of those at the threshold
    most = 1 - 1e-6  # every layer keeps at least one weight
    return {name: min((below[name] + share * equal[name]) / s.numel(), most) for name, s in scores.items()}


def _in_shots(
    layers: Sequence[Layer],
    problems: Problems,
    sparsity: float,
    pattern: NM | None,
    allocation: str,
    estimate: Callable[[], Factors] | None,
) -> list[PlannedLayer]:
    """What LLM Surgeon makes of the model, which is dense again afterwards."""
    if estimate is None:
        raise InputError("method llm-surgeon estimates the curvature anew for every shot; give make_plan an estimate")
    dense = WeightSwap(layers)
    try:
        together = allocation == "global"
        masks = llm_surgeon(layers, estimate, sparsity=sparsity, pattern=pattern, together=together)
        pruned = [(layer.weight, layer.bias) for layer in layers]
    finally:
        dense.restore()
    made = []
    for layer, (weight, bias) in zip(layers, pruned, strict=True):
        shift = torch.zeros_like(weight[:, 0]) if bias is None or layer.bias is None else bias - layer.bias
        planned = problems.priced(layer, weight.float(), masks[layer.name], shift.float())
        made.append(replace(planned, groups_fit=pattern is None or layer.shape[1] % pattern.m == 0))
    return made


def _by_outliers(layers: Sequence[Layer], factors: Factors, sparsity: float) -> dict[str, float]:
    """Sparsities by OWL; a layer outside all blocks is a block of its own."""
    blocks: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for layer in layers:
        block = next((name for name in factors.streams if layer.name.startswith(f"{name}.")), layer.name)
        squares = factors.layers[layer.name].a.diagonal().clone()
        blocks.setdefault(block, {})[layer.name] = layer.weight.to(squares.device), squares
    return owl(blocks, sparsity)


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
    return [
        made if pruned else replace(_dense(layer), few=made.few)
        for layer, made, pruned in zip(layers, planned, taken, strict=True)
    ]


def _dense(layer: Layer) -> PlannedLayer:
    """A layer that stays as it is."""
    mask = torch.ones_like(layer.weight, dtype=torch.bool)
    return PlannedLayer(layer.name, layer.weight.clone(), layer.bias, mask, predicted=0.0, kkt=None, damping=())


def prune(layers: Sequence[Layer], plan: Plan) -> WeightSwap:
    """Put a plan's weights into the model: its parameters take over the plan's tensors.

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
