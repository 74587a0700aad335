"""Quality on the reference models: increase of test loss, KL and prediction, per method and level.

The protocol is that of the reference folder: T = min(context, 256); calibration on 128 windows at seeded random starts
of the training text; test on the first 200 consecutive windows of the test text. Every cell is one JSON line with
commit, device and versions; the table in README.md is written from those lines.

    python scripts/benchmark_quality.py --models wikitext2-llama babyllama-tok361 --out benchmarks/quality.jsonl
    python scripts/benchmark_quality.py --table --out benchmarks/quality.jsonl      # only rewrite README's table
"""

import argparse
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from kfac_prune.config import parse_pattern
from kfac_prune.curvature.estimate import estimate_factors
from kfac_prune.data import Windows, consecutive_windows, read_documents, sample_windows, token_stream
from kfac_prune.models import WeightSwap, context_length, load_model, load_tokenizer, prunable_layers
from kfac_prune.obs import NM
from kfac_prune.plan import Probe, loss_curves, make_plan, prune
from kfac_prune.quality import Quality, evaluate
from kfac_prune.refitting import refit
from kfac_prune.report import peak_memory_bytes, versions

ROOT = Path(__file__).resolve().parents[1]
#: model -> training text, test text, separator of the training text's documents, levels
MODELS: dict[str, tuple[str, str, str | None, tuple[str, ...]]] = {
    "wikitext2-llama": ("wikitext2_train.txt", "wikitext2_test.txt", None, ("50%", "60%", "70%", "80%", "2:4", "4:8")),
    "babyllama-tok361": (
        "tinystories_train.txt",
        "tinystories_test.json",
        "\n\n",
        ("50%", "60%", "70%", "80%", "2:4", "4:8"),
    ),
    "stories260K": ("tinystories_train.txt", "tinystories_test.json", "\n\n", ("50%", "60%", "70%", "2:4", "4:8")),
    "chargpt-shakespeare-gpt2": ("shakespeare_train.txt", "shakespeare_test.txt", None, ("50%", "70%", "2:4")),
}
METHODS = {
    "magnitude": "uniform",
    "wanda": "uniform",
    "sparsegpt": "uniform",
    "layerwise": "uniform",
    "kfac": "curves",
}
LABELS = {
    "magnitude": "magnitude",
    "wanda": "Wanda",
    "sparsegpt": "SparseGPT",
    "layerwise": "layer-wise (G = I)",
    "kfac": "K-FAC",
    "kfac+refit": "**K-FAC + refit (default)**",
}
SAMPLES, TEST_WINDOWS = 128, 200
BEGIN, END = "<!-- quality table: begin -->", "<!-- quality table: end -->"


