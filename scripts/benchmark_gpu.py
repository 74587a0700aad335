"""Kernels, stages and one whole prune on a GPU: correct, how fast, and how far from what the memory system allows.

Every row is written to FILE as soon as it is measured; the script stops by itself before its time budget is spent. What
fails becomes a row with the error, the rest goes on, and the script ends with exit code 1.

    pip install .          # without a network: --no-index --no-deps --no-build-isolation
    python scripts/benchmark_gpu.py --out benchmarks/gpu.jsonl
    python scripts/benchmark_gpu.py --out FILE --tiny     # the same code on a CPU at toy sizes, by the PyTorch twins
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from benchmark_quality import commit
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from kfac_prune import backend, reference, reference_pcg
from kfac_prune.baselines.sparsegpt import sweep_by_leaves, sweep_fused
from kfac_prune.curvature.capture import InputMoments
from kfac_prune.curvature.estimate import estimate_factors
from kfac_prune.data import Windows
from kfac_prune.linalg import inverse_from_cholesky, inverse_upper_cholesky
from kfac_prune.models import prunable_layers
from kfac_prune.obs import FAST, NM, Unstructured, compensate, select
from kfac_prune.operators import Kronecker
from kfac_prune.plan import make_plan, prune
from kfac_prune.reference_pcg import Row
from kfac_prune.report import versions

RHO = 0.37
#: Of the radix histogram over its scores, eight bits each.
PASSES = 4
#: Bytes that are written before a measurement, more than any L2 cache holds.
L2_FLUSH = 1 << 28
#: Cycles that a GPU waits before a measurement, so that launches are behind it.
HEAD_START = 1_000_000


def gpu_versions() -> dict[str, str | None]:
    """Of what runs the kernels; None where it is not there or does not say."""
    found: dict[str, str | None] = {"triton": None, "cuda": torch.version.cuda, "driver": None}
    if backend.HAS_TRITON:
        found["triton"] = version("triton")
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()
        found["driver"] = told[0] if told else None
    return found


class Bench:
    """Measures and writes rows until the time is up.

    Args:
        out: file that rows are appended to.
        device: to run on.
        seconds: after which no further measurement starts.
        commit: of the code.
    """

    def __init__(self, out: Path, device: str, seconds: float, commit: str = "") -> None:
        self.out, self.device, self.end = out, device, time.monotonic() + seconds
        self.repeats = 9 if device == "cuda" else 2
        name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        self.failed: list[str] = []
        self.about = {"device": name, "commit": commit, "versions": versions() | gpu_versions()}
        self.flush = torch.empty(L2_FLUSH if device == "cuda" else 0, dtype=torch.uint8, device=device)

    def attempt(self, what: str, measure: Callable[[], object]) -> None:
        """Nothing once the time is up; a failure becomes a row, and what follows is measured all the same."""
        if time.monotonic() > self.end:
            print(f"{what}: skipped, the time budget is spent", flush=True)
            return
        try:
            measure()
        except Exception as error:  # of the compiler, the driver, ...
            traceback.print_exc()
            self.failed.append(what)
            self.row(what, error=f"{type(error).__name__}: {error}"[:1000])

    def row(self, what: str, **figures: Any) -> None:
        """Append one row."""
        row = {"what": what, **figures, **self.about}
        with self.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(what, figures, flush=True)

    def time(self, run: Callable[[], object], repeats: int | None = None) -> float:
        """Median milliseconds of a call with cold caches, by CUDA events, after one call that is not counted."""
        run()
        times = []
        for _ in range(repeats or self.repeats):
            if self.device == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self.flush.zero_()
                torch.cuda._sleep(HEAD_START)
                begin.record()
                run()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end))
            else:
                start = time.perf_counter()
                run()
                times.append(1000 * (time.perf_counter() - start))
        return statistics.median(times)

    def synchronised_peak(self) -> int | None:
        """Bytes at the peak since the last call, once the GPU has done all its work."""
        if self.device != "cuda":
            return None
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - self.flush.nbytes
        torch.cuda.reset_peak_memory_stats()
        return peak

    def stage(self, what: str, run: Callable[[], object], **figures: Any) -> None:
        """Time a stage and note its peak of memory; an attempt."""

        def measure() -> None:
            self.synchronised_peak()
            took = self.time(run, 3 if self.device == "cuda" else 1)
            self.row(what, ms=took, peak_bytes=self.synchronised_peak(), **figures)

        self.attempt(what, measure)


def floors(bench: Bench, n: int) -> float:
    """Measure what the memory and the matrix units give; returns bytes per millisecond of a copy."""
    source = torch.randn(4 * n, 4 * n, device=bench.device)  # far more than a cache holds
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / bench.time(lambda: target.copy_(source))
    half = source[:n, :n].to(torch.bfloat16)
    rate = 2 * n**3 / bench.time(lambda: half @ half)
    bench.row("floor", n=n, copy_gb_per_s=bandwidth / 1e6, bf16_tflops=rate / 1e9)
    return bandwidth


def kernels(bench: Bench, n: int, bandwidth: float) -> None:
    """Every kernel but the sweep and the conjugate gradients', against its twin, eager PyTorch and the memory floor.

    Thresholds are compared in float64. The others choose masks, so they are compared with the twin, entry by entry; a
    chosen mask may differ from it where a score is rounded otherwise. Every row makes its own inputs.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=bench.device)

    def threshold_row(name: str) -> None:
        x, dual, k = normal(n, n), normal(n, n), n * n // 2
        given: tuple[Any, ...] = ([x], k) if name == "kth_largest" else (x, dual, RHO, k)
        scores = x.double() if name == "kth_largest" else (x.double() + dual.double() / RHO).square()
        exact = scores.flatten().sort().values[n * n - k]
        wrong = float((getattr(backend, name)(*given) - exact).abs() / exact.abs())
        del scores

        def eagerly(kth: Callable[[Tensor, int], Tensor]) -> Tensor:
            return kth(x.flatten() if name == "kth_largest" else (x + dual / RHO).square().flatten(), k)

        eager = min(bench.time(partial(eagerly, kth), 2) for kth in (_by_sorting, _by_kthvalue))
        size = (4 if name == "kth_largest" else 8) * PASSES
        timed(bench, name, given, size * n * n / bandwidth, eager=eager, n=n, relative_error=wrong)

    for name in ("kth_largest", "kth_largest_dual"):
        bench.attempt(name, partial(threshold_row, name))

    def tail_row(name: str) -> None:
        x, dual = normal(n, n), normal(n, n)
        rule = (reference.kth_largest_dual(x, dual, RHO, n * n // 2),) if name == "admm_tail" else (2, 4)
        given = (x, dual, x > 0, torch.empty_like(x), *rule, RHO)
        timed(bench, name, given, 18 * n * n / bandwidth, n=n, **disagreement(name, given, (1, 2, 3)))

    for name in ("admm_tail", "admm_tail_nm"):
        bench.attempt(name, partial(tail_row, name))

    def sweep_row() -> None:
        u, error = torch.eye(n, device=bench.device) + 0.1, torch.empty(min(n, 128), n, device=bench.device)
        kept = torch.empty_like(error, dtype=torch.bool)
        given = (normal(n, n), u, error, kept, 0, reference.pack_bits(normal(n, n) > 0))
        found = disagreement("block_sweep", given, (0, 2, 3))
        timed(bench, "block_sweep", given, 13 * error.numel() / bandwidth, n=n, form="bits", **found)

    bench.attempt("block_sweep", sweep_row)


def _by_sorting(scores: Tensor, k: int) -> Tensor:
    return scores.sort(descending=True).values[k - 1]


def _by_kthvalue(scores: Tensor, k: int) -> Tensor:
    return torch.kthvalue(scores, scores.numel() - k + 1).values


def disagreement(name: str, arguments: tuple[Any, ...], out: Sequence[int]) -> dict[str, float]:
    """How far an operator and its twin are apart in what they write and return.

    Args:
        name: of both.
        arguments: which are left as they are.
        out: numbers of those that are written to.
    """
    ours, twins = ([a.clone() if torch.is_tensor(a) else a for a in arguments] for _ in range(2))
    returned, wanted = getattr(backend, name)(*ours), getattr(reference, name)(*twins)
    written = [(ours[i], twins[i]) for i in out]
    masks = [(a != b).double().mean() for a, b in written if a.dtype == torch.bool]
    errors = [(a - b).norm() / b.norm() for a, b in written if a.dtype != torch.bool]
    found = {"mask_differs": float(max(masks)), "relative_error": float(max(errors))}
    return found if returned is None else found | {"churn_differs": float((returned - wanted).abs())}


def timed(
    bench: Bench, name: str, arguments: tuple[Any, ...], floor: float, *, eager: float | None = None, **figures: Any
) -> None:
    """A row: milliseconds of an operator, of eager PyTorch (the twin if not given), and at the speed of memory."""
    took = bench.time(lambda: getattr(backend, name)(*arguments))
    if eager is None:
        eager = bench.time(lambda: getattr(reference, name)(*arguments), 2)
    bench.row(name, ms=took, eager_ms=eager, floor_ms=floor if math.isfinite(floor) else None, **figures)


def pcg_steps(bench: Bench, n: int, bandwidth: float) -> None:
    """A step of conjugate gradients after the product with H: against the twin in float64, eager and the memory floor.

    The vectors are such that the same step can be taken many times and always goes on.
    """
    u = torch.rand(n, n, device=bench.device) + 0.5
    inverse = (torch.rand(n, n, device=bench.device) > 0.5).float()
    log = torch.zeros(2, len(Row._fields), dtype=torch.float64, device=bench.device)
    log[0] = log.new_tensor(Row(float((u * u * inverse).double().sum()), 1e12, 0.0, 0, 1))
    state, curved = [torch.zeros_like(u), u.clone(), 100 * u, torch.empty_like(u)], u.clone()  # X, B, P, Z
    exact, exact_log = [t.double() for t in (*state, curved, inverse)], log.clone()
    reference_pcg.pcg_step(*exact, exact_log, 1, 0.0)
    found, found_log = [t.clone() for t in state], log.clone()
    backend.pcg_step(*found, curved, inverse, found_log, 1, 0.0)
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=False))
    error = max(error, float(((found_log - exact_log) / exact_log.abs().clamp_min(1e-30))[1, :3].abs().max()))
    again = [t.clone() for t in state]
    backend.pcg_step(*again, curved, inverse, log, 1, 0.0)
    same = all(torch.equal(a, b) for a, b in zip((*again, log), (*found, found_log), strict=True))
    took = bench.time(lambda: backend.pcg_step(*state, curved, inverse, log, 1, 0.0))
    eager = bench.time(lambda: eager_pcg_step(*again, curved, inverse, log[0, 0].float()), 2)
    floor = 48 * n * n / bandwidth if math.isfinite(bandwidth) else None
    figures = {"relative_error": error, "repeatable": same, "went_on": bool(log[1, -1])}
    bench.row("pcg_step", n=n, ms=took, eager_ms=eager, floor_ms=floor, **figures)


