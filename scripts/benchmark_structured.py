"""Structured pruning of the reference models: loss, size and speed against what is removed, per method.

The protocol is that of scripts/benchmark_quality.py. Every cell is one JSON line with commit, device and versions; the
tables in README.md are written from those lines. Prefill and decode are timed dense and pruned in turns.

    python scripts/benchmark_structured.py --models babyllama-tok361 --out benchmarks/structured.jsonl
    python scripts/benchmark_structured.py --models smollm2-135m --larger FOLDER --levels 20
    python scripts/benchmark_structured.py --speed      # prefill and decode of a larger model with random weights
    python scripts/benchmark_structured.py --table      # only rewrite README's tables
"""

import argparse
import json
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from benchmark_quality import MODELS, ROOT, batch_windows, commit, model_folder, replace_between, windows
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging

from kfac_prune.block_training import Reconstruction
from kfac_prune.config import OWN_TEXT, RECONSTRUCT
from kfac_prune.curvature.estimate import estimate_factors
from kfac_prune.errors import InputError
from kfac_prune.loading import context_length, load_model, load_tokenizer
from kfac_prune.models import prunable_layers
from kfac_prune.quality import evaluate
from kfac_prune.report import peak_memory_bytes, versions
from kfac_prune.structure.groups import FfnUnits, consumers_of, find_heads
from kfac_prune.structure.latency import speeds
from kfac_prune.structure.prune import Settings, Shrunk, find_groups, prune_structured, weights_target
from kfac_prune.structure.repair import reconstruct_smaller
from kfac_prune.structure.shrink import Cut, shrink

LEVELS = (10, 20, 30, 40, 50)
#: Row of the table -> settings. All of them measure their cost curves and keep the better kind of plan.
METHODS = {
    "magnitude": Settings(method="magnitude", shots=1, refit=False),
    "layerwise": Settings(method="layerwise", shots=1, refit=False),
    "kfac": Settings(method="kfac", shots=1, refit=False),
    "kfac+refit": Settings(),
}
LABELS = {
    "magnitude": "magnitude",
    "layerwise": "layer-wise (G = I)",
    "kfac": "K-FAC",
    "kfac+refit": "K-FAC + refit, shots",
    "magnitude+reconstruction": "magnitude + reconstruction",
    "layerwise+reconstruction": "layer-wise (G = I) + reconstruction",
    "kfac+reconstruction": "K-FAC + reconstruction",
    "kfac+own-text": "**K-FAC + reconstruction, own text (default)**",
}
#: What follows the cut where nothing is refitted; text of the model's own for K-FAC alone.
REPAIRS = {"none": None, "reconstruction": 0, "own-text": OWN_TEXT}
SPEED_MODEL = "random Llama, 8 blocks of width 1024"
BEGIN, END = "<!-- structured table: begin -->", "<!-- structured table: end -->"


