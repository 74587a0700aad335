"""The pictures of the theory page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfac_prune.theory.sweep import NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = dict(
    zip(
        NAMES,
        ("#7f7f7f", "#e69f00", "#56b4e9", "#cc79a7", "#009e73", "#0072b2", "#d55e00", "#000000"),
        strict=True,
    )
)
MARKERS = dict(zip(NAMES, "osv^Dphx", strict=True))
#: Below this the picture shows nothing: dead pixels' weights cost nothing at all.
FLOOR = 1e-4


def _figure(width: float, height: float) -> Figure:
    """Matplotlib is loaded here and nowhere else."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _percent(axes: Axes) -> None:
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    axes.set_xlabel("sparsity (fraction of all weights removed)")
    axes.grid(alpha=0.3, which="major")


def _plain_log(axes: Axes) -> None:
    """A logarithmic axis over about one decade, with numbers as one writes them."""
    axes.set_yscale("log")
    axes.set_yticks([0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1, 2], minor=False)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.yaxis.set_minor_formatter(lambda y, _: "")


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=110)


def _line(rows: list[dict[str, Any]], key: str, **wanted: Any) -> list[tuple[float, float]]:
    """(sparsity, value) of the rows that have these fields."""
    return [(row["sparsity"], row[key]) for row in rows if all(row[k] == v for k, v in wanted.items())]


def draw_sweep(record: dict[str, Any], path: Path) -> None:
    """True increase of the loss over that of magnitude, against sparsity, one panel per kind of compensation."""
    figure = _figure(13, 5.6)
    panels = figure.subplots(1, 3, sharey=True)
    titles = {
        "none": "the others stay",
        "own": "the others move: optimal under the rule's own H",
        "full": "the others move: optimal under the full H",
    }
    reference = dict(_line(record["sweep"], "loss", method="magnitude", mask="saliency", compensation="none"))
    for axes, (how, title) in zip(panels, titles.items(), strict=True):
        for name, label in NAMES.items():
            line = _line(record["sweep"], "loss", method=name, mask="saliency", compensation=how)
            line = [(x, y / reference[x]) for x, y in line if reference[x] > FLOOR]
            axes.plot(*zip(*line, strict=True), color=COLORS[name], marker=MARKERS[name], ms=5, lw=1.5, label=label)
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
        axes.set_title(title, fontsize=11)
        _percent(axes)
    panels[0].set_ylabel("true increase of training loss,\nrelative to magnitude with nothing moved")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=11)
    figure.suptitle("Which weights fall: single-weight saliencies of each H, all at once", fontsize=13)
    _save(figure, path)


def draw_predicted(record: dict[str, Any], path: Path) -> None:
    """Predicted against true increase of the loss."""
    figure = _figure(11, 6)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, how, title in zip(panels, ("none", "own"), ("the others stay", "optimal under the own H"), strict=True):
        for name, label in NAMES.items():
            kind = {"method": name, "mask": "saliency", "compensation": how}
            points = [
                (x, y)
                for (_, x), (_, y) in zip(
                    _line(record["sweep"], "predicted", **kind), _line(record["sweep"], "loss", **kind), strict=True
                )
                if min(x, y) > FLOOR
            ]
            axes.plot(*zip(*points, strict=True), color=COLORS[name], marker=MARKERS[name], ms=6, lw=0.8, label=label)
        axes.plot([FLOOR, 4], [FLOOR, 4], color="black", lw=1, ls=":", label="prediction = truth")
        axes.set(xscale="log", yscale="log", xlabel="predicted: ½⟨D, H D⟩ of the rule's own H (nats per image)")
        axes.set_title(title, fontsize=11)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("true increase of training loss (nats per image)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=11)
    figure.suptitle("Prediction against truth; along a line the sparsity grows", fontsize=13)
    _save(figure, path)


def draw_selection(record: dict[str, Any], path: Path) -> None:
    """All at once, one at a time, or jointly: true loss and prediction."""
    figure = _figure(11, 5.4)
    panels = figure.subplots(1, 2, sharey=True)
    kinds = {
        "saliency": ("single saliencies, all at once", "#e69f00", "o"),
        "greedy": ("one at a time, H⁻¹ downdated", "#000000", "x"),
        "joint": ("mask and weights jointly (ADMM)", "#0072b2", "s"),
    }
    for axes, name in zip(panels, ("kfac", "exact"), strict=True):
        for mask, (label, color, marker) in kinds.items():
            for key, style, what in (("loss", "-", "true"), ("predicted", ":", "predicted")):
                line = _line(record["sweep"], key, method=name, mask=mask, compensation="own")
                line = [(x, y) for x, y in line if y > FLOOR]
                if line:
                    axes.plot(*zip(*line, strict=True), color=color, ls=style, marker=marker, ms=5,
                              label=f"{label}, {what}")  # fmt: skip
        axes.set_yscale("log")
        axes.set_title(NAMES[name], fontsize=11)
        _percent(axes)
    panels[0].set_ylabel("increase of training loss (nats per image)")
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=10)
    figure.suptitle("How the set is chosen, under the same H and with its optimal compensation", fontsize=13)
    _save(figure, path)