def main() -> None:
    """Run the cells that were asked for, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, default=ROOT.parent / "shared" / "reference",
                        help="folder with models/ and text/; default: %(default)s")  # fmt: skip
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument("--levels", nargs="+", help="such as 50%% 2:4; default: each model's")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "quality.jsonl",
                        help="JSON lines; cells that are run again are replaced; default: %(default)s")  # fmt: skip
    parser.add_argument("--table", action="store_true", help="run nothing, only write the table into README.md")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    if not arguments.table:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        for name in arguments.models:
            for row in run_model(name, arguments.reference, arguments.levels or MODELS[name][3]):
                cell = {k: row[k] for k in ("model", "method", "level")}
                rows = [old for old in rows if any(old[k] != cell[k] for k in cell)] + [row]
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                arguments.out.write_text("".join(json.dumps(r) + "\n" for r in rows))
                print(
                    f"{row['model']:25} {row['method']:11} {row['level']:>4}  d {row['d']:.4f}  KL {row['kl']:.4f}  "
                    f"predicted {row['kl_predicted']:.4f}  {row['seconds']:.1f} s",
                    flush=True,
                )
    write_table(rows, ROOT / "README.md")


def windows(name: str, reference: Path, length: int) -> tuple[Windows, Windows]:
    """Calibration and test windows of a reference model."""
    train, test, separator, _ = MODELS[name]
    tokenizer = load_tokenizer(str(reference / "models" / name))
    stream = token_stream(tokenizer, read_documents(str(reference / "text" / train), separator=separator))
    held_out = token_stream(tokenizer, read_documents(str(reference / "text" / test)))
    return sample_windows(stream, SAMPLES, length, seed=0), consecutive_windows(held_out, TEST_WINDOWS, length)


def run_model(name: str, reference: Path, levels: tuple[str, ...]) -> Any:
    """Yield one row per method and level."""
    model = load_model(str(reference / "models" / name), dtype="float32")
    calibration, test = windows(name, reference, min(context_length(model) or 256, 256))
    layers = prunable_layers(model)
    start = time.perf_counter()
    factors = estimate_factors(model, layers, calibration, batch_size=16)
    curvature_seconds = time.perf_counter() - start
    curves = loss_curves(layers, factors)
    curve_seconds = time.perf_counter() - start - curvature_seconds
    dense = evaluate(model, test)
    for method, allocation in METHODS.items():
        for level in levels:
            groups = None if level.endswith("%") else parse_pattern(level)
            pattern = NM(*groups) if groups else None
            start = time.perf_counter()
            plan = make_plan(
                layers,
                factors,
                sparsity=None if groups else float(level[:-1]) / 100,
                pattern=pattern,
                method=method,  # type: ignore[arg-type]
                allocation=allocation,
                curves=curves,
                probe=Probe.on(model, calibration, 16) if method == "kfac" else None,
            )
            swap = prune(layers, plan)
            row = {
                "model": name,
                "method": method,
                "level": level,
                "allocation": plan.allocation,
                "sparsity": plan.sparsity,
                "dense_loss": dense.loss,
                "kl_predicted": plan.predicted,
                "seconds_curvature": curvature_seconds,
                "seconds_curves": curve_seconds,
                "device": model.device.type,
                "threads": torch.get_num_threads(),
                "commit": commit(),
                "versions": versions(),
            }
            yield row | measured(model, test, dense, swap, time.perf_counter() - start)
            if method == "kfac":
                start = time.perf_counter()
                refit(model, layers, plan, factors, calibration, swap.swapped_in, pattern=pattern, batch_size=16)
                yield row | {"method": "kfac+refit"} | measured(model, test, dense, swap, time.perf_counter() - start)
            swap.restore()


def measured(model: Any, test: Windows, dense: Quality, swap: WeightSwap, seconds: float) -> dict[str, Any]:
    """The measured part of a row; ``seconds`` is what the last step took."""
    quality = evaluate(model, test, dense=swap.swapped_in)
    return {
        "d": quality.loss - dense.loss,
        "kl": quality.kl,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def write_table(rows: list[dict[str, Any]], readme: Path) -> None:
    """Replace the table between the two markers of README.md."""
    levels = ("50%", "60%", "70%", "80%", "2:4", "4:8")
    lines = ["| model | method | " + " | ".join(levels) + " |", "|---|---|" + "---|" * len(levels)]
    cells = {(r["model"], r["method"], r["level"]): r for r in rows}
    for model in MODELS:
        for method, label in LABELS.items():
            found = [cells.get((model, method, level)) for level in levels]
            if any(found):
                figures = (f"{r['d']:.4f}" if r and r["d"] < 0.1 else f"{r['d']:.3f}" if r else "–" for r in found)
                lines.append(f"| {model} | {label} | " + " | ".join(figures) + " |")
    replace_between(readme, BEGIN, END, "\n".join(lines))


def replace_between(path: Path, begin: str, end: str, content: str) -> None:
    """Replace what stands between two marker lines of a file."""
    head, _, rest = path.read_text().partition(begin)
    _, _, tail = rest.partition(end)
    path.write_text(f"{head}{begin}\n{content}\n{end}{tail}")


def commit() -> str:
    """Of the checkout."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False).stdout.strip()


if __name__ == "__main__":
    main()
