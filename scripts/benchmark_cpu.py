"""Speed of the solver's parts on a CPU, each beside a plain form of what others publish; ratios of one run.

Two comparisons, on random problems with decaying spectra:

- the column sweep of SparseGPT, ours (transposed, in leaves of 16 columns, the k-th value without sorting) against the
  algorithm as it is written down: one column at a time, a rank-one update of the block, a sorted threshold;
- mask and weights under G ⊗ A, ours (preconditioned ADMM without eigendecompositions, three products an iteration, then
  conjugate gradients) against ADMM with exact X steps in the eigenbases, on the same penalties, and the same conjugate
  gradients.

Then how the time of every part grows with the width, as the exponent of a power law fitted to all widths.

    python scripts/benchmark_cpu.py --out benchmarks/cpu.jsonl
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmark_quality import ROOT, commit
from torch import Tensor

from kfac_prune.baselines.sparsegpt import BLOCK, DAMPING, sweep_by_leaves
from kfac_prune.linalg import inverse_from_cholesky, inverse_upper_cholesky
from kfac_prune.obs import THOROUGH, Pattern, Unstructured, compensate
from kfac_prune.obs.select import RHO_START, RHO_STOP, admm
from kfac_prune.operators import Damping, Kronecker
from kfac_prune.report import versions

SPARSITY, REPEATS = 0.5, 3
SWEEPS, SOLVES, WIDTHS = (768, 2048), (1024,), (256, 512, 1024, 2048)


def main() -> None:
    """Measure, print, and write one row per figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "cpu.jsonl", help="default: %(default)s")
    parser.add_argument("--sweeps", type=int, nargs="*", default=SWEEPS, help="widths; default: %(default)s")
    parser.add_argument("--solves", type=int, nargs="*", default=SOLVES, help="widths; default: %(default)s")
    parser.add_argument("--widths", type=int, nargs="*", default=WIDTHS, help="for the growth; default: %(default)s")
    arguments = parser.parse_args()
    rows = [compare_sweeps(width) for width in arguments.sweeps]
    rows += [compare_solves(width) for width in arguments.solves]
    if len(arguments.widths) > 1:
        rows += growth(arguments.widths)
    shared = {"threads": torch.get_num_threads(), "commit": commit(), "versions": versions()}
    arguments.out.write_text("".join(json.dumps(row | shared) + "\n" for row in rows))
    print(f"written to {arguments.out}")


def covariance(width: int, seed: int) -> Tensor:
    """Of 4·width samples in random directions whose sizes fall by a factor of a hundred."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    samples = torch.randn(4 * width, width, generator=generator) * torch.logspace(0, -2, width) @ directions
    return samples.T @ samples / len(samples)


def seconds(run: Callable[[], Any], repeats: int = REPEATS) -> float:
    """The least of several runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def plain_sweep(weight: Tensor, u: Tensor, sparsity: float) -> Tensor:
    """Algorithm 1 of the SparseGPT paper, line by line; returns the pruned weights [out, in]."""
    w = weight.clone()
    for start in range(0, w.shape[1], BLOCK):
        stop = min(start + BLOCK, w.shape[1])
        block, factor = w[:, start:stop], u[start:stop, start:stop]
        scores = block.square() / factor.diagonal().square()
        removed = scores <= scores.flatten().sort().values[int(scores.numel() * sparsity) - 1]
        errors = torch.zeros_like(block)
        for j in range(stop - start):
            kept = block[:, j].masked_fill(removed[:, j], 0.0)
            errors[:, j] = (block[:, j] - kept) / factor[j, j]
            block[:, j:] -= torch.outer(errors[:, j], factor[j, j:])
            block[:, j] = kept
        w[:, stop:] -= errors @ u[start:stop, stop:]
    return w


def compare_sweeps(width: int) -> dict[str, Any]:
    """The column sweep on a square layer."""
    weight = torch.randn(width, width, generator=torch.Generator().manual_seed(0)) / width**0.5
    h, _ = Damping(DAMPING)(covariance(width, 1).double(), name="A", where="benchmark")
    u, pattern = inverse_upper_cholesky(h).float(), Unstructured(SPARSITY)
    ours, plain = sweep_by_leaves(weight, u, pattern)[0], plain_sweep(weight, u, SPARSITY)
    different = float(((ours != 0) != (plain != 0)).float().mean())
    fast, slow = (seconds(lambda run=run: run()) for run in (
        lambda: sweep_by_leaves(weight, u, pattern), lambda: plain_sweep(weight, u, SPARSITY)
    ))  # fmt: skip
    return told({"what": "sweep", "width": width, "seconds": fast, "plain_seconds": slow, "ratio": slow / fast,
                 "different_mask_entries": different})  # fmt: skip


