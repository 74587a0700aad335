"""Lottery tickets (Frankle & Carbin 2019): train, remove the smallest weights, rewind the others, again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kfac_prune.baselines.training import apply_masks, masked_training, prunable_parameters, restore, snapshot
from kfac_prune.obs import Unstructured, project_together


def lottery_ticket(
    module: nn.Module, train: Callable[[], object], sparsity: float, *, rounds: int = 5, together: bool = True
) -> dict[str, Tensor]:
    """Find a ticket by iterative magnitude pruning with rewinding (section 1, "Identifying winning tickets").

    Every round begins with the module as it was at the call, masked; trains it; and removes the same fraction
    ``1 − (1 − sparsity)^(1/rounds)`` of the weights that are left, those of smallest trained magnitude. Whoever rewinds
    to an early step instead of to the initialisation (Frankle et al. 2020) trains to that step before the call.

    Args:
        module: as initialised; afterwards it is the ticket: every parameter and buffer has exactly the value that it
            had at the call, but weights off the mask are zero.
        train: trains the module in place, with an optimizer that it makes itself; gradients are masked meanwhile.
        sparsity: fraction of the parameters with two dimensions or more to remove, in [0, 1).
        rounds: of training, at least 1; one is one-shot magnitude pruning with rewinding.
        together: compare magnitudes over all parameters; else every parameter loses the same fraction, as in the
            paper's small networks.

    Returns:
        By parameter name, True = kept.

    Raises:
        InputError: the training moved pruned weights (see ``masked_training``).
    """
    initial = snapshot(module)
    masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in prunable_parameters(module).items()}
    for number in range(1, rounds + 1):
        restore(module, initial)
        with masked_training(module, masks):
            train()
        due = Unstructured(1 - (1 - sparsity) ** (number / rounds))
        scores = {
            name: w.detach().abs().masked_fill(~masks[name], -1.0)  # what has fallen stays fallen
            for name, w in prunable_parameters(module).items()
        }
        if together:
            masks = project_together(due, scores)
        else:
            masks = {name: due.project(score.flatten(1)).view_as(score) for name, score in scores.items()}
    restore(module, initial)
    apply_masks(module, masks)
    return masks