def eager_pcg_step(
    x: Tensor, gradient: Tensor, direction: Tensor, z: Tensor, curved: Tensor, inverse: Tensor, rz: Tensor
) -> Tensor:
    """``reference_pcg.pcg_step`` one operation after another, its scalars on the device; the log is left out."""
    step = rz / torch.sum(direction * curved)
    x += step * direction
    gradient -= step * curved
    torch.mul(gradient, inverse, out=z)
    following = torch.sum(gradient * z)
    torch.add(z, following / rz * direction, out=direction)
    return following


def sweeps(bench: Bench, n: int, u: Tensor) -> None:
    """SparseGPT's sweep by the kernel and by PyTorch, and how often their masks agree."""
    w = torch.randn(n, n, device=bench.device)
    for pattern in (Unstructured(0.5), NM(2, 4)):
        exact, kept = sweep_by_leaves(w.double(), u.double(), pattern)
        found, mask = sweep_fused(w.clone(), u, pattern)
        figures = {
            "mask_differs": float((mask != kept).double().mean()),
            "relative_error": float((found - exact).norm() / exact.norm()),
            "eager_ms": bench.time(lambda p=pattern: sweep_by_leaves(w.clone(), u, p), 1),
        }
        what = "sweep, mostly launches"
        bench.stage(what, lambda p=pattern: sweep_fused(w.clone(), u, p), n=n, pattern=str(pattern), **figures)