def main() -> None:
    """Run the cells that were asked for, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, default=ROOT.parent / "shared" / "reference",
                        help="folder with models/ and text/; default: %(default)s")  # fmt: skip
    parser.add_argument("--larger", type=Path, help="folder with smollm2-135m; needed for it only")
    small = [name for name, subject in MODELS.items() if not subject.larger]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=small, help="default: the small ones")
    parser.add_argument("--levels", nargs="+", type=int, default=LEVELS, help="percent removed; default: %(default)s")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--repairs", nargs="+", choices=REPAIRS, default=list(REPAIRS), help="default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "structured.jsonl",
                        help="JSON lines; cells that are run again are replaced; default: %(default)s")  # fmt: skip
    parser.add_argument("--speed", action="store_true", help="only time a larger model, see speed_rows")
    parser.add_argument("--table", action="store_true", help="run nothing, only write the tables into README.md")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    if arguments.speed:
        arguments.table = True
        rows = [row for row in rows if row["model"] != SPEED_MODEL] + list(speed_rows())
        arguments.out.write_text("".join(json.dumps(r) + "\n" for r in rows))
    if not arguments.table:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        for name in arguments.models:
            for row in run_model(name, arguments):
                cell = {k: row[k] for k in ("model", "method", "percent")}
                rows = [old for old in rows if any(old[k] != cell[k] for k in cell)] + [row]
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                arguments.out.write_text("".join(json.dumps(r) + "\n" for r in rows))
                print(
                    f"{name:25} {row['method']:11} {row['percent']:3} %  d {row['d']:.4f}  KL {row['kl']:.4f}  "
                    f"{row['widths']}, {row['shots']} shots, prefill x{row['prefill_speedup']:.2f}  "
                    f"{row['seconds']:.0f} s",
                    flush=True,
                )
    replace_between(ROOT / "README.md", BEGIN, END, table(rows))


def run_model(name: str, arguments: argparse.Namespace) -> Any:
    """Yield one row per level and method."""
    folder, batch_size = str(model_folder(name, arguments)), batch_windows(name)
    model, tokenizer = load_model(folder, dtype="float32"), load_tokenizer(folder)
    length = min(context_length(model) or 256, 256)
    calibration, test = windows(tokenizer, MODELS[name], arguments.reference, length)
    layers = prunable_layers(model)
    kinds: Any = ("ffn", "heads") if find_heads(model, layers) else ("ffn",)
    consumers = consumers_of(find_groups(model, layers, kinds))
    factors = estimate_factors(model, consumers, calibration, batch_size=batch_size)
    total = sum(layer.weight.numel() for layer in layers)
    dense = evaluate(model, test, batch_size=batch_size)

    def row(method: str, percent: int, best: Shrunk, others: list[Shrunk], seconds: float) -> dict[str, Any]:
        quality = evaluate(best.model, test, dense=model, batch_size=batch_size)
        before, after = speeds([model, best.model], length)
        return {
            "model": name,
            "method": method,
            "percent": percent,
            "kinds": kinds,
            "removed": 1 - sum(layer.weight.numel() for layer in prunable_layers(best.model)) / total,
            "parameters": [model.num_parameters(), best.model.num_parameters()],
            "dense_loss": dense.loss,
            "d": quality.loss - dense.loss,
            "kl": quality.kl,
            "kl_predicted": best.predicted,
            "widths": best.widths,
            "shots": best.shots,
            "other_plans": {f"{o.widths} {o.shots}": o.kl for o in others},
            "prefill_ms": [before.prefill_ms, after.prefill_ms],
            "decode_ms": [before.decode_ms, after.decode_ms],
            "prefill_speedup": before.prefill_ms / after.prefill_ms,
            "decode_speedup": before.decode_ms / after.decode_ms,
            "seconds": seconds,
            "peak_memory_bytes": peak_memory_bytes(),
            "device": model.device.type,
            "threads": torch.get_num_threads(),
            "commit": commit(),
            "versions": versions(),
        }

    for percent in arguments.levels:
        for method in arguments.methods:
            target = weights_target(model, layers, percent / 100)
            start = time.perf_counter()
            try:
                settings = replace(METHODS[method], batch_size=batch_size)
                best, others = prune_structured(model, layers, calibration, target, kinds=kinds, settings=settings)
            except InputError as error:  # FFNs alone do not hold half of the weights
                print(f"{name} {percent} %: {error}", flush=True)
                continue
            seconds, cut = time.perf_counter() - start, best.model
            for repair in ["none"] if settings.refit else arguments.repairs:  # a refit is instead of a reconstruction
                own_text = REPAIRS[repair]
                if own_text is None:
                    yield row(method, percent, best, others, seconds)
                elif not own_text or method == "kfac":
                    start, best = time.perf_counter(), replace(best, model=deepcopy(cut))
                    repaired = Reconstruction(RECONSTRUCT, own_text=own_text)
                    reconstruct_smaller(model, best.model, layers, factors, calibration, repaired)
                    yield row(f"{method}+{repair}", percent, best, others, seconds + time.perf_counter() - start)


def speed_rows() -> Any:
    """Time a Llama of 100 million parameters with random weights, its blocks cut to what is left in every level.

    Speed does not depend on which units go, so the first ones stay and nothing is compensated.
    """
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=512,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    layers = prunable_layers(model)
    total = sum(layer.weight.numel() for layer in layers)
    for percent, width, groups in ((25, 2112, 6), (50, 1408, 4)):
        cuts = []
        for group in find_groups(model, layers, ("ffn", "heads")):
            kept = group.everything()[: width if isinstance(group, FfnUnits) else groups]
            weight = group.consumer.weight[:, group.columns(kept)]
            cuts.append(Cut(group, kept, weight, group.consumer.bias))
        smaller = shrink(model, cuts, plain=True)
        before, after = speeds([model, smaller], 256)
        row = {
            "model": SPEED_MODEL,
            "method": "speed",
            "percent": percent,
            "removed": 1 - sum(layer.weight.numel() for layer in prunable_layers(smaller)) / total,
            "parameters": [model.num_parameters(), smaller.num_parameters()],
            "prefill_ms": [before.prefill_ms, after.prefill_ms],
            "decode_ms": [before.decode_ms, after.decode_ms],
            "prefill_speedup": before.prefill_ms / after.prefill_ms,
            "decode_speedup": before.decode_ms / after.decode_ms,
            "device": model.device.type,
            "threads": torch.get_num_threads(),
            "commit": commit(),
            "versions": versions(),
        }
        print(row, flush=True)
        yield row


def table(rows: list[dict[str, Any]]) -> str:
    """Loss increase per model, method and level."""
    lines = ["| model | method | " + " | ".join(f"{p}%" for p in LEVELS) + " |", "|---|---|" + "---|" * len(LEVELS)]
    cells = {(r["model"], r["method"], r["percent"]): r for r in rows}
    for model in MODELS:
        for method, label in LABELS.items():
            found = [cells.get((model, method, percent)) for percent in LEVELS]
            if any(found):
                figures = (f"{r['d']:.4f}" if r and r["d"] < 0.1 else f"{r['d']:.3f}" if r else "–" for r in found)
                lines.append(f"| {model} | {label} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
