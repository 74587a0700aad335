"""README's tables of speed, from the rows that benchmark_cpu.py and benchmark_gpu.py leave in benchmarks/.

Where one of the files is missing the table says that nothing of it has been measured.

    python scripts/benchmark_cpu.py         # one thread: OMP_NUM_THREADS=1
    python scripts/benchmark_gpu.py --out benchmarks/gpu.jsonl
    python scripts/performance_table.py
"""

import json
from collections.abc import Sequence
from typing import Any

from benchmark_quality import ROOT, replace_between

BEGIN, END = "<!-- performance: begin -->", "<!-- performance: end -->"
#: Of a row of the GPU, what is not a size.
FIGURES = ("what", "ms", "seconds", "eager_ms", "floor_ms", "peak_bytes", "device", "commit", "versions")


def main() -> None:
    """Rewrite the tables."""
    parts = []
    for name, told in (("cpu", cpu_tables), ("gpu", gpu_table)):
        file = ROOT / "benchmarks" / f"{name}.jsonl"
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
        parts.append(
            told(rows) if rows else f"{name.upper()}: nothing of `scripts/benchmark_{name}.py` has been measured."
        )
    replace_between(ROOT / "README.md", BEGIN, END, "\n\n".join(parts))


def cpu_tables(rows: Sequence[dict[str, Any]]) -> str:
    """What is compared with a plain form, then how everything grows with the width."""
    cpu, threads = rows[0]["cpu"], rows[0]["threads"]
    lines = [
        f"CPU ({cpu}, {threads} thread{'s' * (threads > 1)}):",
        "",
        "| what | width | seconds | plain form | ratio | loss | of the plain form |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "ratio" in row:
            losses = " | ".join(f"{row[key]:.4f}" if key in row else "–" for key in ("loss", "plain_loss"))
            lines.append(
                f"| {row['what']}{_stops(row)} | {row['width']} | {row['seconds']:.3g} | {row['plain_seconds']:.3g} | "
                f"**{row['ratio']:.1f}** | {losses} |"
            )
    grown = [row for row in rows if "exponent" in row]
    if grown:
        widths = " | ".join(map(str, grown[0]["widths"]))
        lines += [
            "",
            f"| seconds at width | {widths} | power | of memory |",
            "|---" * (len(grown[0]["widths"]) + 3) + "|",
        ]
    for row in grown:
        times = " | ".join(f"{time:.2g}" for time in row["seconds"])
        memory = f"{row['memory_exponent']:.1f}" if "memory_exponent" in row else "–"
        lines.append(f"| {row['what'].removeprefix('growth: ')} | {times} | {row['exponent']:.1f} | {memory} |")
    return "\n".join(lines)


def _stops(row: dict[str, Any]) -> str:
    """Tolerances of the conjugate gradients, ours and the plain form's."""
    ours, plain = row.get("tolerances", (None, None))
    if ours is None:
        return ""
    return f" (stop at {ours:g})" if ours == plain else f" (stop at {ours:g}, the plain form at {plain:g})"


def gpu_table(rows: Sequence[dict[str, Any]]) -> str:
    """By device, the latest of every measurement: its time, that of eager PyTorch, the share of the floor, the peak."""
    devices: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        if "error" not in row:
            sizes = {key: value for key, value in row.items() if type(value) in (int, str) and key not in FIGURES}
            devices.setdefault(row["device"], {})[f"{row['what']} {sizes}"] = row
    return "\n\n".join(_device_table(device, list(latest.values())) for device, latest in devices.items())


def _device_table(device: str, rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"{device}:",
        "",
        "| what | size | ms | eager | ratio | share of the floor | peak GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        size = ", ".join(
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in row.items()
            if key not in FIGURES
        )
        ms = row["ms"] if "ms" in row else 1000 * row["seconds"] if "seconds" in row else None
        eager, floor, peak = row.get("eager_ms"), row.get("floor_ms"), row.get("peak_bytes")
        figures = (
            "–" if ms is None else f"{ms:.3g}",
            f"{eager:.3g}" if eager else "–",
            f"{eager / ms:.1f}" if eager and ms else "–",
            f"{floor / ms:.0%}" if floor and ms else "–",
            f"{peak / 2**30:.1f}" if peak else "–",
        )
        lines.append(f"| {row['what']} | {size} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
