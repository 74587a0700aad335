"""The pruning problem of one layer under each method, and what its solution is predicted to cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from kfac_prune import ranks
from kfac_prune.baselines import alps, sparsegpt, wanda
from kfac_prune.curvature.factors import Factors, KnownFactors, Method
from kfac_prune.curvature.few_tokens import FewTokens
from kfac_prune.curvature.sequences import STATISTICS, SequenceFisher, SequenceMethod
from kfac_prune.models import Layer, owners
from kfac_prune.obs import NM, THOROUGH, AdmmSchedule, Pattern, Unstructured, solve
from kfac_prune.operators import Curvature, Damping, DampingRecord, Kronecker, quadratic_loss
from kfac_prune.progress import progress
from kfac_prune.store import Journal

#: How a layer can be pruned: by one of the curvatures, or by a method of the field.
PruningMethod = Method | SequenceMethod | Literal["sparsegpt", "alps", "wanda", "llm-surgeon"]
#: Those that see one layer's A alone and leave its bias.
LAYERWISE_SOLVERS = {"sparsegpt": sparsegpt, "alps": alps}


@dataclass(frozen=True)
class PlannedLayer:
    """One layer of a plan.

    Attributes:
        name: of the layer.
        weight: [out, in], pruned and compensated, in the model's dtype.
        bias: [out] or None.
        mask: [out, in] bool, True = kept.
        predicted: nats per token that the change costs: under the damped G ⊗ A whatever the method, times what a probe
            found between measured and predicted.
        kkt: relative KKT residual of the method's own problem (0 = optimal compensation); None where none was
            solved.
        damping: what was added to the factors.
        groups_fit: False where an n:m pattern does not divide the width: the last group is shorter than m, and
            hardware that needs whole groups cannot use the layer.
        few: of an expert, its share of the tokens and how its factors were shrunk; None for any other layer.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    mask: Tensor
    predicted: float
    kkt: float | None
    damping: tuple[DampingRecord, ...]
    groups_fit: bool = True
    few: FewTokens | None = None

    @property
    def sparsity(self) -> float:
        """Fraction of weights removed."""
        return 1 - int(self.mask.sum()) / self.mask.numel()

    def tensors(self) -> dict[str, Tensor]:
        """Weight, mask and bias by name, for a file."""
        both = {"weight": self.weight, "mask": self.mask}
        return both if self.bias is None else {**both, "bias": self.bias}

    def figures(self) -> dict[str, Any]:
        """All else, as JSON can hold it."""
        damping = [asdict(record) for record in self.damping]
        few = None if self.few is None else asdict(self.few)
        own = {"predicted": self.predicted, "kkt": self.kkt, "groups_fit": self.groups_fit}
        return own | {"damping": damping, "few": few}

    @classmethod
    def restored(cls, layer: Layer, tensors: Mapping[str, Tensor], figures: Mapping[str, Any]) -> PlannedLayer:
        """What ``tensors`` and ``figures`` told of a layer, on its device."""
        there = {name: tensor.to(layer.weight.device) for name, tensor in tensors.items()}
        damping = tuple(DampingRecord(**record) for record in figures["damping"])
        few = None if figures["few"] is None else FewTokens(**figures["few"])
        whole: dict[str, Any] = {**figures, "damping": damping, "few": few}
        return cls(layer.name, there["weight"], there.get("bias"), there["mask"], **whole)


