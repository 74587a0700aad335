"""Estimated against measured: seconds and peak memory of every stage of ``prune`` on the reference models.

For each case a process estimates, another one prunes, a third one estimates again; estimated seconds are the mean of
both, since a machine's speed changes while others use it. Measured seconds are those of the processor (with one thread,
OMP_NUM_THREADS=1, what the run would take on a core of its own); the seconds on the clock are in the rows too.

    OMP_NUM_THREADS=1 python scripts/benchmark_estimate.py --cases wikitext2-llama babyllama-24
    python scripts/benchmark_estimate.py --table                        # only rewrite README's table
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STORIES = {"separator": "\n\n"}
#: What README calls it, model, text, and the options of the run; in the order of README's table.
CASES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "wikitext2-llama-short": (
        "wikitext2-llama, 32 windows, uniform, 4 epochs",
        "wikitext2-llama",
        "wikitext2",
        {"samples": 32, "reconstruct": 4, "allocation": "uniform"},
    ),
    "stories260K": (
        "stories260K, 64 windows, 4 epochs",
        "stories260K",
        "tinystories",
        {**STORIES, "samples": 64, "reconstruct": 4},
    ),
    "babyllama": (
        "babyllama-tok361, 64 windows, 4 epochs",
        "babyllama-tok361",
        "tinystories",
        {**STORIES, "samples": 64, "reconstruct": 4},
    ),
    "babyllama-24": (
        "babyllama-tok361, 2:4, no permutation, 2 epochs",
        "babyllama-tok361",
        "tinystories",
        {**STORIES, "pattern": "2:4", "permute": False, "reconstruct": 2},
    ),
    "wikitext2-llama": (
        "wikitext2-llama, 128 windows, no repair",
        "wikitext2-llama",
        "wikitext2",
        {"reconstruct": 0, "refit": False, "shots": 1},
    ),
}
BEGIN, END = "<!-- estimate table: begin -->", "<!-- estimate table: end -->"


def main() -> None:
    """Measure and print the cases that were asked for, one row each, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "estimate.jsonl",
                        help="JSON lines; cases that are run again are replaced; default: %(default)s")  # fmt: skip
    parser.add_argument("--reference", type=Path, default=ROOT.parent / "shared" / "reference", help="models and texts")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[*CASES], help="default: all")
    parser.add_argument("--table", action="store_true", help="run nothing, only write the table into README.md")
    arguments = parser.parse_args()
    from benchmark_quality import put_row, read_rows, replace_between

    for case in [] if arguments.table else arguments.cases:
        _, model, text, options = CASES[case]
        folder = arguments.reference
        given = {
            "model": str(folder / "models" / model),
            "data": str(folder / "text" / f"{text}_train.txt"),
            "eval_data": str(folder / "text" / f"{text}_valid.txt"),
            "device": "cpu",
            **options,
        }
        row = compared(case, options, fresh(estimated, given), fresh(measured, given), fresh(estimated, given))
        put_row(arguments.out, row, ("case",))
        tell(row)
    replace_between(ROOT / "README.md", BEGIN, END, table(read_rows(arguments.out)))


def fresh(run: Any, given: dict[str, Any]) -> Any:
    """What a function returns in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(run, (given,))


def estimated(given: dict[str, Any]) -> dict[str, Any]:
    """The record of ``estimate``."""
    from kfac_prune.config import Recipe
    from kfac_prune.estimate import estimate

    return estimate(Recipe(out="unused", **given)).record()


def measured(given: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Per stage seconds of the processor and of the clock, and peak memory of the process up to its end."""
    import torch

    from kfac_prune.config import Recipe
    from kfac_prune.pipeline import run
    from kfac_prune.report import versions

    marks: list[tuple[str, float]] = []

    def listen(line: str) -> None:
        if line.startswith("- "):  # a stage begins
            marks.append((line[2:], time.process_time()))

    with tempfile.TemporaryDirectory() as folder:
        record = run(Recipe(out=f"{folder}/pruned", **given), echo=listen)
    marks.append(("", time.process_time()))
    stages = {
        name: {
            "seconds": round(marks[i + 1][1] - begin, 3),
            "clock_seconds": record["stages"][name]["seconds"],
            "peak_bytes": record["stages"][name]["peak_memory_bytes"],
        }
        for i, (name, begin) in enumerate(marks[:-1])
    }
    return {"stages": stages, "versions": versions(), "threads": torch.get_num_threads()}  # type: ignore[dict-item]


def compared(case: str, options: dict[str, Any], before: Any, found: Any, after: Any) -> dict[str, Any]:
    """One row: estimated and measured, stage by stage and in all."""
    from benchmark_quality import commit

    stages: dict[str, Any] = {name: {"estimated_seconds": 0.0, **was} for name, was in found["stages"].items()}
    for name, row in before["stages"].items():
        stage = stages[name.split(":")[0]]  # the plan has two parts
        stage["estimated_seconds"] += (row["seconds"] + after["stages"][name]["seconds"]) / 2
        stage["estimated_peak_bytes"] = row["peak_host_bytes"]
    total = sum(stage["estimated_seconds"] for stage in stages.values())
    took = sum(stage["seconds"] for stage in stages.values())
    peak = max(stage["peak_bytes"] for stage in stages.values())
    return {
        "case": case,
        "options": options,
        "estimated_seconds": total,
        "estimates": [before["seconds"], after["seconds"]],
        "seconds": took,
        "time_ratio": total / took,
        "estimated_peak_bytes": before["peak_host_bytes"],
        "peak_bytes": peak,
        "memory_ratio": before["peak_host_bytes"] / peak,
        "stages": stages,
        "commit": commit(),
        "versions": found["versions"],
        "threads": found["threads"],
    }


def tell(row: dict[str, Any]) -> None:
    """Print a row as a small table."""
    print(f"{row['case']} {row['options']}")
    for name, stage in row["stages"].items():
        time = f"{stage['estimated_seconds']:9.2f} s estimated {stage['seconds']:9.2f} s measured"
        memory = f"{stage['estimated_peak_bytes'] / 1e6:9.0f} MB estimated {stage['peak_bytes'] / 1e6:9.0f} MB measured"
        print(f"  {name:18}{time}{memory}")
    time = f"{row['estimated_seconds']:9.2f} s estimated {row['seconds']:9.2f} s measured"
    print(
        f"  {'all':18}{time}  time {row['time_ratio']:.2f}, memory {row['memory_ratio']:.2f} of the measured",
        flush=True,
    )


def table(rows: list[dict[str, Any]]) -> str:
    """README's table."""
    lines = [
        "| case | seconds estimated / measured | ratio | peak memory estimated / measured | ratio |",
        "|---|---|---|---|---|",
    ]
    cells = {row["case"]: row for row in rows}
    for label, row in [(label, cells[case]) for case, (label, *_) in CASES.items() if case in cells]:
        seconds = f"{row['estimated_seconds']:.1f} / {row['seconds']:.1f} | {row['time_ratio']:.2f}"
        peak = f"{row['estimated_peak_bytes'] / 1e6:.0f} / {row['peak_bytes'] / 1e6:.0f} MB | {row['memory_ratio']:.2f}"
        lines.append(f"| {label} | {seconds} | {peak} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
