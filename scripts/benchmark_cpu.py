"""Speed of the solver's parts on a CPU, each beside a plain form of what others publish; ratios of one run.

Two comparisons, on random problems with decaying spectra:

- the column sweep of SparseGPT, ours (transposed, in leaves of 16 columns, the k-th value without sorting) against the
  algorithm as it is written down: one column at a time, a rank-one update of the block, a sorted threshold;
- mask and weights under G ⊗ A, ours (preconditioned ADMM without eigendecompositions, three products an iteration, then
  conjugate gradients) against ADMM with exact X steps in the eigenbases, on the same penalties, and the same conjugate
  gradients, which stop early or late; and how long ours takes to a loss no worse than the other's best.

Then how time and memory of every part grow with the width, as the exponents of power laws fitted to all widths. Memory
is what a part takes at its peak beyond its arguments; it is measured on Linux alone.

    python scripts/benchmark_cpu.py --out benchmarks/cpu.jsonl
"""

import argparse
import ctypes
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmark_quality import ROOT, commit
from torch import Tensor

from kfac_prune.baselines.sparsegpt import BLOCK, DAMPING, sweep_by_leaves
from kfac_prune.linalg import bfloat16_units, inverse_from_cholesky, inverse_upper_cholesky
from kfac_prune.obs import THOROUGH, Pattern, Unstructured, compensate
from kfac_prune.obs.compensate import TOLERANCE
from kfac_prune.obs.select import RHO_START, RHO_STOP, admm
from kfac_prune.operators import Damping, Kronecker
from kfac_prune.report import versions

SPARSITY, REPEATS = 0.5, 3
SWEEPS, SOLVES, WIDTHS = (768, 2048), (1024,), (256, 512, 1024, 2048, 4096)
#: Tolerances of the conjugate gradients, early and late.
EARLY, LATE = 1e-2, TOLERANCE


def main() -> None:
    """Measure, print, and write one row per figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "cpu.jsonl", help="default: %(default)s")
    parser.add_argument("--sweeps", type=int, nargs="*", default=SWEEPS, help="widths; default: %(default)s")
    parser.add_argument("--solves", type=int, nargs="*", default=SOLVES, help="widths; default: %(default)s")
    parser.add_argument("--widths", type=int, nargs="*", default=WIDTHS, help="for the growth; default: %(default)s")
    arguments = parser.parse_args()
    rows = [compare_sweeps(width) for width in arguments.sweeps]
    for width in arguments.solves:
        rows += compare_solves(width)
    if len(arguments.widths) > 1:
        rows += growth(arguments.widths)
    shared = {"cpu": cpu(), "threads": torch.get_num_threads(), "commit": commit(), "versions": versions()}
    arguments.out.write_text("".join(json.dumps(row | shared) + "\n" for row in rows))
    print(f"written to {arguments.out}")


def cpu() -> str:
    """Its name and where it multiplies bfloat16, as far as torch says."""
    name = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name", "a CPU")
    return f"{name}, {bfloat16_units() or 'no'} units for bfloat16"


def covariance(width: int, seed: int) -> Tensor:
    """Of 4·width samples in random directions whose sizes fall by a factor of a hundred."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    samples = torch.randn(4 * width, width, generator=generator) * torch.logspace(0, -2, width) @ directions
    return samples.T @ samples / len(samples)


def seconds(run: Callable[[], Any], repeats: int = REPEATS) -> float:
    """The least of several runs; of one thread its own time, whatever else the machine is doing."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times = []
    for _ in range(repeats):
        start = clock()
        run()
        times.append(clock() - start)
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


def compare_solves(width: int) -> list[dict[str, Any]]:
    """Mask and weights of a square layer under G ⊗ A."""
    weight, operator, pattern = problem(width)
    losses: dict[str, float] = {}

    def ours(tolerance: float) -> None:
        found = admm(weight, operator, pattern)
        losses["ours"] = compensate(weight, operator, found.mask, found.start, tolerance=tolerance).loss

    def plain(tolerance: float) -> None:
        found = eigenbasis_admm(weight, operator, pattern)
        losses["plain"] = compensate(weight, operator, *found, tolerance=tolerance).loss

    def row(what: str, tolerances: tuple[float, float]) -> dict[str, Any]:
        mine, theirs = tolerances
        fast, slow = seconds(lambda: ours(mine)), seconds(lambda: plain(theirs))
        return told({"what": what, "width": width, "tolerances": tolerances, "seconds": fast, "plain_seconds": slow,
                     "ratio": slow / fast, "loss": losses["ours"], "plain_loss": losses["plain"]})  # fmt: skip

    what = "select and compensate"
    return [
        row(what, (LATE, LATE)), row(what, (EARLY, EARLY)), row(f"{what} to a loss no worse", (EARLY, LATE))
    ]  # fmt: skip


def problem(width: int) -> tuple[Tensor, Kronecker, Unstructured]:
    """A random weight matrix with damped factors."""
    weight = torch.randn(width, width, generator=torch.Generator().manual_seed(0)) / width**0.5
    a, g = (Damping()(covariance(width, seed), name="A", where="benchmark")[0] for seed in (1, 2))
    return weight, Kronecker(a, g), Unstructured(0.7)


def growth(widths: Sequence[int]) -> list[dict[str, Any]]:
    """Seconds and peak memory of every part at every width, and the exponents that fit them."""
    parts: dict[str, list[tuple[float, float | None]]] = {}
    for width in widths:
        weight, operator, pattern = problem(width)
        tokens = torch.randn(4096, width, generator=torch.Generator().manual_seed(3))
        found = admm(weight, operator, pattern)
        runs: dict[str, Callable[[], Any]] = {
            "covariance of 4096 tokens": lambda t=tokens: t.T @ t,
            "factor and invert": lambda o=operator: inverse_from_cholesky(o.a),
            # a new operator, so that its factorisations are timed
            "select": lambda w=weight, o=operator, p=pattern: admm(w, Kronecker(o.a, o.g), p),
            "compensate": lambda w=weight, o=operator, f=found: compensate(w, o, f.mask, f.start),
        }
        for name, run in runs.items():
            parts.setdefault(name, []).append((seconds(run, 1), peak_bytes(run)))
    rows = []
    for name, figures in parts.items():
        times, peaks = zip(*figures, strict=True)
        row = {"what": f"growth: {name}", "widths": list(widths), "seconds": times, "exponent": exponent(widths, times)}
        if None not in peaks:
            row |= {"peak_bytes": peaks, "memory_exponent": exponent(widths, peaks)}
        rows.append(told(row))
    return rows


def exponent(widths: Sequence[int], figures: Sequence[float]) -> float:
    """The slope of the line through the logarithms of widths and figures."""
    return statistics.linear_regression([math.log(w) for w in widths], [math.log(f) for f in figures]).slope


def peak_bytes(run: Callable[[], Any]) -> float | None:
    """Main memory that a run takes at its peak, beyond what was taken before; None where the system does not say."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed is not counted as there
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
        before = resident("VmRSS")
        run()
        return resident("VmHWM") - before
    except (OSError, AttributeError):  # not Linux, or not glibc
        return None


def resident(field: str) -> float:
    """A figure of this process's memory, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * float(lines[field].split()[0])


def told(row: dict[str, Any]) -> dict[str, Any]:
    """The row, printed."""
    print(
        "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()),
        flush=True,
    )
    return row


if __name__ == "__main__":
    main()