@dataclass(frozen=True)
class Problems:
    """The pruning problem of each layer under one method.

    Attributes:
        factors: of all layers.
        method: by which layers are pruned.
        damping: of the factors.
        sequences: the curvatures of the methods that need the gradients of whole sequences; None for all others.
    """

    factors: Factors
    method: PruningMethod
    damping: Damping
    sequences: SequenceFisher | None = None
    _known: dict[str, KnownFactors] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __call__(self, layer: Layer) -> tuple[Tensor, Curvature, list[DampingRecord]]:
        """W [out, in] in float32, its curvature, and what damping that took; for methods with a curvature."""
        if self.method in STATISTICS:
            assert self.sequences is not None
            operator, records = self.sequences.operator(layer, self.damping)
        else:
            method: Any = self.method  # callers know that it is one of ``Method``
            known = self._known.get(layer.name)
            operator, records = self.factors.layers[layer.name].operator(
                method, self.damping, where=layer.name, known=known
            )
            if known is None and isinstance(operator, Kronecker):
                self._known[layer.name] = KnownFactors(records, operator.inverse_diagonals)
        return self._weight(layer), operator, records

    def _weight(self, layer: Layer) -> Tensor:
        """W [out, in] in float32, beside its factors."""
        return layer.weight.to(self.factors.layers[layer.name].a.device, torch.float32)

    def solve(self, layer: Layer, pattern: Pattern, schedule: AdmmSchedule = THOROUGH) -> PlannedLayer:
        """Prune one layer by the method, round to the model's dtype, and predict what that costs.

        Args:
            layer: dense.
            pattern: feasible masks.
            schedule: of the search, for methods with a curvature.
        """
        statistics = self.factors.layers[layer.name]
        weight = self._weight(layer)
        fisher: Curvature | None = None
        kkt: float | None = None
        records: list[DampingRecord] = []
        if self.method == "wanda":
            mask = wanda(weight, statistics.a, pattern)
            x = weight * mask
        elif self.method in LAYERWISE_SOLVERS:
            x, mask, record = LAYERWISE_SOLVERS[self.method](weight, statistics.a, pattern, where=layer.name)
            records = [record]
        else:
            weight, operator, records = self(layer)
            solution = solve(weight, operator, pattern, schedule)
            x, mask, kkt = solution.weight, solution.mask, solution.kkt
            fisher = operator if self.method == "kfac" else None
        shift = torch.zeros_like(weight[:, 0])
        if self.method in ("kfac", "layerwise"):
            shift = statistics.bias_update(x.to(layer.weight.dtype).to(weight.dtype) - weight)
        planned = self.priced(layer, x, mask, shift, fisher)
        groups_fit = not isinstance(pattern, NM) or layer.shape[1] % pattern.m == 0
        return replace(planned, kkt=kkt, damping=tuple(records), groups_fit=groups_fit)

    def solve_all(
        self,
        layers: Sequence[Layer],
        pattern: Pattern | None,
        sparsities: Mapping[str, float],
        *,
        label: str,
        schedule: AdmmSchedule = THOROUGH,
        journal: Journal | None = None,
        quiet: bool = True,
    ) -> list[PlannedLayer]:
        """Prune all layers, each by ``solve``: to the pattern, or without one to its sparsity. See ``solved``.

        A journal has every layer that is finished, as its own ``part``.
        """

        def one(number: int) -> PlannedLayer:
            layer = layers[number]
            finished = None if journal is None else journal.read(part(layer))
            if finished is not None:
                return PlannedLayer.restored(layer, *finished)
            made = self.solve(layer, pattern or Unstructured(sparsities[layer.name]), schedule)
            if journal is not None:
                journal.write(part(layer), made.tensors(), made.figures())
            return made

        return solved(layers, one, label=label, quiet=quiet)

    def priced(
        self, layer: Layer, x: Tensor, mask: Tensor, shift: Tensor, fisher: Curvature | None = None
    ) -> PlannedLayer:
        """What it is predicted to cost that a layer becomes another; whatever the method, under the damped G ⊗ A.

        Args:
            layer: dense.
            x: its new weights [out, in].
            mask: of them.
            shift: of its bias [out], for layers that have one.
            fisher: the damped G ⊗ A; None builds it.
        """
        statistics = self.factors.layers[layer.name]
        if fisher is None:
            fisher, _ = statistics.operator("kfac", self.damping, where=layer.name)
        weight, bias = self._weight(layer), layer.bias
        rounded = x.to(layer.weight.dtype)
        change = rounded.to(weight.dtype) - weight
        if bias is not None:
            bias = (bias.to(weight) + shift).to(bias)
        return PlannedLayer(
            name=layer.name,
            weight=rounded.to(layer.weight.device),
            bias=bias,
            mask=mask.to(layer.weight.device),
            predicted=quadratic_loss(fisher, change) + statistics.bias_loss(change, shift),
            kkt=None,
            damping=(),
            few=statistics.few,
        )


def part(layer: Layer) -> str:
    """Name of a solved layer in a journal."""
    return f"layer {layer.name}"


def solved(
    layers: Sequence[Layer], solve: Callable[[int], PlannedLayer], *, label: str, quiet: bool = True
) -> list[PlannedLayer]:
    """Every layer solved; several processes share the layers out, and each has the results of all.

    Args:
        layers: to solve.
        solve: gives the result for the layer with a number.
        label: of the progress bar.
        quiet: show no progress bar.
    """
    owner = owners(layers)
    mine = [number for number, process in enumerate(owner) if process == ranks.index()]
    made = {number: solve(number) for number in progress(mine, desc=label, unit="layer", disable=quiet)}
    return [agreed(made.get(number), layer, owner[number]) for number, layer in enumerate(layers)]


def agreed(made: PlannedLayer | None, layer: Layer, source: int = 0) -> PlannedLayer:
    """What one process has made of a layer, in all of them.

    Args:
        made: by this process; only that of the source counts.
        layer: that it is made of.
        source: number of the process.
    """
    if ranks.count() == 1:
        assert made is not None
        return made
    if ranks.index() != source:  # others may have made theirs, or not
        weight = layer.weight
        mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
        made = PlannedLayer(layer.name, torch.empty_like(weight), layer.bias, mask, 0.0, None, ())
    assert made is not None
    told = ranks.told((made.predicted, made.kkt, made.damping, made.groups_fit, made.few), source)
    bias = None if made.bias is None else ranks.sent(made.bias.clone(), source)
    weight, mask = ranks.sent(made.weight, source), ranks.sent(made.mask, source)
    return PlannedLayer(layer.name, weight, bias, mask, *told)
