"""Curvature, plans and smaller models as files, from which a run that was interrupted goes on.

Of several processes the one that leads writes and reads them, and sends what it has read to the others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from kfac_prune import ranks
from kfac_prune.config import Recipe
from kfac_prune.curvature.factors import CURVATURE_BYTES, Factors, FactorShelf, LayerFactors
from kfac_prune.curvature.few_tokens import FewTokens
from kfac_prune.data import Windows
from kfac_prune.errors import InputError
from kfac_prune.experts import whole_experts
from kfac_prune.models import Layer, prunable_layers
from kfac_prune.permute import Permuted
from kfac_prune.plan import Plan
from kfac_prune.problems import PlannedLayer, part
from kfac_prune.pruned_model import with_own_widths
from kfac_prune.store import Journal, content_hash, work_folder
from kfac_prune.structure.prune import Shrunk
from kfac_prune.structure.shrink import base_class, empty_of, filled

#: Fields of a recipe that move neither a plan nor a smaller model.
ELSEWHERE = (
    "model", "data", "out", "eval_data", "eval_samples", "reconstruct", "own_text", "recover_epochs", "streams",
    "device", "offload", "max_memory", "overwrite", "resume", "trust_remote_code",
)  # fmt: skip
PART, SMALLER, CURVATURE, ORDER = "all layers", "model", "curvature", "order"


class Planned(NamedTuple):
    """What is known before the first weight falls.

    Attributes:
        plan: of all layers.
        factors: of the permuted model; as read from a file without ``layers`` where nothing that follows asks for them,
            or where they waited off the device.
        permuted: the spaces whose channels have a new order in the model.
    """

    plan: Plan
    factors: Factors
    permuted: list[Permuted]


def journal_of(recipe: Recipe, model: PreTrainedModel, calibration: Windows) -> Journal:
    """Where curvature and plan of a run are left, or its smaller model.

    Args:
        recipe: resolved.
        model: dense, as loaded.
        calibration: windows.
    """
    fields = {name: value for name, value in asdict(recipe).items() if name not in ELSEWHERE}
    fields["shots"] = recipe.cuts if recipe.structured else None  # of sparse weights, they come after the plan
    if recipe.target_latency is not None:
        fields["device"] = recipe.device
    weights = ranks.told(content_hash(model.state_dict()) if ranks.leads() else "")
    parts = [version("kfac-prune"), str(sorted(fields.items())), weights, calibration.sha256()]
    stage = "shrink" if recipe.structured else "plan"
    return Journal(work_folder(recipe.out), stage, hashlib.sha256(" ".join(parts).encode()).hexdigest())


def write_factors(journal: Journal, factors: Factors) -> None:
    """Leave the curvature of the model as it was loaded, unless it is large or waits off the device.

    Args:
        journal: from ``journal_of``.
        factors: before anything is permuted.
    """
    if isinstance(factors.layers, FactorShelf) or not ranks.leads():
        return
    tensors, rows = _parts(factors)
    if sum(tensor.nbytes for tensor in tensors.values()) <= CURVATURE_BYTES:
        record = {"layers": rows, "tokens": factors.tokens, "data_sha256": factors.data_sha256}
        journal.write(CURVATURE, tensors, record)


def read_factors(journal: Journal, model: PreTrainedModel, max_memory: int | None = None) -> Factors | None:
    """What ``write_factors`` left, or None; also where that takes more than ``max_memory`` bytes."""
    found = journal.read(CURVATURE) if ranks.leads() else None
    if found is not None and max_memory is not None and sum(t.nbytes for t in found[0].values()) > max_memory:
        found = None
    everywhere = _sent(found)
    if everywhere is None:
        return None
    tensors, record = everywhere
    return _factors(tensors, record["layers"], record, model.device)


def _parts(factors: Factors) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and figures of all layers and streams; a matrix that several layers share is among them once."""
    tensors: dict[str, Tensor] = {f"stream {name}": g for name, g in factors.streams.items()}
    rows: dict[str, Any] = {}
    owners: dict[int, str] = {}
    for name, one in factors.layers.items():
        owner = owners.setdefault(id(one.a), name)
        tensors |= {f"mean {name}": one.mean, f"g {name}": one.g} | ({f"a {name}": one.a} if owner == name else {})
        few = None if one.few is None else asdict(one.few)
        rows[name] = {"a": owner, "tokens": one.tokens, "has_bias": one.has_bias, "few": few}
    return tensors, rows


