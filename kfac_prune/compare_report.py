"""The cells of a comparison as a table and as trade-off curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from kfac_prune.bench import SHARED_STAGES
from kfac_prune.figures import Curve, Panel, draw

COLORS = (
    "#1f6fb4", "#e08a1e", "#2f9e44", "#c92a2a", "#8e5bb5", "#7a4e2d", "#d6579b", "#8a8a8a", "#a3a312", "#17a2b8",
    "#0b3d62", "#f4b183", "#94d82d", "#ff6b6b", "#3b3b3b",
)  # fmt: skip
#: Figures of one cell; see ``compare``.
Row = dict[str, Any]


def own_seconds(row: Row) -> float:
    """Of what a cell does not share with others."""
    seconds: dict[str, float] = row["seconds"]
    return sum(value for name, value in seconds.items() if name not in SHARED_STAGES)


def label_of(row: Row, *, epochs: bool = False) -> str:
    """The name of a cell's method in table and picture, with the epochs of its repair where they tell cells apart."""
    if row["repair"] == "none":
        return str(row["method"])
    return f"{row['method']} + {row['repair']}" + (f" ({row['epochs']})" if epochs else "")


def _groups(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows of every method, repair and level, whatever the seed, in their order."""
    several = len({row["epochs"] for row in rows if row["repair"] != "none"}) > 1
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["level"], label_of(row, epochs=several)), []).append(row)
    return found


def _average(rows: Sequence[Row], name: str) -> tuple[float, float]:
    """Mean and standard deviation (0 with one seed) of a figure over seeds."""
    values = [row[name] for row in rows]
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def table(dense: Row, rows: Sequence[Row]) -> str:
    """The cells as aligned text: means over seeds, with standard deviations where there are several.

    Args:
        dense: figures of the dense model.
        rows: as ``compare`` returns them.
    """

    def figure(some: Sequence[Row], name: str, form: str) -> str:
        middle, spread = _average(some, name)
        return format(middle, form) + (f" ±{spread:{form}}" if len(some) > 1 else "")

    groups = _groups(rows)
    lines = [
        ("level", "method", "sparsity", "compr.", "speed-up", "loss", "perplexity", "KL", "predicted KL", "seconds",
         "peak GB"),
        ("dense", "", "0.0%", "1.00x", "1.00x", f"{dense['loss']:.4f}", f"{dense['perplexity']:.2f}", "0", "", "", ""),
    ]  # fmt: skip
    for (level, label), some in groups.items():
        lines.append((
            level,
            label,
            f"{_average(some, 'sparsity')[0]:.1%}",
            f"{_average(some, 'compression')[0]:.2f}x",
            f"{_average(some, 'speed_up')[0]:.2f}x",
            figure(some, "loss", ".4f"),
            figure(some, "perplexity", ".2f"),
            figure(some, "kl", ".4f"),
            figure(some, "kl_predicted", ".4f"),
            f"{mean(map(own_seconds, some)):.1f}",
            f"{max(row['peak_memory_bytes'] for row in some) / 1e9:.2f}",
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [f"{{:{'<' if i < 2 else '>'}{width}}}" for i, width in enumerate(widths)]
    text = ["  ".join(aligned).format(*line).rstrip() for line in lines]
    spent = {name: [row["seconds"][name] for row in rows if name in row["seconds"]] for name in SHARED_STAGES}
    shared = ", ".join(f"{name} {mean(values):.1f} s" for name, values in spent.items() if values)
    notes = [
        f"Loss and KL(dense‖pruned) in nats per token, on {dense['tokens']:,} held-out tokens; predicted KL before any "
        "reconstruction.",
        f"compr. = {dense['parameters']:,} parameters over those left; speed-up = {dense['multiply_adds']:,} "
        "multiply-adds of weights per token",
        "over those left (theoretical; experts by their mean share of tokens; products within attention not counted).",
        f"Seconds of planning and repair; shared by all methods of a seed: {shared}. Peak memory of the process, per "
        "cell.",
    ]
    seeds = sorted({len(some) for some in groups.values()})
    if seeds[-1] > 1:
        many = " or ".join(map(str, seeds))
        notes.append(f"Means of {many} seeds (calibration windows and sampled labels) ± standard deviation.")
    return "\n".join([*text, "", *notes])


def picture(dense: Row, rows: Sequence[Row], path: Path, *, title: str) -> bool:
    """KL against sparsity and perplexity against compression, one line per method, diamonds for n:m patterns.

    Args:
        dense: figures of the dense model.
        rows: as ``compare`` returns them.
        path: of the PNG.
        title: of the model.

    Returns:
        False without matplotlib.
    """
    groups = _groups(rows)
    least = min((row["epochs"] for row in rows if row["epochs"]), default=0)

    def tint(row: Row) -> tuple[str, int]:  # what is reconstructed for longer than others has a colour of its own
        return row["method"], max(row["epochs"], least)

    tints = list(dict.fromkeys(map(tint, rows)))
    labels = dict.fromkeys(label for _, label in groups)

    def curves(x: str, y: str) -> list[Curve]:
        made = []
        for label in labels:
            some = [group for (_, name), group in groups.items() if name == label]
            lines = [g for g in some if ":" not in g[0]["level"]]
            marks = [g for g in some if ":" in g[0]["level"]]
            lines.sort(key=lambda g: float(g[0]["sparsity"]))
            spread = [_average(g, y)[1] for g in lines]
            made.append(
                Curve(
                    label,
                    [(_average(g, x)[0], _average(g, y)[0]) for g in lines],
                    spread=spread if any(spread) else (),
                    marks=[(_average(g, x)[0], _average(g, y)[0]) for g in marks],
                    color=COLORS[tints.index(tint(some[0][0])) % len(COLORS)],
                    dashed=some[0][0]["repair"] != "none",
                )
            )
        return made

    patterns = dict.fromkeys(row["level"] for row in rows if ":" in row["level"])
    left = Panel(
        "sparsity of the pruned layers", "KL(dense‖pruned), nats per token", curves("sparsity", "kl"), log=True,
        percent=True,
    )  # fmt: skip
    right = Panel(
        "compression (parameters, dense over left)", "held-out perplexity", curves("compression", "perplexity"),
        dense=dense["perplexity"], log=True,
    )  # fmt: skip
    return draw([left, right], path, title=title, marks=", ".join(patterns))
