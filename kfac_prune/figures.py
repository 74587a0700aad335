"""Trade-off curves as a picture; needs matplotlib (the extra ``plot``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

#: Said where a picture is missing.
HOW_TO_GET = 'no picture: matplotlib is not installed; pip install "kfac-prune[plot]"'


@dataclass(frozen=True)
class Curve:
    """One line of a panel, and single points beside it in the same colour.

    Attributes:
        label: in the legend.
        points: (x, y) of the line, in order.
        spread: half-width of every point's error bar in y; empty for none.
        marks: (x, y) of the diamonds, such as n:m patterns.
        color: as matplotlib names colours.
        dashed: the line is.
    """

    label: str
    points: Sequence[tuple[float, float]]
    spread: Sequence[float] = ()
    marks: Sequence[tuple[float, float]] = ()
    color: str = "black"
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        x: label of the horizontal axis.
        y: label of the vertical axis.
        curves: to draw.
        dense: y of the dense model, a dotted line; None for no such line.
        log: the vertical axis is logarithmic.
        percent: the horizontal axis counts in percent.
    """

    x: str
    y: str
    curves: Sequence[Curve]
    dense: float | None = None
    log: bool = False
    percent: bool = False


def draw(panels: Sequence[Panel], path: Path, *, title: str, marks: str = "") -> bool:
    """Write panels side by side as a PNG, with one legend.

    Args:
        panels: all with the same curves' labels.
        path: of the file.
        title: above all panels.
        marks: what the diamonds stand for; empty where there are none.

    Returns:
        False, and no file, without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogFormatter
    except ImportError:
        return False

    class Plain(LogFormatter):
        """Labels the ticks that matplotlib would, as 0.6 instead of 6e-01."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    figure = Figure(figsize=(1.5 + 5.5 * len(panels), 4.5), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for curve in panel.curves:
            style = {"color": curve.color, "linestyle": "--" if curve.dashed else "-"}
            if curve.points:
                axes.errorbar(
                    *zip(*curve.points, strict=True), yerr=curve.spread or None, marker="o", markersize=4, capsize=2,
                    label=curve.label, **style,
                )  # fmt: skip
            if curve.marks:
                face = "white" if curve.dashed else curve.color
                label = None if curve.points else curve.label
                axes.plot(*zip(*curve.marks, strict=True), "D", color=curve.color, markerfacecolor=face, label=label)
        if panel.dense is not None:
            axes.axhline(panel.dense, linestyle=":", color="black", label="dense")
        if marks:
            axes.plot([], [], "D", color="black", label=f"diamonds: {marks}")
        axes.set(xlabel=panel.x, ylabel=panel.y)
        if panel.percent:
            axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.3g}%")
        if panel.log:
            axes.set_yscale("log")
            for side in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                side(Plain(labelOnlyBase=False))
        axes.grid(alpha=0.3, which="both" if panel.log else "major")
    found = {label: h for axes in figure.axes for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    labels = [label for label in dict.fromkeys([c.label for c in panels[0].curves] + list(found)) if label in found]
    figure.legend([found[label] for label in labels], labels, loc="outside right center")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    return True
