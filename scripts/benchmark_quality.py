"""Quality on the reference models: increase of test loss, KL and prediction, per method and level.

The protocol is that of the reference folder: T = min(context, 256); calibration on 128 windows at seeded random starts
of the training text (SmolLM2: 64); test on the first 200 consecutive windows of the test text (SmolLM2: 100). Every
method is measured in one shot and with the same reconstruction on the calibration text alone, K-FAC also with the
closed-form refit and reconstructed on text of the model's own too. Every cell is one JSON line with commit, device and
versions; the table in README.md is written from those lines.

    python scripts/benchmark_quality.py --models wikitext2-llama babyllama-tok361 --out benchmarks/quality.jsonl
    python scripts/benchmark_quality.py --models smollm2-135m --larger FOLDER --missing   # only cells not yet there
    python scripts/benchmark_quality.py --table --out benchmarks/quality.jsonl      # only rewrite README's table
"""

import argparse
import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from kfac_prune.bench import Bench, PrunedCopy
from kfac_prune.block_training import Reconstruction
from kfac_prune.config import OWN_TEXT, RECONSTRUCT, parse_pattern
from kfac_prune.data import Windows, consecutive_windows, read_documents, sample_windows, token_stream
from kfac_prune.loading import context_length, load_model, load_tokenizer
from kfac_prune.obs import NM
from kfac_prune.report import peak_memory_bytes, versions

ROOT = Path(__file__).resolve().parents[1]
WIKITEXT, STORIES = ("wikitext2_train.txt", "wikitext2_test.txt"), ("tinystories_train.txt", "tinystories_test.json")


@dataclass(frozen=True)
class Subject:
    """A model, its texts and its protocol.

    Attributes:
        texts: to calibrate and to test on.
        levels: sparsities and patterns.
        separator: of the training text's documents.
        samples: calibration windows.
        test_windows: to measure on.
        larger: it lies in the folder of --larger.
    """

    texts: tuple[str, str]
    levels: tuple[str, ...]
    separator: str | None = None
    samples: int = 128
    test_windows: int = 200
    larger: bool = False


ALL_LEVELS = ("50%", "60%", "70%", "80%", "2:4", "4:8")
MODELS = {
    "wikitext2-llama": Subject(WIKITEXT, ALL_LEVELS),
    "babyllama-tok361": Subject(STORIES, ALL_LEVELS, "\n\n"),
    "stories260K": Subject(STORIES, ("50%", "60%", "70%", "2:4", "4:8"), "\n\n"),
    "chargpt-shakespeare-gpt2": Subject(("shakespeare_train.txt", "shakespeare_test.txt"), ("50%", "70%", "2:4")),
    "smollm2-135m": Subject(WIKITEXT, ("50%", "70%", "2:4"), samples=64, test_windows=100, larger=True),
}
METHODS = {
    "magnitude": "uniform",
    "wanda": "uniform",
    "sparsegpt": "uniform",
    "layerwise": "uniform",
    "kfac": "curves",
}
NAMES = {
    "magnitude": "magnitude",
    "wanda": "Wanda",
    "sparsegpt": "SparseGPT",
    "layerwise": "layer-wise (G = I)",
    "kfac": "K-FAC",
}
#: What follows the one-shot solution, in the order of the table.
REPAIRS = ("none", "refit", "reconstruction", "own-text")
LABELS = {
    "none": "",
    "refit": " + refit",
    "reconstruction": " + reconstruction",
    "own-text": " + reconstruction, own text",
}
BEGIN, END = "<!-- quality table: begin -->", "<!-- quality table: end -->"


def main() -> None:
    """Run the cells that were asked for, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, default=ROOT.parent / "shared" / "reference",
                        help="folder with models/ and text/; default: %(default)s")  # fmt: skip
    parser.add_argument("--larger", type=Path, help="folder with smollm2-135m; needed for it only")
    small = [name for name, subject in MODELS.items() if not subject.larger]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=small, help="default: the four small ones")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--repairs", nargs="+", choices=REPAIRS, default=REPAIRS, help="default: all")
    parser.add_argument("--levels", nargs="+", help="such as 50%% 2:4; default: each model's")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "quality.jsonl",
                        help="JSON lines; cells that are run again are replaced; default: %(default)s")  # fmt: skip
    parser.add_argument("--missing", action="store_true", help="leave out cells that --out has")
    parser.add_argument("--table", action="store_true", help="run nothing, only write the table into README.md")
    arguments = parser.parse_args()
    if not arguments.table:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        for name in arguments.models:
            benchmark = Benchmark(name, arguments)
            for method in arguments.methods:
                for level in arguments.levels or MODELS[name].levels:
                    benchmark.run(method, level)
    write_table(read_rows(arguments.out), ROOT / "README.md")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The cells so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def model_folder(name: str, arguments: argparse.Namespace) -> Path:
    """Where a model lies."""
    if not MODELS[name].larger:
        return Path(arguments.reference / "models" / name)
    if arguments.larger is None:
        raise SystemExit(f"{name} is not among the reference models: name the folder that holds it with --larger")
    return Path(arguments.larger / name)


def batch_windows(name: str) -> int:
    """Windows per forward pass."""
    return 4 if MODELS[name].larger else 16


def windows(tokenizer: Any, subject: Subject, reference: Path, length: int) -> tuple[Windows, Windows]:
    """Calibration and test windows of a reference model."""
    train, test = (str(reference / "text" / text) for text in subject.texts)
    stream = token_stream(tokenizer, read_documents(train, separator=subject.separator))
    held_out = token_stream(tokenizer, read_documents(test))
    calibration = sample_windows(stream, subject.samples, length, seed=0)
    return calibration, consecutive_windows(held_out, subject.test_windows, length)


def pruned_copy(bench: Bench, method: str, level: str) -> PrunedCopy:
    """A copy in one shot, with the command line's defaults; the level is a sparsity in percent or an n:m pattern."""
    groups = None if level.endswith("%") else parse_pattern(level)
    return bench.prune(
        method,  # type: ignore[arg-type]
        allocation=METHODS[method],
        sparsity=None if groups else float(level[:-1]) / 100,
        pattern=NM(*groups) if groups else None,
        permute=groups is not None and method == "kfac",
    )