def draw_gradient(record: dict[str, Any], path: Path) -> None:
    """Loss after pruning a network that was stopped early, with and without the gradient term."""
    figure = _figure(13, 5.4)
    panels = figure.subplots(1, 3, sharey=True)
    kinds = {
        ("saliency", False): ("plain: no gradient", "#7f7f7f", "o"),
        ("saliency, damped", False): ("plain, with the damping of WoodTaylor", "#bbbbbb", "v"),
        ("saliency without gradient", True): ("gradient in the compensation only", "#56b4e9", "s"),
        ("saliency", True): ("gradient in choice and compensation (WoodTaylor)", "#d55e00", "D"),
    }
    start = record["states"]["stopped early"]["loss"]
    end = record["states"]["converged"]["loss"]
    for axes, name in zip(panels, ("obd", "kfac", "exact"), strict=True):
        for (mask, gradient), (label, color, marker) in kinds.items():
            line = _line(record["early"], "loss", method=name, mask=mask, gradient=gradient)
            xs, ys = zip(*((x, start + y) for x, y in line), strict=True)
            axes.plot(xs, ys, color=color, marker=marker, ms=5, label=label)
        axes.axhline(start, color="black", ls=":", label="before pruning")
        axes.axhline(end, color="black", ls="--", lw=0.8, label="the dense network, had it been trained on")
        _plain_log(axes)
        axes.set_title(NAMES[name], fontsize=11)
        _percent(axes)
    panels[0].set_ylabel("training loss after pruning (nats per image)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=10)
    figure.suptitle("A network stopped early: the gradient is not zero", fontsize=13)
    _save(figure, path)


def draw_indefinite(record: dict[str, Any], path: Path) -> None:
    """Spectra of the exact Hessian, and which weights fall as its shift grows."""
    figure = _figure(13, 5)
    left, middle, right = figure.subplots(1, 3)
    for (name, state), color in zip(record["states"].items(), ("#e69f00", "#0072b2", "#000000"), strict=True):
        left.plot(range(1, len(state["eigenvalues"]) + 1), state["eigenvalues"], color=color,
                  label=f"{name}: {state['negative']} negative")  # fmt: skip
    left.set_yscale("symlog", linthresh=1e-3)
    left.axhline(0, color="black", lw=0.5)
    left.set(xlabel="eigenvalue number, in ascending order", ylabel="eigenvalue of the exact Hessian (nats per image)")
    left.set_title("Curvature becomes positive in training", fontsize=11)
    left.legend(loc="upper left", fontsize=10)
    study = record["damping"]
    shifts = [row["added"] + record["states"]["stopped early"]["smallest"] for row in study["rows"]]
    for key, label, color, marker in (
        ("with_smallest_shift", "that fall at the smallest λ", "#d55e00", "o"),
        ("with_fisher", "that fall under the Fisher", "#0072b2", "s"),
        ("with_magnitude", "that fall by magnitude", "#7f7f7f", "v"),
    ):
        middle.plot(shifts, [row[key] for row in study["rows"]], color=color, marker=marker, ms=4, label=label)
    middle.set(ylabel=f"share of the weights removed at {study['sparsity']:.0%}")
    middle.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    middle.set_title("Which weights fall: shared with those", fontsize=11)
    for key, label, color, marker in (
        ("loss_mask_only", "the others stay", "#7f7f7f", "v"),
        ("loss_compensated", "the others move, under H + λI", "#d55e00", "o"),
    ):
        values = [max(row[key], FLOOR) for row in study["rows"]]
        right.plot(shifts, values, color=color, marker=marker, ms=4, label=label)
    right.axhline(
        max(study["loss_fisher_compensated"], FLOOR), color="#0072b2", ls="--", label="the Fisher, compensated"
    )
    right.set(yscale="log", ylabel="true increase of training loss (nats per image)")
    right.set_title("What it costs", fontsize=11)
    rule = record["states"]["stopped early"]["added"]
    for axes in (middle, right):
        axes.set(xscale="log", xlabel="smallest eigenvalue of H + λI")
        if rule is not None:
            axes.axvline(
                rule + record["states"]["stopped early"]["smallest"], color="black", ls=":", label="the rule's λ"
            )
    low, high = right.get_ylim()
    right.set_ylim(low, 4 * high)  # room for the legend
    middle.legend(loc="center right", fontsize=10)
    right.legend(loc="upper right", fontsize=10)
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    _save(figure, path)


def draw_start(record: dict[str, Any], path: Path) -> None:
    """Loss and accuracy of masks from before and after training."""
    figure = _figure(12, 5.6)
    left, right = figure.subplots(1, 2)
    rules = list(dict.fromkeys(row["rule"] for row in record["start"]))
    colors = ("#bbbbbb", "#e69f00", "#56b4e9", "#0072b2", "#d55e00", "#000000")
    for rule, color, marker in zip(rules, colors, "ov^sDx", strict=True):
        for axes, key in ((left, "loss"), (right, "accuracy")):
            line = _line(record["start"], key, rule=rule)
            axes.plot(*zip(*line, strict=True), color=color, marker=marker, ms=5, label=rule)
    dense = record["states"]["converged"]
    left.axhline(dense["loss"], color="black", ls=":", label="the dense network, converged")
    right.axhline(dense["accuracy"], color="black", ls=":")
    _plain_log(left)
    left.set(ylabel="training loss (nats per image)")
    right.set(ylabel="accuracy on test images")
    right.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    for axes in (left, right):
        _percent(axes)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=10)
    figure.suptitle("Before training, after it, and back to the start", fontsize=13)
    _save(figure, path)


#: File names without their ending, in the page's order.
PICTURES = {
    "sweep": draw_sweep,
    "predicted": draw_predicted,
    "selection": draw_selection,
    "gradient": draw_gradient,
    "indefinite": draw_indefinite,
    "start": draw_start,
}
