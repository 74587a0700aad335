"""What a sentence-embedding model loses: how far its vectors move and which neighbours they keep, per method and level.

Sentences are those of WikiText-2, 5 to 60 words long: 512 of the training text to calibrate on, 2,000 others of the
test and validation texts to measure on. Methods, rows and table are in the style of scripts/benchmark_quality.py; the
level "ffn 20%" makes the model smaller by a fifth of its block weights, all of them hidden FFN units.

    python scripts/benchmark_embedding.py --model FOLDER --out benchmarks/embedding.jsonl
    python scripts/benchmark_embedding.py --model FOLDER --missing      # only cells not yet there
    python scripts/benchmark_embedding.py --table                       # only rewrite README's table
"""

import argparse
import re
from itertools import product
from pathlib import Path
from typing import Any

import torch
from benchmark_quality import (
    NAMES,
    ROOT,
    cell_name,
    circumstances,
    pruned_copy,
    put_row,
    read_rows,
    replace_between,
)
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from kfac_prune.bench import Bench, timed
from kfac_prune.block_training import Reconstruction
from kfac_prune.config import RECONSTRUCT
from kfac_prune.curvature.estimate import participants
from kfac_prune.data import Document, sequence_windows
from kfac_prune.inputs import choose_texts
from kfac_prune.loading import load_config, load_model, load_tokenizer
from kfac_prune.models import prunable_layers
from kfac_prune.objective import find_objective
from kfac_prune.structure.prune import Settings, prune_structured, weights_target
from kfac_prune.structure.repair import reconstruct_smaller

SAMPLES, TEST_SENTENCES, SEQLEN, BATCH = 512, 2000, 128, 16
STRUCTURED = "ffn 20%"
#: Columns and, with each of ``REPAIRS``, rows of the table.
LEVELS = ("30%", "50%", "70%", "2:4", STRUCTURED)
TRIED = ("magnitude", "wanda", "layerwise", "kfac")
REPAIRS = ("none", "reconstruction")
BEGIN, END = "<!-- embedding table: begin -->", "<!-- embedding table: end -->"


