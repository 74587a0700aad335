"""Wanda: weight magnitude times the norm of its input, compared within rows (Sun et al. 2024). No weight moves."""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_prune.obs import Pattern, Unstructured


def wanda(weight: Tensor, a: Tensor, pattern: Pattern) -> Tensor:
    """The mask [out, in] (True = kept) of the largest scores ``|W_ij| ‖a_j‖₂``, with ``‖a_j‖₂² ∝ A_jj`` (eq. 1).

    An unstructured sparsity is reached in every row: scores of different rows do not compare.

    Args:
        weight: W [out, in].
        a: A [in, in], uncentred second moment of the inputs.
        pattern: feasible masks.
    """
    scores = weight.abs() * a.diagonal().sqrt()
    if not isinstance(pattern, Unstructured):
        return pattern.project(scores)
    width = weight.shape[1]
    keep = max(width - round(pattern.sparsity * width), 1)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter_(1, scores.topk(keep, dim=1, sorted=False).indices, True)
