"""README's tables of all methods side by side, from the cells that ``kfac-prune compare`` leaves.

For each of the reference models the cells are in benchmarks/compare-MODEL.jsonl, the picture beside them. To make them
anew (the other models likewise; README says how):

    kfac-prune compare ../shared/reference/models/wikitext2-llama --out comparison --methods ...
    cp comparison/cells.jsonl benchmarks/compare-wikitext2-llama.jsonl
    python scripts/comparison_table.py
"""

import json
from collections.abc import Sequence
from typing import Any

from benchmark_quality import ROOT, replace_between

MODELS = ("wikitext2-llama", "babyllama-tok361", "stories260K", "chargpt-shakespeare-gpt2")
BEGIN, END = "<!-- comparison: begin -->", "<!-- comparison: end -->"
NAMES = {
    "magnitude": "magnitude",
    "magnitude:global": "magnitude, one threshold",
    "obd": "OBD",
    "obd:global": "OBD, one threshold",
    "wanda": "Wanda",
    "wanda:owl": "Wanda, OWL",
    "sparsegpt": "SparseGPT",
    "sparsegpt:owl": "SparseGPT, OWL",
    "m-fac": "M-FAC",
    "woodfisher": "WoodFisher",
    "alps": "ALPS",
    "layerwise": "layer-wise (G = I)",
    "llm-surgeon": "LLM Surgeon",
    "ek-fac": "EK-FAC",
    "kfac": "**K-FAC**",
}


def main() -> None:
    """Rewrite the tables."""
    parts = []
    for model in MODELS:
        file = ROOT / "benchmarks" / f"compare-{model}.jsonl"
        header, *rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        picture = f"![{model}: KL and perplexity of every method against sparsity](benchmarks/compare-{model}.png)"
        told = f"{table(rows)}\n\n{picture}"
        title = f"{model}, dense loss {header['dense']['loss']:.3f}"
        parts.append(f"{title}:\n\n{told}" if not parts else folded(title, told))
    replace_between(ROOT / "README.md", BEGIN, END, "\n\n".join(parts))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """KL(dense‖pruned) per method and level, the lowest of every level in bold."""
    cells = {(row["method"], row["level"]): row["kl"] for row in rows}
    levels = list(dict.fromkeys(row["level"] for row in rows))
    least = {level: min(kl for (_, other), kl in cells.items() if other == level) for level in levels}
    lines = ["| KL, nats per token | " + " | ".join(levels) + " |", "|---|" + "---|" * len(levels)]
    for method, name in NAMES.items():
        figures = []
        for level in levels:
            kl = cells.get((method, level))
            figure = "–" if kl is None else f"{kl:#.3g}"
            figures.append(f"**{figure}**" if kl == least[level] else figure)
        lines.append(f"| {name} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def folded(title: str, content: str) -> str:
    """Shown when the title is clicked."""
    return f"<details><summary>{title}</summary>\n\n{content}\n\n</details>"


if __name__ == "__main__":
    main()
