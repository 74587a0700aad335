"""Loss curves: what every layer is predicted to lose at any sparsity, at a fraction of the cost of solving it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from kfac_prune import ranks
from kfac_prune.allocate import LossCurve
from kfac_prune.curvature.factors import Factors
from kfac_prune.models import Layer
from kfac_prune.obs import FAST, Unstructured, saliency, solve
from kfac_prune.operators import Curvature, Damping, Kronecker
from kfac_prune.problems import Problems, owners
from kfac_prune.progress import progress
from kfac_prune.store import Journal

#: Sparsities at which a layer's loss curve is computed.
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
        finished = None if journal is None else journal.read(f"curve {layer.name}")
        if finished is None:
            weight, operator, _ = problems(layer)
            assert isinstance(operator, Kronecker)
            losses = sampled_losses(weight, operator)
            if journal is not None:
                journal.write(f"curve {layer.name}", {}, {"losses": losses})
        else:
            losses = finished[1]["losses"]
        found[layer.name] = LossCurve(dict(zip(CURVE_POINTS, losses, strict=True)), layer.weight.numel())
    everything = {name: curve for part in ranks.gathered(found) for name, curve in part.items()}
    return {layer.name: everything[layer.name] for layer in layers}


def sampled_losses(weight: Tensor, curvature: Kronecker) -> list[float]:
    """Predicted losses at ``CURVE_POINTS``.

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
    if part.shape == weight.shape:
        return [solve(weight, curvature, Unstructured(s), FAST).loss for s in CURVE_POINTS]
    losses = []
    for s, alone, alone_in_part in zip(CURVE_POINTS, _least(weight, curvature), _least(part, under), strict=True):
        ratio = solve(part, under, Unstructured(s), FAST).loss / alone_in_part if alone_in_part > 0 else 1.0
        losses.append(alone * ratio)
    return losses


def sampled(width: int) -> int:
    """How many of so many rows or columns are solved."""
    least, most = SAMPLED
    return min(max(width // 2, least), most, width)


def _some(width: int, device: torch.device) -> Tensor:
    """Numbers of the rows or columns that stand for all, in order; the same for every layer of that width."""
    order = torch.randperm(width, generator=torch.Generator().manual_seed(0))
    return order[: sampled(width)].sort().values.to(device)


def _least(weight: Tensor, curvature: Curvature) -> list[float]:
    """Sum of the least saliencies up to each sparsity."""
    ordered = saliency(weight, curvature).reshape(-1).sort().values
    counts = [round(s * len(ordered)) for s in CURVE_POINTS]
    return list(accumulate(float(ordered[a:b].sum(dtype=torch.float64)) for a, b in pairwise([0, *counts])))