def stages(bench: Bench, shapes: list[tuple[int, int]], tokens: int) -> None:
    """Covariance, factorisation, selection, compensation and sweep on layers of the given shapes."""
    for out, width in shapes:
        bench.attempt(f"stages {out} x {width}", partial(stages_of, bench, out, width, tokens))


def stages_of(bench: Bench, out: int, width: int, tokens: int) -> None:
    """``stages`` of one layer [out, in]."""
    rows = torch.randn(tokens, width, device=bench.device, dtype=torch.bfloat16)
    moments = InputMoments(*(torch.zeros(width, *rest, device=bench.device) for rest in ((width,), ())))
    flops = 2 * tokens * width**2
    bench.stage("covariance", lambda: moments.add(rows), tokens=tokens, width=width, flops=flops)
    a = rows.float().T @ rows.float() / tokens + 0.1 * torch.eye(width, device=bench.device)
    g = torch.randn(2 * out, out, device=bench.device)
    g = g.T @ g / len(g) + 0.1 * torch.eye(out, device=bench.device)
    bench.stage("cholesky", lambda: inverse_from_cholesky(a), width=width)
    weight = torch.randn(out, width, device=bench.device)
    shape = {"out": out, "in": width}
    for pattern in (Unstructured(0.5), NM(2, 4)):
        # a new operator in every call, so that the factorisations are timed
        bench.stage("admm", lambda p=pattern: select(weight, Kronecker(a, g), p, FAST), pattern=str(pattern), **shape)
    mask = NM(2, 4).project(weight.square())
    bench.stage("pcg", lambda: compensate(weight, Kronecker(a, g), mask, max_iterations=20), **shape)
    if out == width:
        bench.attempt("sweep", partial(sweeps, bench, width, inverse_upper_cholesky(a)))


