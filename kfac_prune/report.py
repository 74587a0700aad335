"""What a run tells: stage records, the result file, the model card."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kfac_prune import ranks
from kfac_prune.block_training import Reconstructed
from kfac_prune.config import Recipe
from kfac_prune.data import Windows
from kfac_prune.memory import cuda_peak, peak_memory_bytes, reset_cuda_peaks
from kfac_prune.models import Layer
from kfac_prune.objective import Objective
from kfac_prune.permute import Permuted
from kfac_prune.plan import Plan
from kfac_prune.quality import Quality
from kfac_prune.recovery import Recovered
from kfac_prune.refitting import Refitted
from kfac_prune.shots import Correction
from kfac_prune.structure.latency import Speed
from kfac_prune.structure.prune import Shrunk

#: Of kfac_prune.json; rises when a field changes its meaning.
FORMAT_VERSION = 1


#: What the KL of an objective's outputs is usually called, where that is not KL.
DIVERGENCES = {"embedding": "½ distance²"}
#: Figures of an objective and their names.
LIKENESS = (
    ("cosine", "mean cosine to the dense embedding"),
    ("neighbours_kept", "share of 10 nearest neighbours kept"),
    ("agreement", "same class as the dense model"),
)


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
        reset_cuda_peaks()
        start = time.perf_counter()
        yield
        record: dict[str, float] = {
            "seconds": round(time.perf_counter() - start, 3),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        if (peak := cuda_peak()) is not None:
            record["peak_cuda_bytes"] = peak
        self.records[name] = record


def versions() -> dict[str, str]:
    """Versions of everything that can move a number."""
    packages = ("kfac-prune", "torch", "transformers", "accelerate", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def result_record(
    recipe: Recipe,
    objective: Objective,
    calibration: Windows,
    skipped: int,
    dense: Quality,
    pruned: Quality,
    stages: Stages,
    own_part: dict[str, Any],
) -> dict[str, Any]:
    """The content of kfac_prune.json.

    Args:
        recipe: resolved.
        objective: that the model has; its unit is that of every loss.
        calibration: windows that were used.
        skipped: how many others were left out, as the model is not finite on them.
        dense: quality before.
        pruned: quality after, with KL.
        stages: of the run.
        own_part: what the kind of run adds: ``plan_record`` or ``shrunk_record``.
    """
    if dense.loss is not None and pruned.loss is not None:
        figures: dict[str, Any] = {
            "dense": {"loss": dense.loss, "perplexity": dense.perplexity},
            "pruned": {"loss": pruned.loss, "perplexity": pruned.perplexity},
            "evaluation_tokens": pruned.tokens,
            "loss_increase": pruned.loss - dense.loss,
        }
    else:
        figures = {"pruned": dict(pruned.likeness), f"evaluation_{objective.unit}s": pruned.tokens}
    return {
        "format_version": FORMAT_VERSION,
        "objective": objective.name,
        "unit": objective.unit,
        "seed": recipe.seed,
        "method": recipe.method,
        "pattern": recipe.pattern,
        "structured": recipe.structured,
        "calibration": {
            "tokens": calibration.tokens,
            "skipped": skipped,
            "sha256": calibration.sha256(),
            "own_text": (recipe.own_text or 0) if own_part["reconstruction"] else 0,
        },
        **figures,
        "kl_measured": pruned.kl,
        "damping": recipe.damping,
        **own_part,
        "stages": stages.records,
        "versions": versions(),
        "device": recipe.device,
        "processes": ranks.count(),
    }


def plan_record(
    plan: Plan,
    permuted: Sequence[Permuted],
    refitted: Sequence[Refitted],
    corrected: Sequence[Correction],
    reconstructed: Sequence[Reconstructed],
    covered: float,
) -> dict[str, Any]:
    """The part of the record that tells of masks.

    Args:
        plan: as applied.
        permuted: the spaces that were permuted before it, empty if that was off.
        refitted: what the residual refit did, empty if it was off.
        corrected: what the shots after the first did, empty if there were none.
        reconstructed: what the reconstruction did, empty if it was off.
        covered: fraction of the model's parameters that are in the plan's layers.
    """
    return {
        "allocation": plan.allocation,
        "sparsity": plan.sparsity,
        "parameters_covered": covered,
        "kl_predicted": plan.predicted,  # by the plan, before any refit or further shot
        "layers": {
            layer.name: {
                "shape": list(layer.mask.shape),
                "sparsity": layer.sparsity,
                "predicted_loss": layer.predicted,
                "kkt_residual": layer.kkt,
                "damping": [asdict(record) for record in layer.damping],
                "groups_fit": layer.groups_fit,
                **({} if layer.few is None else {"expert": asdict(layer.few)}),
            }
            for layer in plan.layers
        },
        "permuted": [
            {"kind": p.kind, "name": p.name, "kept_before": p.before, "kept_after": p.after} for p in permuted
        ],
        "refit": {r.name: {"loss_before": r.before, "loss_after": r.after} for r in refitted},
        "shots": 1 + sum(c.step > 0 for c in corrected),
        "corrections": [{"step": c.step, "kl_before": c.before, "kl_after": c.after} for c in corrected],
        "reconstruction": [asdict(r) for r in reconstructed],
    }


def shrunk_record(
    recipe: Recipe,
    dense: PreTrainedModel,
    layers: Sequence[Layer],
    best: Shrunk,
    others: Sequence[dict[str, Any]],
    reconstructed: Sequence[Reconstructed],
    speed: Sequence[Speed],
) -> dict[str, Any]:
    """The part of the record that tells of a smaller model.

    Args:
        recipe: resolved.
        dense: the model before.
        layers: its layers that could be cut.
        best: what was kept.
        others: figures of the plans that were built and lost.
        reconstructed: what the reconstruction did, empty if it was off.
        speed: of the dense and of the smaller model.
    """
    before = sum(layer.weight.numel() for layer in layers)
    after = sum(Layer(layer.name, best.model.get_submodule(layer.name)).weight.numel() for layer in layers)
    return {
        "sparsity": 1 - after / before,
        "parameters": {"dense": dense.num_parameters(), "pruned": best.model.num_parameters()},
        "widths": "per-layer" if hasattr(best.model.config, "pruned_shapes") else "uniform",
        "shots": best.shots,
        "kl_predicted": best.predicted,
        "kl_calibration": best.kl,
        "groups": {name: {"before": list(b), "after": list(a)} for name, (b, a) in best.sizes.items()},
        "experts_without_tokens": list(best.unseen),
        "other_plans": list(others),
        "speed": dict(zip(("dense", "pruned"), (asdict(s) for s in speed), strict=True)),
        "refit": recipe.refit,
        "reconstruction": [asdict(r) for r in reconstructed],
    }


def recovery_record(before: Quality, recovered: Recovered) -> dict[str, Any]:
    """The part of the record that tells of the recovery.

    Args:
        before: the pruned model's quality on the evaluation text without it.
        recovered: what it did; its KLs are on held-out calibration windows.
    """
    loss = {} if before.loss is None else {"loss": before.loss, "perplexity": before.perplexity}
    return {"before": {**loss, "kl": before.kl, **before.likeness}, "held_out": asdict(recovered)}


def summary(record: dict[str, Any]) -> str:
    """The figures of a run as a small aligned table."""
    repaired = any(record.get(name) for name in ("refit", "corrections", "reconstruction"))
    before = ", before repair" if repaired else ""
    measure = f"{DIVERGENCES.get(record['objective'], 'KL')} {{}} (nats/{record['unit']})"
    rows = [("", "dense", "pruned")]
    if "dense" in record:
        rows += [
            ("loss (nats/token)", f"{record['dense']['loss']:.4f}", f"{record['pruned']['loss']:.4f}"),
            ("perplexity", f"{record['dense']['perplexity']:.3f}", f"{record['pruned']['perplexity']:.3f}"),
        ]
    else:
        rows += [(label, "", f"{record['pruned'][name]:.4f}") for name, label in LIKENESS if name in record["pruned"]]
    rows += [
        ("weights removed" if record["structured"] else "sparsity", "0.0%", f"{record['sparsity']:.1%}"),
        (measure.format(f"predicted{before}"), "", f"{record['kl_predicted']:.4f}"),
        (measure.format("measured"), "", f"{record['kl_measured']:.4f}"),
    ]
    if record["recovery"]:
        earlier = record["recovery"]["before"]
        rows.append((measure.format("before recovery"), "", f"{earlier['kl']:.4f}"))
        if "loss" in earlier:
            rows.append(("loss before recovery", "", f"{earlier['loss']:.4f}"))
    if record["structured"]:
        parameters = record["parameters"]
        rows.append(("parameters", f"{parameters['dense']:,}", f"{parameters['pruned']:,}"))
        for name, label in (("prefill_ms", "prefill (ms/window)"), ("decode_ms", "decode (ms/token)")):
            dense, pruned = record["speed"]["dense"][name], record["speed"]["pruned"][name]
            if dense is not None:
                rows.append((label, f"{dense:.2f}", f"{pruned:.2f}"))
        for other in record["other_plans"]:
            rows.append((_plan_label(other), "", f"{other['kl_calibration']:.4f}"))
        rows.append((f"{_plan_label(record)} (kept)", "", f"{record['kl_calibration']:.4f}"))
    return "\n".join(f"{a:44}{b:>14}{c:>14}" for a, b, c in rows)


def _plan_label(plan: dict[str, Any]) -> str:
    shots = "1 shot" if plan["shots"] == 1 else f"{plan['shots']} shots"
    return f"calibration KL, {plan['widths']}, {shots}"


def model_card(recipe: Recipe, record: dict[str, Any]) -> str:
    """README.md of the pruned model, with the metadata block that model hubs read."""
    base = "" if Path(recipe.model).expanduser().is_dir() else f"base_model: {recipe.model}\n"
    shots = "one shot" if record.get("shots", 1) == 1 else f"{record['shots']} shots"
    kinds = {"reconstruction": "block-wise reconstruction", "recovery": "end-to-end distillation"}
    trained = " and ".join(kind for name, kind in kinds.items() if record[name])
    trained = f"with {trained}" if trained else "without training"
    how = f"in {shots}, {trained}, by kfac-prune {record['versions']['kfac-prune']} (method `{record['method']}`"
    load, task = _loading(record, recipe)
    told = f"{record['calibration']['tokens']:,} calibration tokens"
    told += ", further text written by the dense model" if record["calibration"]["own_text"] else ""
    seen = next(name for name in ("tokens", "sequences") if f"evaluation_{name}" in record)
    if recipe.structured:
        tags, loads = "[pruned, kfac-prune]", "It is a plain checkpoint and loads as any other:"
        what = (
            f"{record['sparsity']:.1%} of the weights of its blocks are gone: {record['parameters']['pruned']:,} of "
            f"{record['parameters']['dense']:,} parameters are left.\nWhole hidden units or attention heads were "
            f"removed and the remaining weights adjusted\n{how},\n"
            f"{told})."
        )
        note = ""
    else:
        pattern = "" if recipe.pattern == "unstructured" else f" in the pattern {recipe.pattern}"
        dense = sum(layer["sparsity"] == 0 for layer in record["layers"].values())
        pattern += f", {dense} of them dense" if pattern and dense else ""
        tags, loads = (
            "[pruned, sparse, kfac-prune]",
            "It is a plain checkpoint with exact zeros and loads as any other:",
        )
        what = (
            f"{record['sparsity']:.1%} of the weights of {len(record['layers'])} linear layers are zero{pattern}.\n"
            f"Those layers hold {record['parameters_covered']:.1%} of the model's parameters.\n"
            f"The remaining weights were adjusted\n{how},\n"
            f"allocation `{record['allocation']}`, {told})."
        )
        note = "Zeros alone make a model neither smaller nor faster on a server without kernels for their pattern.\n"
    if record["own_code"]:
        loads = "Its code comes with it:"
        if record.get("widths") == "per-layer":
            loads = "Its blocks have widths of their own, so its code comes with it (or use `kfac_prune.load`):"
        load = load.replace('("THIS_FOLDER")\n', '("THIS_FOLDER", trust_remote_code=True)\n', 1)
    return f"""---
{base}library_name: transformers
pipeline_tag: {task}
tags: {tags}
---
# {recipe.model.rstrip("/").rpartition("/")[2]}, pruned

{what}

```
{summary(record)}
```
(measured on {record[f"evaluation_{seen}"]:,} held-out {seen})

{loads}

{load}
`kfac-prune prune --recipe recipe.yaml --out ANOTHER` repeats the run; `kfac_prune.json` holds every figure.
{note}"""


def _loading(record: dict[str, Any], recipe: Recipe) -> tuple[str, str]:
    """How to load the model, as Markdown, and its pipeline tag."""
    if record["sentence_transformers"]:
        return _SENTENCES, "sentence-similarity"
    name, task = CLASSES[record["head"]]
    return _LOAD.replace("AutoModel", name), task


#: The class that loads each kind of model, and what model hubs call its task.
CLASSES = {
    "causal": ("AutoModelForCausalLM", "text-generation"),
    "masked": ("AutoModelForMaskedLM", "fill-mask"),
    "classes": ("AutoModelForSequenceClassification", "text-classification"),
    "encoder": ("AutoModel", "feature-extraction"),
}
_LOAD = """```python
from transformers import AutoModel, AutoTokenizer
model = AutoModel.from_pretrained("THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```
"""
_SENTENCES = """```python
from sentence_transformers import SentenceTransformer
model = SentenceTransformer("THIS_FOLDER")
```
"""