def _factors(tensors: dict[str, Tensor], rows: dict[str, Any], record: dict[str, Any], device: torch.device) -> Factors:
    """From what ``_parts`` gave, on a device."""
    there = {name: tensor.to(device) for name, tensor in tensors.items() if name.split()[0] in ("a", "g", "mean")}
    layers = {}
    for name, row in rows.items():
        few = None if row["few"] is None else FewTokens(**row["few"])
        a, mean, g = there[f"a {row['a']}"], there[f"mean {name}"], there[f"g {name}"]
        layers[name] = LayerFactors(a, mean, g, row["tokens"], row["has_bias"], few)
    streams = {n.removeprefix("stream "): g.to(device) for n, g in tensors.items() if n.startswith("stream ")}
    return Factors(layers, streams, record["tokens"], record["data_sha256"])


def write_order(journal: Journal, permuted: Sequence[Permuted]) -> None:
    """Leave the order of channels that the layers are solved in: a search on other hardware may find another."""
    if ranks.leads():
        journal.write(ORDER, *_order_parts(permuted))


def read_order(journal: Journal) -> list[Permuted] | None:
    """What ``write_order`` left, or None."""
    found = _sent(journal.read(ORDER) if ranks.leads() else None)
    return None if found is None else _order(*found)


def _order_parts(permuted: Sequence[Permuted]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and figures."""
    tensors = {f"permutation {number}": space.permutation for number, space in enumerate(permuted)}
    return tensors, {"permuted": [{k: v for k, v in vars(one).items() if k != "permutation"} for one in permuted]}


def _order(tensors: dict[str, Tensor], record: dict[str, Any]) -> list[Permuted]:
    """From what ``_order_parts`` gave."""
    rows = enumerate(record["permuted"])
    return [Permuted(permutation=tensors[f"permutation {number}"], **space) for number, space in rows]


def needs_layers(recipe: Recipe) -> bool:
    """The factors of layers are asked for after the plan is made."""
    return bool(recipe.refit) or recipe.reconstruct_unit == "sublayer"


def write_planned(journal: Journal, recipe: Recipe, model: PreTrainedModel, planned: Planned) -> None:
    """Leave a plan, what the rest of the run needs of the factors, and the dense weights where they have moved."""
    if not ranks.leads():
        return
    plan, factors = planned.plan, planned.factors
    needed = factors.layers if needs_layers(recipe) and not isinstance(factors.layers, FactorShelf) else {}
    tensors, kept = _parts(replace(factors, layers=needed))
    rows = []
    by_name = {layer.name: layer for layer in prunable_layers(model)}
    for made in plan.layers:
        solved = part(by_name[made.name])
        alone = ranks.count() == 1 and journal.has(solved) and made.sparsity > 0  # its tensors lie there already
        tensors |= {} if alone else {f"{name} {made.name}": tensor for name, tensor in made.tensors().items()}
        rows.append({"name": made.name, "solved": solved if alone else None, "figures": made.figures()})
    permutations, order = _order_parts(planned.permuted)
    tensors |= permutations
    if planned.permuted:
        tensors |= {f"dense {name}": parameter for name, parameter in model.named_parameters()}
    record = {
        "method": plan.method,
        "allocation": plan.allocation,
        "layers": rows,
        "factors": kept,
        "tokens": factors.tokens,
        "data_sha256": factors.data_sha256,
        **order,
    }
    journal.write(PART, tensors, record)


def read_planned(journal: Journal, model: PreTrainedModel) -> Planned | None:
    """What ``write_planned`` left, or None; the model, as loaded, gets the order of channels that the plan is for."""
    found = journal.read(PART) if ranks.leads() else None
    if found is not None:
        for row in (row for row in found[1]["layers"] if row["solved"] is not None):
            solved = journal.read(row["solved"])
            if solved is None:
                raise InputError(f"{journal.folder} has lost {row['solved']} of a plan; run with --overwrite instead")
            found[0].update({f"{name} {row['name']}": tensor for name, tensor in solved[0].items()})
    everywhere = _sent(found)
    if everywhere is None:
        return None
    tensors, record = everywhere
    for name, parameter in model.named_parameters():
        if f"dense {name}" in tensors:
            parameter.data = tensors[f"dense {name}"].to(parameter.device)
    factors = _factors(tensors, record["factors"], record, model.device)
    layers = tuple(_layer(row, tensors, model) for row in record["layers"])
    return Planned(Plan(layers, record["method"], record["allocation"]), factors, _order(tensors, record))


def write_shrunk(journal: Journal, best: Shrunk, others: Sequence[dict[str, Any]]) -> None:
    """Leave a smaller model with what its record tells.

    Args:
        journal: from ``journal_of``.
        best: the plan that was kept.
        others: figures of those that were not.
    """
    if not ranks.leads():
        return
    figures = {field: value for field, value in vars(best).items() if field != "model"}
    config = json.loads(best.model.config.to_json_string(use_diff=False))
    record = {"class": base_class(best.model).__name__, "config": config, "figures": figures, "others": list(others)}
    with whole_experts(best.model):
        journal.write(SMALLER, best.model.state_dict(), record)


def read_shrunk(journal: Journal, model: PreTrainedModel) -> tuple[Shrunk, list[dict[str, Any]]] | None:
    """What ``write_shrunk`` left of a cut of the dense model, or None."""
    found = _sent(journal.read(SMALLER) if ranks.leads() else None)
    if found is None:
        return None
    tensors, record = found
    kind: Any = base_class(model)
    if kind.__name__ != record["class"]:  # a Llama that is stored as the Mistral which it equals
        kind = getattr(transformers, record["class"])
    if "pruned_shapes" in record["config"]:
        kind = with_own_widths(kind)
    empty = empty_of(kind, record["config"], model)
    smaller = filled(empty, {name: tensor.to(model.device) for name, tensor in tensors.items()}, model)
    figures = record["figures"]
    sizes = {name: (tuple(before), tuple(after)) for name, (before, after) in figures.pop("sizes").items()}
    return Shrunk(model=smaller, sizes=sizes, unseen=tuple(figures.pop("unseen")), **figures), record["others"]


def _sent(found: tuple[dict[str, Tensor], dict[str, Any]] | None) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What the process that leads has read, in all processes."""
    record: dict[str, Any] | None = ranks.told(None if found is None else found[1])
    if record is None:
        return None
    shapes = ranks.told({} if found is None else {name: (t.shape, t.dtype) for name, t in found[0].items()})
    tensors: dict[str, Tensor] = {}
    for name, (shape, dtype) in shapes.items():
        tensors[name] = ranks.sent(torch.empty(shape, dtype=dtype) if found is None else found[0][name])
    return tensors, record


def _layer(row: dict[str, Any], tensors: dict[str, Tensor], model: PreTrainedModel) -> PlannedLayer:
    """A planned layer from its figures and tensors, where the model has it."""
    name = row["name"]
    own = {kind: tensors[f"{kind} {name}"] for kind in ("weight", "mask", "bias") if f"{kind} {name}" in tensors}
    return PlannedLayer.restored(Layer(name, model.get_submodule(name)), own, row["figures"])