def eigenbasis_admm(weight: Tensor, curvature: Kronecker, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """ADMM with exact X steps in the eigenbases of the equilibrated factors; mask and starting point [out, in]."""
    h, scale = curvature.equilibrated()
    assert h.g is not None
    w = weight * scale
    (values_g, g), (values_a, a) = (torch.linalg.eigh(factor.double()) for factor in (h.g, h.a))
    values, g, a = torch.outer(values_g, values_a).to(w.dtype), g.to(w.dtype), a.to(w.dtype)
    pulled, dual, rho = h.apply(w), torch.zeros_like(w), RHO_START
    mask = pattern.project(w.square())
    z, x, unchanged = w * mask, w, 0
    for _ in range(THOROUGH.iterations):
        x = g @ ((g.T @ (pulled - dual + rho * z) @ a) / (values + rho)) @ a.T
        y = x + dual / rho
        previous, mask = mask, pattern.project(y.square())
        z = y * mask
        dual = dual + rho * (x - z)
        churn = int((mask ^ previous).sum()) / (2 * int(mask.sum()))
        unchanged = unchanged + 1 if churn == 0 else 0
        if unchanged == 3:
            break
        rho = min(rho * THOROUGH.factor(churn), RHO_STOP)
    return mask, x * mask / scale


def compare_solves(width: int) -> dict[str, Any]:
    """Mask and weights of a square layer under G ⊗ A."""
    weight, operator, pattern = problem(width)
    losses: dict[str, float] = {}

    def ours() -> None:
        found = admm(weight, operator, pattern)
        losses["ours"] = compensate(weight, operator, found.mask, found.start).loss

    def plain() -> None:
        losses["plain"] = compensate(weight, operator, *eigenbasis_admm(weight, operator, pattern)).loss

    fast, slow = seconds(ours), seconds(plain)
    return told({"what": "select and compensate", "width": width, "seconds": fast, "plain_seconds": slow,
                 "ratio": slow / fast, "loss": losses["ours"], "plain_loss": losses["plain"]})  # fmt: skip


def problem(width: int) -> tuple[Tensor, Kronecker, Unstructured]:
    """A random weight matrix with damped factors."""
    weight = torch.randn(width, width, generator=torch.Generator().manual_seed(0)) / width**0.5
    a, g = (Damping()(covariance(width, seed), name="A", where="benchmark")[0] for seed in (1, 2))
    return weight, Kronecker(a, g), Unstructured(0.7)


def growth(widths: list[int]) -> list[dict[str, Any]]:
    """Seconds of every part at every width, and the exponent that fits them."""
    parts: dict[str, list[float]] = {}
    for width in widths:
        weight, operator, pattern = problem(width)
        tokens = torch.randn(4096, width, generator=torch.Generator().manual_seed(3))
        found = admm(weight, operator, pattern)
        runs: dict[str, Callable[[], Any]] = {
            "covariance of 4096 tokens": lambda t=tokens: t.T @ t,
            "factor and invert": lambda o=operator: inverse_from_cholesky(o.a),
            "select": lambda w=weight, o=operator, p=pattern: admm(w, o, p),
            "compensate": lambda w=weight, o=operator, f=found: compensate(w, o, f.mask, f.start),
        }
        for name, run in runs.items():
            parts.setdefault(name, []).append(seconds(run, 1))
    logs = torch.tensor([math.log(width) for width in widths], dtype=torch.float64)
    rows = []
    for name, times in parts.items():
        y = torch.tensor(times, dtype=torch.float64).log()
        exponent = float(((logs - logs.mean()) * (y - y.mean())).sum() / (logs - logs.mean()).square().sum())
        rows.append(told({"what": f"growth: {name}", "widths": list(widths), "seconds": times, "exponent": exponent}))
    return rows


def told(row: dict[str, Any]) -> dict[str, Any]:
    """The row, printed."""
    print(
        "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()),
        flush=True,
    )
    return row


if __name__ == "__main__":
    main()
