"""The theory page: the template in ``assets`` with figures, tables and pictures put in."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from kfac_prune.theory.pictures import PICTURES
from kfac_prune.theory.sweep import NAMES

TEMPLATE = Path(__file__).parents[1] / "assets" / "theory.html"
CAPTIONS = {
    "sweep": "True increase of the training loss, as a share of magnitude's with nothing moved; lower is better.",
    "predicted": "Each rule's own prediction against the truth; points below 0.0001 are not drawn.",
    "selection": "Solid: true increase of the loss; dotted: predicted by the same H.",
    "gradient": "Training loss after pruning and compensation, three curvatures.",
    "indefinite": "Left: exact Hessians by automatic differentiation. Middle and right: the network stopped early.",
    "start": "Left: training loss, weight decay included. Right: accuracy on images that were not learnt.",
}


def render(record: dict[str, Any], folder: Path) -> str:
    """The page as HTML.

    Args:
        record: theory.json.
        folder: with the pictures, which are put into the page itself.
    """
    four, two, states, network = (record[key] for key in ("four_weights", "two_weights", "states", "network"))
    dense = states["converged"]
    values = {
        "weights": f"{network['weights']:,}",
        "images": f"{network['images']:,}",
        "seed": network["seed"],
        "hidden": network["hidden"],
        "decay": f"{network['decay']:g}",
        "early": network["early"],
        "retraining": network["retraining"],
        "studied": f"{record['damping']['sparsity']:.0%}",
        "early_loss": f"{states['stopped early']['loss']:.3f}",
        "loss": f"{dense['loss']:.4f}",
        "gradient_norm": f"{dense['gradient_norm']:.0e}",
        "accuracy": f"{dense['accuracy']:.1%}",
        "four_saliencies": "".join(f"<td>{value:.3g}</td>" for value in four["saliency_obd"]),
        "four_magnitude": four["removed_by_magnitude"],
        "four_obd": four["removed_by_obd"],
        "four_loss_magnitude": f"{four['loss_magnitude']:.2f}",
        "four_loss_obd": f"{four['loss_obd']:.3f}",
        "two_without": f"{two['loss_without_move']:g}",
        "two_with": f"{two['loss_compensated']:.3f}",
        "two_moved": f"{two['compensated'][1]:.1f}",
        "table_sweep": _sweep_table(record["sweep"]),
        "table_trust": _trust_table(record["trust"]),
        "table_states": _states_table(states),
        "table_start": _by_level(
            record["start"],
            "rule",
            "loss",
            "Training loss, nats per image",
            {r["rule"]: r["rule"] for r in record["start"]},
        ),
    }
    values |= {f"picture_{name}": _picture(folder / f"{name}.png", CAPTIONS[name]) for name in PICTURES}
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(values)


def _picture(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{escape(caption)}"><figcaption>{escape(caption)}'
        "</figcaption></figure>"
    )


def _table(caption: str, head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [f"<table><caption>{escape(caption)}</caption>", _row("th", head), *(_row("td", row) for row in rows)]
    return "\n".join([*lines, "</table>"])


def _row(tag: str, cells: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _by_level(rows: list[dict[str, Any]], key: str, value: str, caption: str, labels: dict[str, str]) -> str:
    """One line per label, one column per sparsity."""
    levels = sorted({row["sparsity"] for row in rows})
    cells = {(row[key], row["sparsity"]): f"{row[value]:.4f}" for row in rows}
    lines = [[label, *(cells.get((name, level), "–") for level in levels)] for name, label in labels.items()]
    return _table(caption, [key, *(f"{level:.0%}" for level in levels)], lines)


def _sweep_table(rows: list[dict[str, Any]]) -> str:
    """Each rule with its own compensation, and the better ways to choose the set."""
    own = [row for row in rows if row["compensation"] == "own"]
    labels = {
        **{f"saliency {name}": label for name, label in NAMES.items()},
        "joint kfac": "K-FAC, mask and weights jointly",
        "joint ekfac": "EK-FAC, mask and weights jointly",
        "greedy exact": "exact OBS, one weight at a time",
        "joint exact": "exact OBS, mask and weights jointly",
    }
    named = [{**row, "rule": f"{row['mask']} {row['method']}"} for row in own]
    return _by_level(
        named, "rule", "loss", "True increase of the training loss, own compensation, nats per image", labels
    )


def _trust_table(rows: list[dict[str, Any]]) -> str:
    return _table(
        "Damping beyond δ, and what the Newton step alone gains, nats per image",
        ["rule", "damping", "predicted", "true"],
        [[NAMES[r["method"]], f"{r['damping']:.2g}", f"{r['predicted']:.4f}", f"{r['true']:.4f}"] for r in rows],
    )


def _states_table(states: dict[str, dict[str, Any]]) -> str:
    return _table(
        "The exact Hessian of the loss",
        ["state", "loss", "gradient", "negative", "smallest", "largest", "λ by the rule"],
        [
            [
                name,
                f"{s['loss']:.3f}",
                f"{s['gradient_norm']:.1e}",
                f"{s['negative']} of {len(s['eigenvalues']):,}",
                f"{s['smallest']:.2g}",
                f"{s['largest']:.2g}",
                "refused" if s["added"] is None else f"{s['added']:.2g}",
            ]
            for name, s in states.items()
        ],
    )
