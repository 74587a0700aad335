"""A plan as a file: a run that was interrupted after it goes on there, without curvature and solving again."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kfac_prune import ranks
from kfac_prune.config import Recipe
from kfac_prune.curvature.factors import Factors, LayerFactors
from kfac_prune.data import Windows
from kfac_prune.errors import InputError
from kfac_prune.models import Layer, prunable_layers
from kfac_prune.permute import Permuted
from kfac_prune.plan import Plan
from kfac_prune.problems import PlannedLayer, part
from kfac_prune.store import Journal, content_hash, work_folder

#: Fields of a recipe that do not move a plan.
ELSEWHERE = (
    "model", "data", "out", "eval_data", "eval_samples", "shots", "reconstruct", "recover_epochs", "streams", "device",
    "offload", "max_memory", "overwrite", "resume", "trust_remote_code",
)  # fmt: skip
PART = "all layers"


@dataclass(frozen=True)
class Planned:
    """What is known before the first weight falls.

    Attributes:
        plan: of all layers.
        factors: of the permuted model; as read from a file without ``layers`` where nothing that follows asks for them.
        permuted: the spaces whose channels have a new order in the model.
    """

    plan: Plan
    factors: Factors
    permuted: list[Permuted]


def journal_of(recipe: Recipe, model: PreTrainedModel, calibration: Windows) -> Journal:
    """Where the plan of a run is left.

    Args:
        recipe: resolved.
        model: dense, as loaded.
        calibration: windows.
    """
    fields = {name: value for name, value in asdict(recipe).items() if name not in ELSEWHERE}
    parts = [str(sorted(fields.items())), content_hash(model.state_dict()), calibration.sha256()]
    return Journal(work_folder(recipe.out), "plan", hashlib.sha256(" ".join(parts).encode()).hexdigest())


def write_planned(journal: Journal, recipe: Recipe, model: PreTrainedModel, planned: Planned) -> None:
    """Leave a plan, what the rest of the run needs of the factors, and the dense weights where they have moved."""
    plan, factors = planned.plan, planned.factors
    tensors: dict[str, Tensor] = {f"stream {name}": g for name, g in factors.streams.items()}
    rows = []
    by_name = {layer.name: layer for layer in prunable_layers(model)}
    for made in plan.layers:
        solved = part(by_name[made.name])
        alone = ranks.count() == 1 and journal.has(solved) and made.sparsity > 0  # its tensors lie there already
        tensors |= {} if alone else {f"{name} {made.name}": tensor for name, tensor in made.tensors().items()}
        rows.append({"name": made.name, "solved": solved if alone else None, "figures": made.figures()})
    kept: dict[str, Any] = {}
    if recipe.refit or recipe.reconstruct_unit == "sublayer":
        for name, one in factors.layers.items():
            tensors |= {f"a {name}": one.a, f"mean {name}": one.mean, f"g {name}": one.g}
            kept[name] = [one.tokens, one.has_bias]
    for number, space in enumerate(planned.permuted):
        tensors[f"permutation {number}"] = space.permutation
    if planned.permuted:
        tensors |= {f"dense {name}": parameter for name, parameter in model.named_parameters()}
    record = {
        "method": plan.method,
        "allocation": plan.allocation,
        "layers": rows,
        "factors": kept,
        "tokens": factors.tokens,
        "data_sha256": factors.data_sha256,
        "permuted": [
            {k: v for k, v in vars(space).items() if k != "permutation"} for space in planned.permuted
        ],
    }  # fmt: skip
    journal.write(PART, tensors, record)


def read_planned(journal: Journal | None, model: PreTrainedModel) -> Planned | None:
    """What ``write_planned`` left, or None; the model gets the order of channels that the plan is for.

    Several processes get what the one that leads has found.

    Args:
        journal: None in the processes that do not lead.
        model: dense, as loaded.
    """
    found = None if journal is None else journal.read(PART)
    if journal is not None and found is not None:
        for row in (row for row in found[1]["layers"] if row["solved"] is not None):
            solved = journal.read(row["solved"])
            if solved is None:
                raise InputError(f"{journal.folder} has lost {row['solved']} of a plan; run without --resume")
            found[0].update({f"{name} {row['name']}": tensor for name, tensor in solved[0].items()})
    record: dict[str, Any] | None = ranks.told(None if found is None else found[1])
    if record is None:
        return None
    shapes = ranks.told({} if found is None else {name: (t.shape, t.dtype) for name, t in found[0].items()})
    tensors: dict[str, Tensor] = {}
    for name, (shape, dtype) in shapes.items():
        tensors[name] = ranks.sent(torch.empty(shape, dtype=dtype) if found is None else found[0][name])
    for name, parameter in model.named_parameters():
        if f"dense {name}" in tensors:
            parameter.data = tensors[f"dense {name}"].to(parameter.device)
    kept: dict[str, LayerFactors] = {}
    for name, (tokens, has_bias) in record["factors"].items():
        a, mean, g = (tensors[f"{part} {name}"].to(model.device) for part in ("a", "mean", "g"))
        kept[name] = LayerFactors(a, mean, g, tokens, has_bias)
    streams = {name: g.to(model.device) for name, g in tensors.items() if name.startswith("stream ")}
    streams = {name.removeprefix("stream "): g for name, g in streams.items()}
    factors = Factors(kept, streams, record["tokens"], record["data_sha256"])
    layers = tuple(_layer(row, tensors, model) for row in record["layers"])
    permuted = [
        Permuted(permutation=tensors[f"permutation {number}"], **space)
        for number, space in enumerate(record["permuted"])
    ]
    return Planned(Plan(layers, record["method"], record["allocation"]), factors, permuted)


def _layer(row: dict[str, Any], tensors: dict[str, Tensor], model: PreTrainedModel) -> PlannedLayer:
    """A planned layer from its figures and tensors, where the model has it."""
    name = row["name"]
    own = {kind: tensors[f"{kind} {name}"] for kind in ("weight", "mask", "bias") if f"{kind} {name}" in tensors}
    return PlannedLayer.restored(Layer(name, model.get_submodule(name)), own, row["figures"])
