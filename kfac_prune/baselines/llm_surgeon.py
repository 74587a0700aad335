"""LLM Surgeon (van der Ouderaa et al. 2024): K-FAC saliencies, one threshold, several shots with curvature anew."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence

import torch
from torch import Tensor

from kfac_prune.curvature.factors import Factors, KnownFactors, LayerFactors
from kfac_prune.models import Layer
from kfac_prune.obs import NM, Pattern, Unstructured, compensate, project_together, saliency
from kfac_prune.operators import Damping, Kronecker

#: The authors' damping and their shots for unstructured pruning.
DAMPING, SHOTS = 0.01, 5


def llm_surgeon(
    layers: Sequence[Layer],
    estimate: Callable[[], Factors],
    *,
    sparsity: float,
    pattern: NM | None = None,
    together: bool = True,
    shots: int = SHOTS,
) -> dict[str, Tensor]:
    """Prune layers in place; the linear schedule reaches ``sparsity · t / shots`` at shot t.

    At every shot the weights that remain have the saliency ``w² / (2 [G⁻¹]_rr [A⁻¹]_cc)`` (eq. 9), the smallest over
    all layers fall, and the others take the correlated update ``δ = −H⁻¹ Eᵀ (E H⁻¹ Eᵀ)⁻¹ E w`` (eq. 10), H = G ⊗ A.
    It is the exact joint update of all that fall in a layer, by conjugate gradients, where the authors' code takes
    weights as correlated only within a part of it. The Fisher is whichever ``estimate`` gives (the authors' is the
    empirical one); their low-rank first-order correction is left out.

    Where weights fall within groups of m, shot t keeps ``m − (m − n) t / shots`` of each, in at most m − n shots.

    Args:
        layers: of the model; their weights and biases are replaced.
        estimate: gives the factors of the model as it is now.
        sparsity: to reach, in [0, 1); ignored with a pattern.
        pattern: n:m, or None.
        together: one threshold for all layers; else each reaches the sparsity.
        shots: at least 1.

    Returns:
        The masks [out, in] by layer name, True = kept.
    """
    damping = Damping(DAMPING)
    masks = {layer.name: torch.ones_like(layer.weight, dtype=torch.bool) for layer in layers}
    if pattern is not None:
        shots = min(shots, pattern.m - pattern.n)
    factors: MutableMapping[str, LayerFactors] = {}
    for shot in range(1, shots + 1):
        before, factors = factors, estimate().layers
        for name in before.keys() - factors.keys():  # an expert that the pruned model sends no token to
            factors[name] = before[name]
        known, scores = {}, {}
        for layer in layers:
            operator, records = factors[layer.name].operator("kfac", damping, where=layer.name)
            assert isinstance(operator, Kronecker)
            found = saliency(layer.weight.to(torch.float32), operator)
            known[layer.name] = KnownFactors(records, operator.inverse_diagonals)
            scores[layer.name] = found.masked_fill(~masks[layer.name], -1.0)  # what has fallen falls first
        due: Pattern = Unstructured(sparsity * shot / shots)
        if pattern is not None:
            due = NM(pattern.m - round((pattern.m - pattern.n) * shot / shots), pattern.m)
        if together and pattern is None:
            chosen = project_together(due, scores)
        else:
            chosen = {name: due.project(score) for name, score in scores.items()}
        for layer in layers:
            mask = masks[layer.name] = masks[layer.name] & chosen[layer.name]
            weight, statistics = layer.weight.to(torch.float32), factors[layer.name]
            operator, _ = statistics.operator("kfac", damping, where=layer.name, known=known[layer.name])
            new = compensate(weight, operator, mask).weight
            shift = None if layer.bias is None else layer.bias + statistics.bias_update(new - weight)
            layer.assign(new, shift)
    return masks
