"""Every rule of pruning along the whole sparsity axis, on one network, with what each predicts and what is true."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_prune.linalg import shifted
from kfac_prune.obs import Unstructured, compensate, newton_decrease, newton_point, saliency, solve, surgeon
from kfac_prune.operators import (
    BlockDiagonal,
    Curvature,
    Dense,
    Diagonal,
    DirectSum,
    EigenKronecker,
    LowRank,
    ScaledIdentity,
    quadratic_loss,
)
from kfac_prune.theory.network import FisherSamples, Network, fisher_samples, sampled_gradients

#: From the coarsest curvature to the full one, and how pictures call them.
NAMES = {
    "magnitude": "magnitude (H = I)",
    "obd": "OBD (diagonal)",
    "layerwise": "layer-wise (I ⊗ A)",
    "lowrank": "M-FAC (low rank)",
    "block": "WoodFisher (blocks)",
    "kfac": "K-FAC (G ⊗ A)",
    "ekfac": "EK-FAC",
    "exact": "exact OBS (full H)",
}
BLOCK, GRADIENTS = 32, 128
#: Compensated to convergence: these problems are small.
TOLERANCE, ITERATIONS = 1e-9, 1000


@dataclass(frozen=True)
class Row:
    """One pruned network.

    Attributes:
        method: a key of ``NAMES``.
        mask: how the weights were chosen: "saliency" (of single weights, all at once), "greedy" (one at a time with
            re-inversion) or "joint" (ADMM on mask and weights together).
        compensation: what the others did: "none", "own" (optimal under the method's H), "full" (under the full H).
        gradient: the gradient term took part in the choice and in the compensation.
        sparsity: fraction of weights removed.
        predicted: increase of the loss by the quadratic of the H that compensated (of the method, where none did), nats
            per image.
        loss: true increase of the training loss, nats per image.
        accuracy: on the test images.
    """

    method: str
    mask: str
    compensation: str
    gradient: bool
    sparsity: float
    predicted: float
    loss: float
    accuracy: float


def curvature(
    name: str, network: Network, w: Tensor, samples: FisherSamples, *, damping: float = 0.0, seed: int = 0
) -> Curvature:
    """One approximation of ``H = F + λ I`` over both layers as [1, n].

    F is the Fisher of the cross-entropy, λ = decay + damping. The identity and the layer-wise form have no unit of
    loss; each is multiplied by one number, the mean of the diagonal of what it leaves out, so that predictions compare.

    Args:
        name: a key of ``NAMES``.
        network: whose decay is meant.
        w: [n], the weights that the samples belong to.
        samples: of the Fisher at w.
        damping: beyond the decay.
        seed: of the low-rank form's images and labels.
    """
    ridge = network.decay + damping
    if name == "exact":
        return Dense(shifted(samples.dense, ridge), (1, network.size))
    if name == "magnitude":
        return ScaledIdentity(samples.dense.diagonal().mean() + ridge, (1, network.size))
    if name == "lowrank":
        some = sampled_gradients(network, w, min(GRADIENTS, len(network.x)), seed)
        return LowRank.fisher(some.unsqueeze(1), ridge)
    return DirectSum([_of_layer(name, samples, layer, ridge) for layer in range(2)])


def _of_layer(name: str, samples: FisherSamples, layer: int, ridge: float) -> Curvature:
    """The curvature of one layer's weight matrix; K-FAC's ``G ⊗ A + λ I`` is exact in its eigenbasis."""
    gradients = samples.gradients[layer]
    if name == "obd":
        return Diagonal(gradients.square().mean(0) + ridge)
    if name == "block":
        return BlockDiagonal.fisher(gradients, BLOCK, ridge)
    a, g = samples.factors(layer)
    if name == "ekfac":
        return EigenKronecker.fisher(a, g, gradients, ridge)
    if name == "layerwise":
        g = g.diagonal().mean() * torch.eye(len(g), dtype=g.dtype)
    (values_a, basis_a), (values_g, basis_g) = torch.linalg.eigh(a), torch.linalg.eigh(g)
    return EigenKronecker(basis_a, basis_g, torch.outer(values_g.clamp_min(0), values_a.clamp_min(0)) + ridge)


def sweep(network: Network, w: Tensor, levels: tuple[float, ...]) -> Iterator[Row]:
    """Prune one network by every rule at every level, without a gradient term.

    Args:
        network: whose loss is measured.
        w: [n], the trained weights.
        levels: sparsities, ascending.
    """
    samples = fisher_samples(network, w)
    operators = {name: curvature(name, network, w, samples) for name in NAMES}
    full, row, before = operators["exact"], w.unsqueeze(0), float(network.loss(w))

    def measured(name: str, mask: str, how: str, level: float, x: Tensor) -> Row:
        judge = full if how == "full" else operators[name]
        predicted = quadratic_loss(judge, x - row)
        return Row(name, mask, how, False, level, predicted, float(network.loss(x[0])) - before,
                   network.accuracy(x[0]))  # fmt: skip

    for name, h in operators.items():
        scores = saliency(row, h)
        for level in levels:
            mask = Unstructured(level).project(scores)
            yield measured(name, "saliency", "none", level, row * mask)
            yield measured(name, "saliency", "own", level, optimum(row, h, mask))
            yield measured(name, "saliency", "full", level, optimum(row, full, mask))
    for name in ("kfac", "ekfac", "exact"):
        for level in levels:
            solution = solve(row, operators[name], Unstructured(level))
            yield measured(name, "joint", "own", level, optimum(row, operators[name], solution.mask, solution.weight))
            yield measured(name, "joint", "full", level, optimum(row, full, solution.mask, solution.weight))
    removed = tuple(round(level * network.size) for level in levels)
    path = surgeon(w, full.to_dense(), removed)
    for level, x in zip(levels, path.weights, strict=True):
        yield measured("exact", "greedy", "own", level, x.unsqueeze(0))


def optimum(w: Tensor, h: Curvature, mask: Tensor, start: Tensor | None = None) -> Tensor:
    """The compensated weights [1, n], to convergence."""
    return compensate(w, h, mask, start, tolerance=TOLERANCE, max_iterations=ITERATIONS).weight


def sweep_with_gradient(network: Network, w: Tensor, levels: tuple[float, ...]) -> Iterator[Row | Trust]:
    """Prune a network that has not converged by three rules, with the gradient term and without.

    Three forms, every one with its rule's compensation: plain (no gradient, no damping beyond the decay); plain under
    the damping of the third; the gradient in choice and compensation ("saliency"), and in the compensation only
    ("saliency without gradient"), which tells what the term does to the choice from what its Newton step does.
    """
    samples = fisher_samples(network, w)
    row, before, gradient = w.unsqueeze(0), float(network.loss(w)), network.gradient(w).unsqueeze(0)
    for name in ("obd", "kfac", "exact"):
        undamped = curvature(name, network, w, samples)
        h, trust = _trusted(network, w, samples, gradient, name)
        yield trust
        target, gain = newton_point(row, h, gradient), newton_decrease(h, gradient)
        for level in levels:
            pattern = Unstructured(level)
            bare, plain, taylor = (
                pattern.project(saliency(x, by)) for x, by in ((row, undamped), (row, h), (target, h))
            )
            for kind, by, mask, goal, won in (
                ("saliency", undamped, bare, row, 0.0),
                ("saliency, damped", h, plain, row, 0.0),
                ("saliency without gradient", h, plain, target, gain),
                ("saliency", h, taylor, target, gain),
            ):
                x = optimum(goal, by, mask)
                yield Row(name, kind, "own", goal is target, level, quadratic_loss(by, x - goal) - won,
                          float(network.loss(x[0])) - before, network.accuracy(x[0]))  # fmt: skip


@dataclass(frozen=True)
class Trust:
    """How much damping made the quadratic hold as far as its own Newton step.

    Attributes:
        method: a key of ``NAMES``.
        damping: μ, added to H beyond the decay.
        predicted: decrease of the loss by the step to the Newton point, nats per image.
        true: the same, measured.
    """

    method: str
    damping: float
    predicted: float
    true: float


def _trusted(
    network: Network, w: Tensor, samples: FisherSamples, gradient: Tensor, name: str
) -> tuple[Curvature, Trust]:
    """The first μ of 0, decay · 10^(k/2) under which the Newton step gains at least half of what it predicts."""
    before = float(network.loss(w))
    for damping in (0.0, *(network.decay * 10 ** (k / 2) for k in range(12))):
        h = curvature(name, network, w, samples, damping=damping)
        target, predicted = newton_point(w.unsqueeze(0), h, gradient), newton_decrease(h, gradient)
        true = before - float(network.loss(target[0]))
        if true >= 0.5 * predicted:
            break
    return h, Trust(name, damping, predicted, true)
