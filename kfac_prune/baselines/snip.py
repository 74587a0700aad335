"""SNIP (Lee et al. 2019): single-shot pruning of an untrained network by the sensitivity of its connections."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kfac_prune.baselines.training import prunable_parameters, restore, snapshot
from kfac_prune.errors import InputError
from kfac_prune.obs import Unstructured, project_together


def snip(module: nn.Module, loss: Callable[[], Tensor], sparsity: float) -> dict[str, Tensor]:
    """The masks of the largest ``|∂L/∂c_q| = |w_q ∂L/∂w_q|``, c a gate of one on every weight (eq. 5).

    All weights compete. The sensitivities are those of one loss on one batch, which should hold some examples of every
    class. Nothing in the module changes: neither its parameters and their gradients nor its buffers.

    Args:
        module: as initialised.
        loss: the scalar loss of the module on a batch.
        sparsity: fraction of the parameters with two dimensions or more to remove, in [0, 1).

    Returns:
        By parameter name, True = kept (see ``apply_masks``, ``masked_training``).

    Raises:
        InputError: a sensitivity is not finite, or all are zero.
    """
    weights, before = prunable_parameters(module), snapshot(module)
    with torch.enable_grad():
        gradients = torch.autograd.grad(loss(), list(weights.values()), allow_unused=True)
    restore(module, before)  # the forward pass may have moved running statistics
    scores = {
        name: torch.zeros_like(w) if g is None else (w.detach() * g).abs()
        for (name, w), g in zip(weights.items(), gradients, strict=True)
    }
    total = sum(float(score.double().sum()) for score in scores.values())
    if not 0 < total < float("inf"):
        raise InputError(f"the sensitivities of the weights sum to {total}; check the loss and the batch")
    return project_together(Unstructured(sparsity), scores)