class Benchmark:
    """One model with all that its cells share, computed when first needed.

    Args:
        name: of the model.
        arguments: of the command line.
    """

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self.name, self.arguments, folder = name, arguments, str(model_folder(name, arguments))
        model, tokenizer = load_model(folder, dtype="float32"), load_tokenizer(folder)
        length = min(context_length(model) or 256, 256)
        calibration, test = windows(tokenizer, MODELS[name], arguments.reference, length)
        self.bench = Bench(model, calibration, test, batch_size=batch_windows(name))

    def run(self, method: str, level: str) -> None:
        """The cells of one method at one level: one shot, then each repair from there."""
        rows = read_rows(self.arguments.out)
        done = {(r["model"], r["method"], r["level"]) for r in rows} if self.arguments.missing else set()
        wanted = [r for r in self.arguments.repairs if method == "kfac" or r in ("none", "reconstruction")]
        wanted = [r for r in wanted if (self.name, cell_name(method, r), level) not in done]
        if not wanted:
            return
        copy = pruned_copy(self.bench, method, level)
        for repair in wanted:
            if repair == "refit":
                copy.refit()
            elif repair != "none":
                copy.reconstruct(Reconstruction(RECONSTRUCT, own_text=OWN_TEXT if repair == "own-text" else 0))
            else:
                copy.restart()
            self.write(cell_name(method, repair), level, copy)

    def write(self, method: str, level: str, copy: PrunedCopy) -> None:
        """Add a cell to the file, or replace it there."""
        quality, dense, plan = copy.measure(), self.bench.dense, copy.plan
        row = {
            "model": self.name,
            "method": method,
            "level": level,
            "allocation": plan.allocation,
            "sparsity": plan.sparsity,
            "dense_loss": dense.loss,
            "d": quality.loss - dense.loss,
            "kl": quality.kl,
            "kl_predicted": plan.predicted,
            **circumstances(copy.model, copy.seconds),
        }
        put_row(self.arguments.out, row)
        print(
            f"{self.name:25} {method:24} {level:>4}  d {row['d']:.4f}  KL {quality.kl:.4f}  predicted "
            f"{plan.predicted:.4f}  {row['seconds']}",
            flush=True,
        )


def circumstances(model: torch.nn.Module, seconds: dict[str, float]) -> dict[str, Any]:
    """What every row tells of how it came about."""
    return {
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "peak_memory_bytes": peak_memory_bytes(),
        "device": next(model.parameters()).device.type,
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "versions": versions(),
    }


def put_row(path: Path, row: dict[str, Any], cell: Sequence[str] = ("model", "method", "level")) -> None:
    """Add a cell to a file of JSON lines, or replace it there."""
    rows = [old for old in read_rows(path) if any(old[k] != row[k] for k in cell)] + [row]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def cell_name(method: str, repair: str) -> str:
    """The name of a method in the rows."""
    return method if repair == "none" else f"{method}+{repair}"


def write_table(rows: list[dict[str, Any]], readme: Path) -> None:
    """Replace the table between the two markers of README.md."""
    lines = ["| model | method | " + " | ".join(ALL_LEVELS) + " |", "|---|---|" + "---|" * len(ALL_LEVELS)]
    cells = {(r["model"], r["method"], r["level"]): r for r in rows}
    for model in MODELS:
        for repair in REPAIRS:
            for method in METHODS:
                found = [cells.get((model, cell_name(method, repair), level)) for level in ALL_LEVELS]
                if any(found):
                    figures = (f"{r['d']:.4f}" if r and r["d"] < 0.1 else f"{r['d']:.3f}" if r else "–" for r in found)
                    label = NAMES[method] + LABELS[repair]
                    if (method, repair) == ("kfac", "own-text"):
                        label = f"**{label} (default)**"
                    lines.append(f"| {model} | {label} | " + " | ".join(figures) + " |")
    replace_between(readme, BEGIN, END, "\n".join(lines))


def replace_between(path: Path, begin: str, end: str, content: str) -> None:
    """Replace what stands between two marker lines of a file."""
    head, _, rest = path.read_text().partition(begin)
    _, _, tail = rest.partition(end)
    path.write_text(f"{head}{begin}\n{content}\n{end}{tail}")


def commit() -> str:
    """Of the checkout; empty where there is none, or no git."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False).stdout.strip()
    except OSError:
        return ""


if __name__ == "__main__":
    main()
