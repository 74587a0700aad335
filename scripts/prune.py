"""Prune as a step of a pipeline: the options of ``kfac-prune prune``, and at the end one line of JSON on stdout.

The line holds what kfac_prune.json does, without the list of layers, and the folder. Everything else goes to stderr.
Exit codes: 0 done, 2 the input cannot be used (stderr says what and why), 130 interrupted.

    python scripts/prune.py --recipe recipe.yaml --out pruned > result.json
    torchrun --nproc-per-node 4 scripts/prune.py --recipe recipe.yaml --out pruned --processes 4 > result.json
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

from kfac_prune.cli import build_parser, main
from kfac_prune.recipe_file import read_recipe


def step(options: Sequence[str]) -> int:
    """Run ``kfac-prune prune`` with these options; returns its exit code."""
    with redirect_stdout(sys.stderr):
        code = main(["prune", *options])
    if code != 0 or os.environ.get("RANK", "0") != "0":
        return code
    arguments = build_parser().parse_args(["prune", *options])
    out = Path(getattr(arguments, "out", None) or read_recipe(arguments.recipe)["out"]).expanduser()
    record = json.loads((out / "kfac_prune.json").read_text(encoding="utf-8"))
    print(json.dumps({"out": str(out), **{name: value for name, value in record.items() if name != "layers"}}))
    return 0


if __name__ == "__main__":
    sys.exit(step(sys.argv[1:]))
