"""OWL (Yin et al. 2024): blocks whose weights meet more outlying activations are pruned less."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

#: The authors' multiple of the mean from which a score is an outlier, and how far a sparsity may be from the mean.
OUTLIER, RANGE = 5.0, 0.08


def owl(blocks: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]], sparsity: float) -> dict[str, float]:
    """The sparsity of every layer, the same for all layers of a block.

    With the scores ``|W_ij| ‖a_j‖₂`` of Wanda over all layers of a block, D is the share of those above 5 times their
    mean, and ``S_l = S − λ (D_l − D̄) / max|D − D̄|`` (section 3.2: linear in D, mean S, within S ± λ, λ = 0.08). D̄ is
    weighted by the blocks' sizes, so that the whole model has sparsity S, and λ is smaller where S ± λ would leave
    (0, 1).

    Args:
        blocks: per block name, per layer name, W [out, in] and the mean squares [in] of its inputs.
        sparsity: S of all layers together, in [0, 1).

    Returns:
        By layer name.
    """
    sizes, outliers = {}, {}
    for name, layers in blocks.items():
        scores = torch.cat([(w.float().abs() * squares.sqrt()).flatten() for w, squares in layers.values()])
        sizes[name] = scores.numel()
        outliers[name] = float((scores > OUTLIER * scores.mean()).double().mean())
    mean = sum(sizes[name] * d for name, d in outliers.items()) / sum(sizes.values())
    widest = max(abs(d - mean) for d in outliers.values())
    reach = min(RANGE, sparsity, (1 - sparsity) / 2) / widest if widest > 0 else 0.0
    found = {name: max(sparsity - reach * (d - mean), 0.0) for name, d in outliers.items()}  # -1e-17 by rounding
    return {layer: found[name] for name, layers in blocks.items() for layer in layers}
