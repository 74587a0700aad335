"""Loss curves: what every layer is predicted to lose at any sparsity, at a fraction of the cost of solving it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from kfac_prune import ranks
from kfac_prune.allocate import LossCurve
from kfac_prune.curvature.factors import Factors
from kfac_prune.models import Layer, owners
from kfac_prune.obs import FAST, Unstructured, saliency, solve
from kfac_prune.operators import Curvature, Damping, Kronecker
from kfac_prune.problems import Problems
from kfac_prune.progress import progress
from kfac_prune.store import Journal

#: Fractions of a layer's weights, of those that are not zero yet, at whose removal its loss curve is computed.
CURVE_POINTS = (0.3, 0.5, 0.7, 0.9)
#: Of every dimension so many rows (columns) are solved: half of them, but at least and at most so many.
SAMPLED = (64, 512)


def loss_curves(
    layers: Sequence[Layer],
    factors: Factors,
    *,
    damping: Damping | None = None,
    journal: Journal | None = None,
    quiet: bool = True,
) -> dict[str, LossCurve]:
    """The predicted loss of every layer against its sparsity, under G ⊗ A. See ``sampled_losses``.

    They serve plans at any sparsity. Several processes share the layers out. Arguments as ``make_plan``.
    """
    return curves_of(layers, Problems(factors, "kfac", damping or Damping()), journal=journal, quiet=quiet)


def curves_of(
    layers: Sequence[Layer], problems: Problems, *, journal: Journal | None = None, quiet: bool = True
) -> dict[str, LossCurve]:
    """``loss_curves`` of problems whose method is K-FAC."""
    found = {}
    mine = [layer for layer, process in zip(layers, owners(layers), strict=True) if process == ranks.index()]
    for layer in progress(mine, desc="loss curves", unit="layer", disable=quiet):
        size, zeros = layer.weight.numel(), zeros_of(layer.weight)
        if zeros == 1:
            found[layer.name] = LossCurve(dict.fromkeys(CURVE_POINTS, 0.0), size, zeros)
            continue
        finished = None if journal is None else journal.read(f"curve {layer.name}")
        if finished is None:
            weight, operator, _ = problems(layer)
            assert isinstance(operator, Kronecker)
            losses = sampled_losses(weight, operator)
            if journal is not None:
                journal.write(f"curve {layer.name}", {}, {"losses": losses})
        else:
            losses = finished[1]["losses"]
        found[layer.name] = LossCurve(dict(zip(sparsities(zeros), losses, strict=True)), size, zeros)
    everything = {name: curve for part in ranks.gathered(found) for name, curve in part.items()}
    return {layer.name: everything[layer.name] for layer in layers}


def sampled_losses(weight: Tensor, curvature: Kronecker) -> list[float]:
    """Predicted losses at ``CURVE_POINTS`` of the weights that are not zero, of which there is at least one.

    The least saliencies of a layer add up to what removing them would cost if each weight were the only one: too little
    or too much by a factor that grows slowly with the sparsity. That factor is taken from some of the rows and columns,
    where the problem is solved by the fast variant of the real solver: with m of n of both it costs (m/n)³ of the
    whole. At m = n/2 the curves of real layers are too low by 4 to 12 % in common and 4 to 7 % from layer to layer,
    and masks allocated by them lose what those from solving whole layers do.

    Args:
        weight: [out, in].
        curvature: of the same shape.
    """
    rows, columns = (_some(width, weight.device) for width in weight.shape)
    part, under = weight[rows][:, columns].contiguous(), curvature.restricted(rows, columns)
    wanted = sparsities(zeros_of(weight))
    if part.shape == weight.shape:
        return [solve(weight, curvature, Unstructured(s), FAST).loss for s in wanted]
    losses, wanted_of_part = [], sparsities(zeros_of(part))
    alone = zip(_least(weight, curvature, wanted), _least(part, under, wanted_of_part), strict=True)
    for s, (whole, some) in zip(wanted_of_part, alone, strict=True):
        ratio = solve(part, under, Unstructured(s), FAST).loss / some if some > 0 else 1.0
        losses.append(whole * ratio)
    return losses


def zeros_of(weight: Tensor) -> float:
    """The fraction of the weights that is zero."""
    return 1 - int(weight.count_nonzero()) / weight.numel()


def sparsities(zeros: float) -> list[float]:
    """Of a layer at its ``CURVE_POINTS``, where a fraction of it is zero already."""
    return [zeros + (1 - zeros) * point for point in CURVE_POINTS]


def sampled(width: int) -> int:
    """How many of so many rows or columns are solved."""
    least, most = SAMPLED
    return min(max(width // 2, least), most, width)


def _some(width: int, device: torch.device) -> Tensor:
    """Numbers of the rows or columns that stand for all, in order; the same for every layer of that width."""
    order = torch.randperm(width, generator=torch.Generator().manual_seed(0))
    return order[: sampled(width)].sort().values.to(device)


def _least(weight: Tensor, curvature: Curvature, wanted: Sequence[float]) -> list[float]:
    """Sum of the least saliencies up to each sparsity."""
    ordered = saliency(weight, curvature).reshape(-1).sort().values
    counts = [round(s * len(ordered)) for s in wanted]
    return list(accumulate(float(ordered[a:b].sum(dtype=torch.float64)) for a, b in pairwise([0, *counts])))