def whole(bench: Bench, config: LlamaConfig, windows: int, length: int) -> None:
    """Curvature and prune of a whole model with random weights on random tokens."""
    dtype = torch.bfloat16 if bench.device == "cuda" else torch.float32
    with torch.device(bench.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    layers = prunable_layers(model)
    tokens = Windows(torch.randint(3, config.vocab_size, (windows, length)))
    size = {"parameters": sum(p.numel() for p in model.parameters()), "windows": windows, "length": length}
    plan = partial(make_plan, method="kfac", allocation="uniform", pattern=NM(2, 4))
    plan(layers[:1], estimate_factors(model, layers, Windows(tokens.input_ids[:1]), batch_size=1))  # compiles kernels
    factors = None
    for what in ("curvature", "prune"):
        bench.synchronised_peak()
        start = time.perf_counter()
        if factors is None:
            factors = estimate_factors(model, layers, tokens, batch_size=4)
        else:
            prune(layers, plan(layers, factors))
        peak = bench.synchronised_peak()
        bench.row(f"model {what}", seconds=time.perf_counter() - start, peak_bytes=peak, **size)


def main() -> None:
    """Run what fits into the time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="rows are appended here, one JSON object a line")
    parser.add_argument("--seconds", type=float, default=480, help="start nothing new after this; default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="toy sizes on the CPU: shows that the script runs")
    parser.add_argument("--commit", default="", help="what rows name as the code's; default: that of the checkout")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        sys.exit("benchmark_gpu.py: no GPU is visible to torch; --tiny runs the same code on the CPU at toy sizes")
    torch.manual_seed(0)
    n, layers, tokens = (64, [(64, 64)], 128) if options.tiny else (4096, [(4096, 4096), (4096, 11008)], 16384)
    bench = Bench(options.out, "cpu" if options.tiny else "cuda", options.seconds, options.commit or commit())
    measured = [math.nan]  # bytes per millisecond
    bench.attempt("floor", lambda: measured.append(floors(bench, n)))
    bandwidth = measured[-1]
    kernels(bench, n, bandwidth)
    bench.attempt("pcg_step", partial(pcg_steps, bench, n, bandwidth))
    bench.attempt("stages", partial(stages, bench, layers, tokens))
    small = LlamaConfig(vocab_size=48, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                        num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    large = LlamaConfig(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
                        num_attention_heads=32, num_key_value_heads=4)  # fmt: skip  # 1.1 billion parameters
    config, windows, length = (small, 2, 8) if options.tiny else (large, 32, 2048)
    bench.attempt("model", partial(whole, bench, config, windows, length))
    if bench.failed:
        sys.exit(f"benchmark_gpu.py: failed: {', '.join(bench.failed)}; the rows and the lines above say why")


if __name__ == "__main__":
    main()
