"""Soft pruning: training under an L1 penalty drives weights towards zero (Tibshirani 1996; Han et al. 2015)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kfac_prune.baselines.training import prunable_parameters
from kfac_prune.obs import Unstructured, project_together


def soft_pruning(
    module: nn.Module, train: Callable[[Callable[[], Tensor]], object], sparsity: float, *, strength: float
) -> dict[str, Tensor]:
    """Train with ``L + strength · Σ |w|``, then keep the weights that are largest in magnitude, over all parameters.

    The module stays as trained: apply the masks, and train on without the penalty (``masked_training``), which takes
    back the shrinkage of the weights that stay.

    Args:
        module: to train.
        train: trains the module in place, adding the penalty that it is given to its loss at every step.
        sparsity: fraction of the parameters with two dimensions or more to remove, in [0, 1).
        strength: of the penalty, at least 0, in units of the loss per unit of weight.

    Returns:
        By parameter name, True = kept.
    """
    weights = prunable_parameters(module)
    train(lambda: strength * torch.stack([w.abs().sum() for w in weights.values()]).sum())
    trained = prunable_parameters(module)
    return project_together(Unstructured(sparsity), {name: w.detach().abs() for name, w in trained.items()})
