"""What a run tells: stage records, the result file, the model card."""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from kfac_prune.config import Recipe
from kfac_prune.curvature.estimate import Factors
from kfac_prune.plan import Plan
from kfac_prune.quality import Quality
from kfac_prune.refitting import Refitted

#: Of kfac_prune.json; rises when a field changes its meaning.
FORMAT_VERSION = 1


@dataclass
class Stages:
    """Seconds and peak memory of every stage of a run.

    Attributes:
        echo: receives one line when a stage begins.
        records: name -> seconds, peak_memory_bytes (of the whole process up to the end of the stage; on CUDA also
            peak_cuda_bytes of the stage itself).
    """

    echo: Callable[[str], None]
    records: dict[str, dict[str, float]] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time one stage."""
        self.echo(f"- {name}")
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        yield
        record: dict[str, float] = {
            "seconds": round(time.perf_counter() - start, 3),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        if torch.cuda.is_available():
            record["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
        self.records[name] = record


def peak_memory_bytes() -> int:
    """The largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    """Versions of everything that can move a number."""
    packages = ("kfac-prune", "torch", "transformers", "accelerate", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def result_record(
    recipe: Recipe,
    plan: Plan,
    factors: Factors,
    dense: Quality,
    pruned: Quality,
    refitted: Sequence[Refitted],
    stages: Stages,
    covered: float,
) -> dict[str, Any]:
    """The content of kfac_prune.json.

    Args:
        recipe: resolved.
        plan: as applied.
        factors: it was made from.
        dense: quality before.
        pruned: quality after, with KL.
        refitted: what the residual refit did, empty if it was off.
        stages: of the run.
        covered: fraction of the model's parameters that are in the plan's layers.
    """
    return {
        "format_version": FORMAT_VERSION,
        "seed": recipe.seed,
        "method": plan.method,
        "allocation": plan.allocation,
        "pattern": recipe.pattern,
        "sparsity": plan.sparsity,
        "parameters_covered": covered,
        "calibration": {"tokens": factors.tokens, "sha256": factors.data_sha256},
        "dense": {"loss": dense.loss, "perplexity": dense.perplexity},
        "pruned": {"loss": pruned.loss, "perplexity": pruned.perplexity},
        "evaluation_tokens": pruned.tokens,
        "loss_increase": pruned.loss - dense.loss,
        "kl_measured": pruned.kl,
        "kl_predicted": plan.predicted,  # by the plan, before any refit
        "damping": recipe.damping,
        "layers": {
            layer.name: {
                "shape": list(layer.mask.shape),
                "sparsity": layer.sparsity,
                "predicted_loss": layer.predicted,
                "kkt_residual": layer.kkt,
                "damping": [asdict(record) for record in layer.damping],
                "groups_fit": layer.groups_fit,
            }
            for layer in plan.layers
        },
        "refit": {r.name: {"loss_before": r.before, "loss_after": r.after} for r in refitted},
        "stages": stages.records,
        "versions": versions(),
        "device": recipe.device,
    }


def summary(record: dict[str, Any]) -> str:
    """The figures of a run as a small aligned table."""
    before = ", before refit" if record["refit"] else ""
    rows = [
        ("", "dense", "pruned"),
        ("loss (nats/token)", f"{record['dense']['loss']:.4f}", f"{record['pruned']['loss']:.4f}"),
        ("perplexity", f"{record['dense']['perplexity']:.3f}", f"{record['pruned']['perplexity']:.3f}"),
        ("sparsity", "0.0%", f"{record['sparsity']:.1%}"),
        (f"KL predicted{before} (nats/token)", "", f"{record['kl_predicted']:.4f}"),
        ("KL measured (nats/token)", "", f"{record['kl_measured']:.4f}"),
    ]
    return "\n".join(f"{a:40}{b:>10}{c:>10}" for a, b, c in rows)


def model_card(recipe: Recipe, record: dict[str, Any]) -> str:
    """README.md of the pruned model, with the metadata block that model hubs read."""
    pattern = "" if recipe.pattern == "unstructured" else f" in the pattern {recipe.pattern}"
    base = "" if Path(recipe.model).expanduser().is_dir() else f"base_model: {recipe.model}\n"
    return f"""---
{base}library_name: transformers
pipeline_tag: text-generation
tags: [pruned, sparse, kfac-prune]
---
# {recipe.model.rstrip("/").rpartition("/")[2]}, pruned

{record["sparsity"]:.1%} of the weights of {len(record["layers"])} linear layers are zero{pattern}.
Those layers hold {record["parameters_covered"]:.1%} of the model's parameters.
The remaining weights were adjusted in one shot, without training, by kfac-prune {record["versions"]["kfac-prune"]}
(method `{record["method"]}`, allocation `{record["allocation"]}`,
{record["calibration"]["tokens"]:,} calibration tokens).

```
{summary(record)}
```
(measured on {record["evaluation_tokens"]:,} held-out tokens)

It is a plain checkpoint with exact zeros and loads as any other:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```

`recipe.yaml` repeats the run (`kfac-prune prune --recipe recipe.yaml`); `kfac_prune.json` holds every figure, layer by
layer. Zeros alone make a model neither smaller nor faster on a server without kernels for their pattern.
"""
