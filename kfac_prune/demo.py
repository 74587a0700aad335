"""The demo: a small packaged language model pruned by three methods along the sparsity axis, as table and picture."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kfac_prune.bench import Bench
from kfac_prune.curvature.factors import Method
from kfac_prune.data import consecutive_windows, read_documents, sample_windows, token_stream
from kfac_prune.export import save_model
from kfac_prune.figures import HOW_TO_GET, Curve, Panel, draw
from kfac_prune.loading import load_model, load_tokenizer
from kfac_prune.obs import NM
from kfac_prune.quality import Quality
from kfac_prune.store import check_output, earlier_result, new_folder

ASSETS = Path(__file__).parent / "assets"
METHODS: dict[Method, str] = {
    "magnitude": "magnitude (H = I)",
    "layerwise": "layer-wise (H = I ⊗ A)",
    "kfac": "K-FAC (H = G ⊗ A)",
}
#: K-FAC at 2:4 comes last: the model that is left is the one to save.
LEVELS: dict[str, float | NM] = {"50%": 0.5, "60%": 0.6, "70%": 0.7, "80%": 0.8, "2:4": NM(2, 4)}
WINDOWS, PROBED, HELD_OUT, LENGTH, BATCH = 128, 8, 64, 256, 16


def run_demo(out: str, *, echo: Callable[[str], None] = print, quiet: bool = True) -> list[dict[str, Any]]:
    """Prune the packaged model by every method at every level and write ``out``: figures, picture, pruned model.

    Args:
        out: folder; an earlier demo in it is replaced.
        echo: receives the lines meant for a person.
        quiet: show no progress bars.

    Returns:
        The rows of the table.
    """
    overwrite = earlier_result(out, ("demo.json", "kfac-2-4", "loss_vs_sparsity.png"))
    check_output(out, overwrite=overwrite)
    start = time.perf_counter()
    model = load_model(str(ASSETS / "demo_model"), dtype="float32")
    tokenizer = load_tokenizer(str(ASSETS / "demo_model"))
    calibration = token_stream(tokenizer, read_documents(str(ASSETS / "demo_calibration.jsonl")))
    held_out = token_stream(tokenizer, read_documents(str(ASSETS / "demo_heldout.jsonl")))
    windows = sample_windows(calibration, WINDOWS, LENGTH, seed=0)
    test = consecutive_windows(held_out, min(HELD_OUT, len(held_out) // LENGTH), LENGTH)
    bench = Bench(model, windows, test, batch_size=BATCH, probed=PROBED, quiet=quiet)
    echo(
        f"A Llama of {model.num_parameters():,} parameters with {len(bench.layers)} linear layers, calibrated on "
        f"{windows.tokens:,} tokens, measured on {test.tokens:,} tokens that it has never seen."
    )
    dense = bench.dense
    rows: list[dict[str, Any]] = []
    for name, level in LEVELS.items():
        for method in METHODS:
            copy = bench.prune(
                method,
                allocation="curves" if method == "kfac" else "uniform",
                sparsity=level if isinstance(level, float) else None,
                pattern=level if isinstance(level, NM) else None,
            )
            quality = copy.measure()
            rows.append(
                {
                    "level": name,
                    "method": method,
                    "sparsity": copy.plan.sparsity,
                    "loss": quality.loss,
                    "perplexity": quality.perplexity,
                    "kl_predicted": copy.plan.predicted,
                    "kl_measured": quality.kl,
                }
            )
            echo(f"  {name:>3}  {METHODS[method]:24} loss {quality.loss:.3f} (dense {dense.loss:.3f})")
    echo("\n" + table(dense, rows))
    with new_folder(out, overwrite=overwrite) as folder:
        record = {"dense": {"loss": dense.loss, "perplexity": dense.perplexity}, "rows": rows}
        (folder / "demo.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        save_model(copy.model, tokenizer, folder / "kfac-2-4")
        pictured = picture(dense, rows, folder / "loss_vs_sparsity.png")
    echo(f"\nDone in {time.perf_counter() - start:.0f} s. Written to {out}/:")
    echo("  kfac-2-4/             the model pruned by K-FAC at 2:4, loads with from_pretrained")
    echo("  demo.json             the figures above")
    if pictured:
        echo("  loss_vs_sparsity.png  loss against sparsity")
    else:
        echo(f"  ({HOW_TO_GET})")
    return rows


def table(dense: Quality, rows: list[dict[str, Any]]) -> str:
    """The rows as aligned text, KL in nats per token."""
    lines = [f"{'level':7}{'method':25}{'sparsity':>8}{'perplexity':>12}{'KL predicted':>14}{'KL measured':>13}"]
    lines.append(f"{'dense':7}{'':25}{0:>8.1%}{dense.perplexity:>12.2f}")
    for row in rows:
        lines.append(
            f"{row['level']:7}{METHODS[row['method']]:25}{row['sparsity']:>8.1%}{row['perplexity']:>12.2f}"
            f"{row['kl_predicted']:>14.3f}{row['kl_measured']:>13.3f}"
        )
    return "\n".join(lines)


def picture(dense: Quality, rows: list[dict[str, Any]], path: Path) -> bool:
    """Plot loss against sparsity, one line per method and a marker for 2:4; False without matplotlib."""
    curves = []
    for (method, label), color in zip(METHODS.items(), ("#999999", "#e08a1e", "#1f6fb4"), strict=True):
        mine = [row for row in rows if row["method"] == method]
        points = [(row["sparsity"], row["loss"]) for row in mine if row["level"] != "2:4"]
        marks = [(row["sparsity"], row["loss"]) for row in mine if row["level"] == "2:4"]
        curves.append(Curve(label, points, marks=marks, color=color))
    panel = Panel("sparsity of the linear layers", "held-out loss (nats per token)", curves, dense.loss, percent=True)
    title = "One-shot pruning of the demo model: same code, three curvatures"
    return draw([panel], path, title=title, marks="2:4")
