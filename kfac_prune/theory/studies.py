"""Indefinite Hessians and their damping; pruning before training, and training again after it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kfac_prune.errors import InputError
from kfac_prune.linalg import shifted
from kfac_prune.obs import Unstructured, saliency, surgeon
from kfac_prune.operators import Dense, ScaledIdentity, make_definite
from kfac_prune.theory.network import Network, fisher_samples
from kfac_prune.theory.sweep import optimum


def spectrum(network: Network, w: Tensor, state: str) -> tuple[Tensor, dict[str, Any]]:
    """The exact Hessian at w [n, n], and what its eigenvalues and ``make_definite`` say of it."""
    h = network.hessian(w)
    eigenvalues = torch.linalg.eigvalsh(h)
    found: dict[str, Any] = {
        "state": state,
        "loss": float(network.loss(w)),
        "gradient_norm": float(network.gradient(w).norm()),
        "smallest": float(eigenvalues[0]),
        "largest": float(eigenvalues[-1]),
        "negative": int((eigenvalues < 0).sum()),
        "eigenvalues": eigenvalues.tolist(),
        "added": None,
        "refused": None,
    }
    try:
        found["added"] = make_definite(h, where=state)[1].added
    except InputError as error:
        found["refused"] = str(error)
    return h, found


def damping_study(network: Network, w: Tensor, h: Tensor, shifts: tuple[float, ...], sparsity: float) -> dict[str, Any]:
    """Which weights fall at one sparsity as the shift of an indefinite Hessian grows.

    Args:
        network: whose loss is measured.
        w: [n].
        h: the exact Hessian at w [n, n].
        shifts: each added to ``−μ_min``, in the unit of H.
        sparsity: fraction of weights removed, by single-weight saliencies, then compensated under the shifted Hessian.

    Returns:
        Per shift: the share of the removed weights that magnitude removes too, that the Fisher's saliency (with the
        decay) removes too, and that the smallest shift removes too; and the true increase of the loss.
    """
    pattern, row, n = Unstructured(sparsity), w.unsqueeze(0), len(w)
    eigenvalues, basis = torch.linalg.eigh(h)
    fisher = shifted(fisher_samples(network, w).dense, network.decay)
    by_magnitude = ~pattern.project(saliency(row, ScaledIdentity(w.new_ones(()), (1, n))))
    by_fisher = ~pattern.project(saliency(row, Dense(fisher, (1, n))))
    first: Tensor | None = None
    rows: list[dict[str, float]] = []
    before = float(network.loss(w))
    for shift in shifts:
        added = max(-float(eigenvalues[0]), 0.0) + shift
        damped = Dense(basis @ torch.diag(eigenvalues + added) @ basis.T, (1, n))
        removed = ~pattern.project(saliency(row, damped))
        first = removed if first is None else first
        count = int(removed.sum())
        rows.append(
            {
                "added": added,
                "with_magnitude": int((removed & by_magnitude).sum()) / count,
                "with_fisher": int((removed & by_fisher).sum()) / count,
                "with_smallest_shift": int((removed & first).sum()) / count,
                "loss_compensated": float(network.loss(optimum(row, damped, ~removed)[0])) - before,
                "loss_mask_only": float(network.loss(w * ~removed[0])) - before,
            }
        )
    reference = float(network.loss(optimum(row, Dense(fisher, (1, n)), ~by_fisher)[0])) - before
    return {
        "sparsity": sparsity,
        "rows": rows,
        "loss_fisher_compensated": reference,
        "fisher_with_magnitude": int((by_fisher & by_magnitude).sum()) / int(by_fisher.sum()),
    }


@dataclass(frozen=True)
class Trained:
    """A pruned network after training on its mask, or without.

    Attributes:
        rule: how the mask was found, and what the weights began with.
        sparsity: fraction of weights removed.
        loss: of training, nats per image, not an increase.
        accuracy: on the test images.
    """

    rule: str
    sparsity: float
    loss: float
    accuracy: float


def snip_mask(w: Tensor, gradient: Tensor, sparsity: float) -> Tensor:
    """Keep the largest ``|g_q w_q|`` (SNIP; Lee, Ajanthan & Torr 2019): the linear term of the loss, at initialisation.

    Args:
        w: [n], the initial weights; they keep their values under the mask.
        gradient: of the loss at w [n].
        sparsity: fraction of weights removed.

    Returns:
        [n] bool, True = kept.
    """
    return Unstructured(sparsity).project((w * gradient).abs().unsqueeze(0))[0]


def rewound(initial: Tensor, mask: Tensor) -> Tensor:
    """The initial weights, unchanged, where the mask keeps them; zero elsewhere (Frankle & Carbin 2019)."""
    return torch.where(mask, initial, torch.zeros_like(initial))


def lottery(
    network: Network, initial: Tensor, levels: tuple[float, ...], iterations: int
) -> Iterator[tuple[float, Tensor]]:
    """Iterative magnitude pruning with rewinding: train, remove the smallest that are left, rewind, train again.

    Yields:
        (sparsity, mask [n]) for each level, ascending; the network to train is ``rewound(initial, mask)``.
    """
    mask = torch.ones_like(initial, dtype=torch.bool)
    for level in levels:
        trained = network.train(rewound(initial, mask), iterations, mask)
        scores = torch.where(mask, trained.abs() + 1e-300, torch.zeros_like(trained))  # what is gone stays gone
        mask = Unstructured(level).project(scores.unsqueeze(0))[0]
        yield level, mask


def start_study(
    network: Network, initial: Tensor, trained: Tensor, levels: tuple[float, ...], iterations: int
) -> Iterator[Trained]:
    """Masks from before training and from after it, and what training on them reaches.

    Args:
        network: to train.
        initial: w [n] at initialisation.
        trained: w [n] at the minimum that training from ``initial`` finds.
        levels: sparsities, ascending.
        iterations: of L-BFGS in every training.
    """

    def result(rule: str, level: float, w: Tensor) -> Trained:
        return Trained(rule, level, float(network.loss(w)), network.accuracy(w))

    def retrained(rule: str, level: float, start: Tensor, mask: Tensor) -> Trained:
        return result(rule, level, network.train(start, iterations, mask))

    gradient = network.gradient(initial)
    random = torch.rand(initial.shape, generator=torch.Generator().manual_seed(1), dtype=initial.dtype)
    full = shifted(fisher_samples(network, trained).dense, network.decay)
    path = surgeon(trained, full, tuple(round(level * len(initial)) for level in levels))
    tickets = dict(lottery(network, initial, levels, iterations))
    for level, surgical in zip(levels, path.weights, strict=True):
        project = Unstructured(level).project
        at_random = project(random.unsqueeze(0))[0]
        snip = snip_mask(initial, gradient, level)
        magnitude = project(trained.abs().unsqueeze(0))[0]
        ticket, kept = tickets[level], surgical != 0
        yield retrained("random mask, from the initial weights", level, rewound(initial, at_random), at_random)
        yield retrained("SNIP at initialisation", level, rewound(initial, snip), snip)
        yield retrained("magnitude, rewound once", level, rewound(initial, magnitude), magnitude)
        yield retrained("lottery ticket, iterative rewinding", level, rewound(initial, ticket), ticket)
        yield result("exact OBS, no training after it", level, surgical)
        yield retrained("exact OBS, then trained on", level, surgical, kept)