def main() -> None:
    """Run the cells that were asked for, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of the sentence-embedding model, such as all-MiniLM-L6-v2")
    parser.add_argument("--reference", type=Path, default=ROOT.parent / "shared" / "reference",
                        help="folder with text/; default: %(default)s")  # fmt: skip
    parser.add_argument("--methods", nargs="+", choices=TRIED, default=TRIED, help="default: all")
    parser.add_argument("--repairs", nargs="+", choices=REPAIRS, default=REPAIRS, help="default: all")
    parser.add_argument("--levels", nargs="+", default=LEVELS, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "embedding.jsonl",
                        help="JSON lines; cells that are run again are replaced; default: %(default)s")  # fmt: skip
    parser.add_argument("--missing", action="store_true", help="leave out cells that --out has")
    parser.add_argument("--table", action="store_true", help="run nothing, only write the table into README.md")
    arguments = parser.parse_args()
    if not arguments.table:
        if arguments.model is None:
            parser.error("--model is needed, but for --table")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        benchmark = Benchmark(arguments)
        for level, method in product(arguments.levels, arguments.methods):
            benchmark.run(method, level)
    replace_between(ROOT / "README.md", BEGIN, END, table(read_rows(arguments.out)))


def sentences(*files: Path) -> list[Document]:
    """Sentences of 5 to 60 words without unknown ones, in the order of the files; headings left out."""
    found = []
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            if not line.startswith(" ="):
                text = re.sub(r" @(.)@ ", r"\1", line)  # WikiText writes "17 @-@ match"
                found += [f"{part.strip()} ." for part in text.split(" . ") if "<unk>" not in part]
    return [Document(text, True) for text in found if 5 <= len(text.split()) - 1 <= 60]


class Benchmark:
    """The model with all that its cells share, computed when first needed.

    Args:
        arguments: of the command line.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.name = Path(arguments.model).name
        self.objective = find_objective("embedding", arguments.model, load_config(arguments.model))
        model = load_model(arguments.model, dtype="float32")
        tokenizer, text = load_tokenizer(arguments.model), arguments.reference / "text"
        texts, tests = choose_texts(
            sentences(text / "wikitext2_train.txt"),
            sentences(text / "wikitext2_test.txt", text / "wikitext2_valid.txt"),
            (SAMPLES, TEST_SENTENCES), seed=0, share=0.0,
        )  # fmt: skip
        calibration = sequence_windows(tokenizer, texts, SEQLEN)
        test = sequence_windows(tokenizer, sorted(tests, key=len), SEQLEN)  # alike in length: little padding
        layers = participants(model, prunable_layers(model), calibration, self.objective)
        self.bench = Bench(model, calibration, test, layers=layers, objective=self.objective, batch_size=BATCH)
        self.reconstruction = Reconstruction(RECONSTRUCT, objective=self.objective)
        self.dense = self.vectors(model)

    @torch.inference_mode()
    def vectors(self, model: PreTrainedModel) -> Tensor:
        """Of the test sentences, [N, d]."""
        batches = self.bench.test.batches(BATCH)
        return torch.cat([self.objective.output(model, batch.input_ids, batch.attention_mask) for batch in batches])

    def run(self, method: str, level: str) -> None:
        """The cells of one method at one level: one shot, then reconstructed from there."""
        rows = read_rows(self.arguments.out) if self.arguments.missing else []
        done = {(r["model"], r["method"], r["level"]) for r in rows}
        wanted = [r for r in self.arguments.repairs if (self.name, cell_name(method, r), level) not in done]
        if wanted and not (level == STRUCTURED and method == "wanda"):  # it has no saliency of units
            (self.shrink if level == STRUCTURED else self.mask)(method, level, wanted)

    def mask(self, method: str, level: str, wanted: list[str]) -> None:
        """Zeros, in place."""
        copy = pruned_copy(self.bench, method, level)
        plan = copy.plan
        figures = {"allocation": plan.allocation, "sparsity": plan.sparsity, "kl_predicted": plan.predicted}
        for repair in wanted:
            copy.restart()
            if repair == "reconstruction":
                copy.reconstruct(self.reconstruction)
            self.write(cell_name(method, repair), level, copy.model, figures, copy.seconds)

    def shrink(self, method: str, level: str, wanted: list[str]) -> None:
        """A smaller model; no refit, since these blocks normalise what they add to the residual stream."""
        target = weights_target(self.bench.model, self.bench.layers, 0.2)
        settings = Settings(method=method, refit=False, objective=self.objective, batch_size=BATCH)  # type: ignore[arg-type]
        bench, seconds = self.bench, dict[str, float]()
        with timed(seconds, "plan"):
            best, _ = prune_structured(
                bench.model, bench.layers, bench.calibration, target, kinds=("ffn",), settings=settings
            )
        figures = {
            "widths": best.widths,
            "shots": best.shots,
            "sparsity": target.saved(best.model) / sum(layer.weight.numel() for layer in bench.layers),
            "kl_predicted": best.predicted,
        }
        for repair in wanted:
            if repair == "reconstruction":
                factors = bench.factors
                with timed(seconds, "repair"):
                    reconstruct_smaller(
                        bench.model, best.model, bench.layers, factors, bench.calibration, self.reconstruction
                    )
            self.write(cell_name(method, repair), level, best.model, figures, seconds)

    def write(
        self, method: str, level: str, model: PreTrainedModel, figures: dict[str, Any], seconds: dict[str, float]
    ) -> None:
        """Measure a model and add a cell to the file, or replace it there."""
        pruned = self.vectors(model)
        row = {
            "model": self.name,
            "method": method,
            "level": level,
            **figures,
            "kl": float(self.objective.divergence(self.dense, pruned).double().mean()),
            **self.objective.likeness(self.dense, pruned),
            "samples": SAMPLES,
            "test_sentences": len(self.bench.test),
            **circumstances(self.bench.model, seconds),
        }
        put_row(self.arguments.out, row)
        print(
            f"{method:24} {level:>7}  ½ distance² {row['kl']:.4f}  predicted {row['kl_predicted']:.4f}  "
            f"cosine {row['cosine']:.4f}  neighbours {row['neighbours_kept']:.3f}  {row['seconds']}",
            flush=True,
        )


def table(rows: list[dict[str, Any]]) -> str:
    """Cosine and neighbours kept per method and level."""
    lines = ["| method | " + " | ".join(LEVELS) + " |", "|---|" + "---|" * len(LEVELS)]
    cells = {(r["method"], r["level"]): f"{r['cosine']:.3f} / {r['neighbours_kept']:.2f}" for r in rows}
    for repair, method in product(REPAIRS, TRIED):
        found = [cells.get((cell_name(method, repair), level), "–") for level in LEVELS]
        if any(one != "–" for one in found):
            label = NAMES[method] + ("" if repair == "none" else f" + {repair}")
            label = f"**{label} (default)**" if (method, repair) == ("kfac", "reconstruction") else label
            lines.append(f"| {label} | " + " | ".join(found) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
