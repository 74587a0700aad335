"""Further shots at a sparse model: curvature anew, the gradient as a linear term, masks and weights chosen again.

After the first shot the model is no minimum of the KL to the dense one, and the curvature is another there. A shot
minimises ``s ⟨g, D⟩ + ½⟨D, H D⟩`` over changes D that leave the pattern intact: g is the gradient of the KL at the
pruned model, H = G ⊗ A its Fisher there, and the step s ≤ 1 shortens the Newton step to where the quadratic holds. By
completing the square this is the Optimal Brain Surgeon's problem with ``W − s H⁻¹ g`` for the weights
(``newton_point``). The linear term is WoodTaylor's (Singh & Alistarh 2020, §5); shots with the K-FAC curvature
estimated anew are LLM Surgeon's (van der Ouderaa et al. 2024), who raise the sparsity from shot to shot and take no
gradient term, but train low-rank corrections in between. Here the first shot has the final sparsity and the others
correct it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kfac_prune import ranks
from kfac_prune.config import Recipe
from kfac_prune.curvature.estimate import estimate_factors, frozen
from kfac_prune.curvature.factors import KnownFactors, LayerFactors
from kfac_prune.data import Windows, held_out
from kfac_prune.fisher import FisherType
from kfac_prune.models import Layer, only_trained, owners
from kfac_prune.objective import CAUSAL, Objective
from kfac_prune.obs import Pattern, Unstructured, newton_point, solve
from kfac_prune.operators import Damping, Kronecker
from kfac_prune.plan import Plan
from kfac_prune.problems import PlannedLayer, solved
from kfac_prune.progress import progress
from kfac_prune.quality import evaluate

#: Where the recipe leaves them open: shots of a plan that is predicted to lose more than so many nats per unit of the
#: objective, from so many windows on, unless a reconstruction follows, which ends at the same loss without them.
SHOTS, LARGE_LOSS, LEAST_WINDOWS = 3, 0.05, 16
#: Fractions of the Newton step that are tried in turn, on so many windows, until one is worse than the best by
#: ``SLACK``.
STEPS, SEARCH_WINDOWS, SLACK = (0.01, 0.03, 0.1, 0.3), 16, 0.02


@dataclass(frozen=True)
class Correction:
    """What one shot after the first did.

    Attributes:
        step: fraction of the Newton step that was kept; 0 where none helped, and all is as before.
        before: held-out KL to the dense model, nats per unit of the objective.
        after: the same with the weights that were kept; never more.
    """

    step: float
    before: float
    after: float


@dataclass(frozen=True)
class Gradient:
    """Of the mean KL, by one layer's parameters: weight [out, in] and bias [out] or None; float32."""

    weight: Tensor
    bias: Tensor | None


def shots_of(recipe: Recipe, predicted: float) -> int:
    """How many shots a sparse model gets: those asked for, or by the rule of ``SHOTS``.

    Args:
        recipe: resolved.
        predicted: loss of the plan, nats per unit of the objective.
    """
    if recipe.shots is not None:
        return recipe.shots
    large = predicted > LARGE_LOSS and recipe.samples >= LEAST_WINDOWS
    whole = not recipe.offload and recipe.max_memory is None
    ours = recipe.method == "kfac" and not recipe.reconstruct and whole
    return SHOTS if ours and large else 1


def correct(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    plan: Plan,
    windows: Windows,
    dense: Callable[[], AbstractContextManager[None]],
    corrections: int,
    *,
    pattern: Pattern | None = None,
    damping: Damping | None = None,
    objective: Objective = CAUSAL,
    fisher: FisherType = "sampled",
    seed: int = 0,
    batch_size: int = 4,
    quiet: bool = True,
) -> tuple[Plan, list[Correction]]:
    """Correct a pruned model in place, by so many shots, as long as the held-out windows find it better.

    Args:
        model: pruned by the plan.
        layers: that the plan holds.
        plan: as applied; every layer keeps its number of weights.
        windows: calibration tokens [N, T]; of fewer than two none can be held out, and nothing is done.
        dense: a context in which the model has its dense weights (``WeightSwap.swapped_in``).
        corrections: shots after the first.
        pattern: an n:m pattern, or None. Masks are chosen anew within it, but for layers that the plan leaves dense,
            whose weights only move.
        damping: of both factors; None is ``Damping()``.
        objective: what the model computes.
        fisher: as ``estimate_factors``.
        seed: of the labels of the first shot; every other one has its own.
        batch_size: windows per pass.
        quiet: show no progress bar.

    Returns:
        The plan with the new weights and masks, and what happened in each shot; after one that helps nowhere no other
        is tried.
    """
    records: list[Correction] = []
    if corrections < 1 or len(windows) < 2:
        return plan, records
    fit, held = windows.split(held_out(len(windows)))
    few = fit.split(SEARCH_WINDOWS)[1] if len(fit) > SEARCH_WINDOWS else fit
    options: Any = {"objective": objective, "batch_size": batch_size}

    def kl(text: Windows) -> float:
        found = evaluate(model, text, dense=dense, **options).kl
        assert found is not None
        return found

    def shot(labels: int) -> tuple[float, list[PlannedLayer]]:
        """The step taken and the layers after it; the curvature, which fills the memory, is gone at its end."""
        factors = estimate_factors(model, layers, fit, fisher=fisher, seed=labels, **options)
        gradients = kl_gradient(model, layers, fit, dense, **options)
        problems = [  # those that this process solves; an expert that the pruned model sends no token to stays
            _Problem(layer, factors.layers[layer.name], gradient, damping or Damping())
            if process == ranks.index() and layer.name in factors.layers
            else None
            for layer, gradient, process in zip(layers, gradients, owners(layers), strict=True)
        ]
        return _searched(layers, problems, present, pattern, lambda: kl(few))

    present = list(plan.layers)
    by_name = {layer.name: layer for layer in layers}
    layers = [by_name[planned.name] for planned in present]
    best = kl(held)
    for number in progress(range(1, corrections + 1), desc="shots", unit="shot", disable=quiet):
        step, moved = shot(seed + number)
        _assign(layers, moved)
        after = kl(held) if step else best
        better = after < best
        records.append(Correction(step if better else 0.0, best, after if better else best))
        if not better:
            _assign(layers, present)
            break
        present, best = moved, after
    return replace(plan, layers=tuple(present)), records


