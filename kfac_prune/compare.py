"""Many methods of pruning, one model, one protocol: a table and trade-off curves, resumable cell by cell.

The practice that Blalock et al. 2020 ask for ("What is the State of Neural Network Pruning?"): several levels for every
method, the same data and measurement for all, the dense model beside them, compression and theoretical speed-up stated
apart from quality, several seeds with their spread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kfac_prune.bench import Bench, PrunedCopy
from kfac_prune.block_training import Reconstruction
from kfac_prune.compare_report import Row, label_of, own_seconds, picture, table
from kfac_prune.config import SEQUENCE_METHODS, parse_pattern
from kfac_prune.curvature.sequences import check_memory
from kfac_prune.data import Windows
from kfac_prune.errors import InputError
from kfac_prune.experts import ExpertLinear, mean_share
from kfac_prune.figures import HOW_TO_GET
from kfac_prune.inputs import Inputs, load_data, load_inputs, resolve_device
from kfac_prune.loading import load_config
from kfac_prune.memory import peak_within
from kfac_prune.models import prunable_layers
from kfac_prune.objective import CAUSAL, find_objective
from kfac_prune.obs import NM
from kfac_prune.operators import Damping
from kfac_prune.own_text import check_writes
from kfac_prune.protocol import Comparison, Trial
from kfac_prune.report import versions
from kfac_prune.store import Ledger, check_apart, check_output, content_hash, earlier_result

#: Of cells.jsonl; rises when a field changes its meaning.
FORMAT_VERSION = 2
#: What the header tells of the dense model, and every line of a cell.
DENSE = {"loss", "perplexity", "tokens", "parameters", "multiply_adds"}
CELL = {
    *("method", "level", "repair", "epochs", "seed", "allocation", "sparsity", "compression", "speed_up", "loss"),
    *("perplexity", "kl", "kl_predicted", "seconds", "calibration_sha256", "peak_memory_bytes", "peak_cuda_bytes"),
}
CELLS, TABLE, PICTURE = "cells.jsonl", "table.txt", "curves.png"


def compare(comparison: Comparison, *, echo: Callable[[str], None] = print, quiet: bool = True) -> list[Row]:
    """Measure every cell that the output folder does not hold yet; write table and picture of all that it then holds.

    Args:
        comparison: what to compare.
        echo: receives the lines meant for a person.
        quiet: show no progress bars.

    Returns:
        The cells that were asked for, one row each: figures, seconds, memory, versions.

    Raises:
        InputError: something about the input is wrong, or the folder holds something else.
    """
    recipe = replace(comparison.recipe, device=resolve_device(comparison.recipe.device))
    foreign = "holds other files than a comparison's; choose another folder"
    check_output(recipe.out, overwrite=earlier_result(recipe.out, (CELLS, "*")), occupied=foreign)
    check_apart(recipe.out, {"model": recipe.model, "data": recipe.data, "eval_data": recipe.eval_data})
    folder = Path(recipe.out).expanduser()
    config = load_config(recipe.model, trust_remote_code=recipe.trust_remote_code)
    objective = find_objective(recipe.objective, recipe.model, config)
    if objective != CAUSAL:
        raise InputError(
            f"objective: {recipe.model} computes {objective.name}; only causal language models can be compared so far"
        )
    start = time.perf_counter()
    inputs = load_inputs(recipe, objective, echo)
    methods: Any = dict.fromkeys(trial.recipe.method for trial in comparison.trials(recipe.seed))
    for method in methods:
        if method in SEQUENCE_METHODS:
            check_memory(method, inputs.layers, inputs.calibration, objective)
    if comparison.recipe.reconstruct and comparison.own_text:
        check_writes(inputs.model, inputs.calibration)
    ledger = _ledger(folder / CELLS, comparison, inputs)
    wanted = [(trial, repair) for seed in _seeds(comparison) for trial in comparison.trials(seed)
              for repair in comparison.repairs]  # fmt: skip
    done = {_key(row) for row in ledger.rows}
    keys = [_key_of(trial, repair) for trial, repair in wanted]
    echo(
        f"{len(keys)} cells, {sum(key in done for key in keys)} of them in {folder / CELLS}; "
        f"{inputs.calibration.tokens:,} calibration tokens, {inputs.held_out.tokens:,} to measure on"
    )
    for seed in _seeds(comparison):
        missing = [trial for trial in comparison.trials(seed)
                   if any(_key_of(trial, repair) not in done for repair in comparison.repairs)]  # fmt: skip
        _check_calibration(ledger, seed, inputs.calibration if seed == recipe.seed else None)
        if missing:
            bench = _bench(inputs, comparison, seed, quiet=quiet)
            _check_calibration(ledger, seed, bench.calibration)
            for trial in missing:
                _run(bench, trial, comparison, ledger, done, echo)
    rows = [row for key in keys for row in ledger.rows if _key(row) == key]
    assert ledger.header is not None
    asked = set(keys)
    everything = rows + [row for row in ledger.rows if _key(row) not in asked]
    text = table(ledger.header["dense"], everything)
    (folder / TABLE).write_text(text + "\n", encoding="utf-8")
    pictured = picture(ledger.header["dense"], everything, folder / PICTURE, title=Path(recipe.model).name)
    echo(f"\n{text}\n\nDone in {time.perf_counter() - start:.0f} s. In {recipe.out}/:")
    echo(f"  {CELLS:12} every cell with seconds, memory and versions; the same command does not run them again")
    echo(f"  {TABLE:12} the table above")
    echo(f"  {PICTURE:12} the trade-off curves" if pictured else f"  ({HOW_TO_GET})")
    return rows


def _seeds(comparison: Comparison) -> range:
    return range(comparison.recipe.seed, comparison.recipe.seed + comparison.seeds)


def _key(row: Row) -> tuple[Any, ...]:
    """What a cell is known by."""
    return row["method"], row["level"], row["repair"], row["epochs"], row["seed"]


def _key_of(trial: Trial, repair: str) -> tuple[Any, ...]:
    epochs = 0 if repair == "none" else trial.recipe.reconstruct
    return trial.method, trial.level.name, repair, epochs, trial.recipe.seed


def _ledger(path: Path, comparison: Comparison, inputs: Inputs) -> Ledger:
    """The cells so far, which must be of the same model, text and protocol; without any, a new file."""
    protocol = comparison.shared() | {
        "format_version": FORMAT_VERSION,
        "model": content_hash(inputs.model.state_dict()),
        "test text": inputs.held_out.sha256(),
    }
    if comparison.recipe.overwrite:
        path.unlink(missing_ok=True)
    ledger = Ledger(path)
    before = _checked(ledger)
    if before is None:
        bench = _bench(inputs, comparison, comparison.recipe.seed, quiet=True)
        model = inputs.model
        products = round(sum(_share(model, layer.name) * layer.weight.numel() for layer in prunable_layers(model)))
        head = model.get_output_embeddings()
        dense = {
            "loss": bench.dense.loss,
            "perplexity": bench.dense.perplexity,
            "tokens": bench.dense.tokens,
            "parameters": model.num_parameters(),
            "multiply_adds": products + (head.weight.numel() if head is not None else 0),
        }
        ledger.begin({"protocol": protocol, "dense": dense})
    elif changed := [name for name in {**before, **protocol} if before.get(name) != protocol.get(name)]:
        told = [
            name if name in ("model", "test text") else f"{name} ({before.get(name)}, now {protocol.get(name)})"
            for name in changed
        ]
        raise InputError(
            f"--out {path.parent} holds cells of another protocol, which differs in {', '.join(told)}; name another "
            "folder, or add --overwrite to begin anew"
        )
    return ledger


def _checked(ledger: Ledger) -> dict[str, Any] | None:
    """The protocol of the file, which has what this version writes; None if it is empty."""
    if ledger.header is None:
        return None
    protocol, dense = ledger.header.get("protocol"), ledger.header.get("dense")
    if not isinstance(protocol, dict) or not isinstance(dense, dict) or DENSE - dense.keys():
        raise InputError(
            f"{ledger.path} does not begin with protocol and dense model; move it away, or add --overwrite"
        )
    for number, row in enumerate(ledger.rows, 2):
        if CELL - row.keys() or not isinstance(row["seconds"], dict):
            raise InputError(f"{ledger.path}, line {number} is no whole cell; move it away, or add --overwrite")
    return protocol


def _check_calibration(ledger: Ledger, seed: int, calibration: Windows | None) -> None:
    """The cells of a seed were calibrated on the same windows."""
    found = {row["calibration_sha256"] for row in ledger.rows if row["seed"] == seed}
    if calibration is not None and found - {calibration.sha256()}:
        raise InputError(
            f"--out {ledger.path.parent} holds cells that were calibrated on other text; name another folder, or add "
            "--overwrite to begin anew"
        )


def _bench(inputs: Inputs, comparison: Comparison, seed: int, *, quiet: bool) -> Bench:
    """The model with the calibration windows of a seed."""
    recipe = comparison.trials(seed)[0].recipe
    calibration = inputs.calibration
    if seed != comparison.recipe.seed:
        calibration, _ = load_data(recipe, inputs.tokenizer)
    fisher: Any = recipe.fisher  # the recipe has checked it
    assert recipe.damping is not None
    return Bench(
        inputs.model,
        calibration,
        inputs.held_out,
        layers=inputs.layers,
        damping=Damping(recipe.damping),
        fisher=fisher,
        seed=seed,
        batch_size=recipe.batch_size,
        quiet=quiet,
    )


def _run(
    bench: Bench,
    trial: Trial,
    comparison: Comparison,
    ledger: Ledger,
    done: set[tuple[Any, ...]],
    echo: Callable[[str], None],
) -> None:
    """The cells of a trial that are missing: one shot, then the repairs from there."""
    recipe, groups = trial.recipe, parse_pattern(trial.recipe.pattern)
    bench.factors  # noqa: B018  (shared: no cell's seconds or memory)
    method: Any = recipe.method  # the recipe has checked it
    assert recipe.allocation is not None
    with peak_within() as planning:
        copy = bench.prune(
            method,
            allocation=recipe.allocation,
            sparsity=None if groups else recipe.sparsity,
            pattern=NM(*groups) if groups else None,
            permute=bool(recipe.permute),
        )
    for repair in comparison.repairs:
        key = _key_of(trial, repair)
        if key in done:
            continue
        with peak_within() as peak:
            if repair == "reconstruction":
                unit: Any = recipe.reconstruct_unit
                assert recipe.reconstruct is not None
                assert recipe.own_text is not None
                copy.reconstruct(Reconstruction(recipe.reconstruct, unit, recipe.seed, own_text=recipe.own_text))
        row = _figures(bench, copy, ledger) | {
            "calibration_sha256": bench.calibration.sha256(),
            "peak_memory_bytes": max(planning.resident, peak.resident),
            "peak_cuda_bytes": max(planning.cuda or 0, peak.cuda or 0) or None,
            "device": recipe.device,
            "versions": versions(),
        }
        row = dict(zip(("method", "level", "repair", "epochs", "seed"), key, strict=True)) | row
        ledger.add(row)
        done.add(key)
        echo(
            f"  {trial.level.name:>5}  {label_of(row):30} seed {recipe.seed}  loss {row['loss']:.4f}  "
            f"KL {row['kl']:.4f}  predicted {row['kl_predicted']:.4f}  {own_seconds(row):.1f} s"
        )


def _share(model: PreTrainedModel, name: str) -> float:
    """Of all tokens, that a layer is multiplied with: all, or of an expert those that are routed to it on average."""
    if not isinstance(model.get_submodule(name), ExpertLinear):
        return 1.0
    experts: Any = model.get_submodule(name.rsplit(".", 2)[0])
    return mean_share(model, experts.num_experts)


def _figures(bench: Bench, copy: PrunedCopy, ledger: Ledger) -> Row:
    """What is measured of a pruned copy."""
    quality, plan = copy.measure(), copy.plan
    assert ledger.header is not None
    dense = ledger.header["dense"]
    removed = {layer.name: int((~layer.mask).sum()) for layer in plan.layers}
    weights, products = sum(removed.values()), sum(_share(bench.model, name) * n for name, n in removed.items())
    return {
        "allocation": plan.allocation,
        "sparsity": plan.sparsity,
        "compression": dense["parameters"] / (dense["parameters"] - weights),
        "speed_up": dense["multiply_adds"] / (dense["multiply_adds"] - products),
        "loss": quality.loss,
        "perplexity": quality.perplexity,
        "kl": quality.kl,
        "kl_predicted": plan.predicted,
        "seconds": {name: round(value, 3) for name, value in copy.seconds.items()},
    }