def kl_gradient(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    windows: Windows,
    dense: Callable[[], AbstractContextManager[None]],
    *,
    objective: Objective = CAUSAL,
    batch_size: int = 4,
) -> list[Gradient]:
    """The gradient of the mean KL(dense‖model) over all units, by every layer's weight and bias. See ``correct``."""
    parameters = [p for layer in layers for p in layer.parameters()]
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    units = 0
    with frozen(model), only_trained(model, parameters):
        for batch in ranks.share(list(windows.batches(batch_size))):
            ids, mask = batch.on(model.device)
            with torch.no_grad(), dense():
                p = objective.compared(objective.output(model, ids, mask), mask)
            q = objective.compared(objective.output(model, ids, mask), mask)
            divergence = objective.divergence(p, q).sum()
            # an idle expert has no gradient
            found = torch.autograd.grad(divergence, parameters, allow_unused=True, materialize_grads=True)
            for total, gradient in zip(sums, found, strict=True):
                total += gradient
            units += len(q)
    everywhere = sum(ranks.gathered(units))
    means = iter([total / max(everywhere, 1) for total in ranks.summed(*sums)])
    return [
        Gradient(layer.stored(next(means)), next(means) if len(layer.parameters()) > 1 else None) for layer in layers
    ]


class _Problem:
    """One layer at the pruned model: its curvature and Newton step, whatever fraction of it is taken.

    A bias is eliminated exactly, as in ``LayerFactors.operator``. With m = E[a] the quadratic in its change δ is
    ``⟨g_b, δ⟩ + ½ (D m + δ)ᵀ G (D m + δ)``, least at ``δ = −D m − G⁻¹ g_b``, which leaves ``⟨g − g_b mᵀ, D⟩``. Damped
    factors are made anew for every fraction, since those of all layers would take as much memory again.
    """

    def __init__(self, layer: Layer, statistics: LayerFactors, gradient: Gradient, damping: Damping) -> None:
        self._layer, self._statistics, self._damping = layer.name, statistics, damping
        self._weight, self._bias = layer.weight, layer.bias  # whose place others take
        curvature, records = statistics.operator("kfac", damping, where=layer.name)
        assert isinstance(curvature, Kronecker)
        assert curvature.g is not None
        self._known = KnownFactors(records, curvature.inverse_diagonals)
        slope, self._bias_step = gradient.weight, None
        if gradient.bias is not None:
            slope = slope - torch.outer(gradient.bias, statistics.mean.to(slope))
            self._bias_step = -torch.linalg.solve(curvature.g, gradient.bias)
        weight = self._weight.float()
        self._step = newton_point(weight, curvature, slope) - weight

    def solve(self, fraction: float, planned: PlannedLayer, pattern: Pattern | None) -> PlannedLayer:
        """Mask, weights and bias after a fraction of the step; as many weights as before."""
        if pattern is None or planned.mask.all():  # a layer that the plan leaves dense stays dense
            pattern = Unstructured(planned.sparsity)
        curvature, _ = self._statistics.operator("kfac", self._damping, where=self._layer, known=self._known)
        before = self._weight.float()
        solution = solve(before + fraction * self._step, curvature, pattern)
        weight, bias = solution.weight.to(self._weight.dtype), self._bias
        if bias is not None:
            assert self._bias_step is not None
            shift = self._statistics.bias_update(weight.float() - before) + fraction * self._bias_step
            bias = (bias.float() + shift).to(bias.dtype)
        return replace(planned, weight=weight, bias=bias, mask=solution.mask)


def _searched(
    layers: Sequence[Layer],
    problems: Sequence[_Problem | None],
    present: list[PlannedLayer],
    pattern: Pattern | None,
    kl: Callable[[], float],
) -> tuple[float, list[PlannedLayer]]:
    """The best fraction of the Newton step and its layers; 0 and the present ones where none is better."""
    least, best, kept = kl(), 0.0, present

    def stepped(number: int, fraction: float) -> PlannedLayer:
        problem = problems[number]
        return present[number] if problem is None else problem.solve(fraction, present[number], pattern)

    for fraction in STEPS:
        moved = solved(layers, partial(stepped, fraction=fraction), label="solve")
        _assign(layers, moved)
        found = kl()
        if found < least:
            least, best, kept = found, fraction, moved
        elif not found <= (1 + SLACK) * least:
            break
    return best, kept


def _assign(layers: Sequence[Layer], planned: Sequence[PlannedLayer]) -> None:
    for layer, made in zip(layers, planned, strict=True):
        layer.assign(made.weight, made.bias)
