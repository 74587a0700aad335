"""Which size every group gets, so that the wanted saving costs least: one size for all blocks, or one for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product

from torch import Tensor
from transformers import PreTrainedModel

from kfac_prune import ranks
from kfac_prune.allocate import choose
from kfac_prune.curvature.factors import Factors, Method
from kfac_prune.data import Windows
from kfac_prune.models import WeightSwap
from kfac_prune.objective import CAUSAL, Objective
from kfac_prune.operators import Curvature, Damping
from kfac_prune.probe import Probe, last_few
from kfac_prune.progress import progress
from kfac_prune.structure.curves import MEASURED, Option, corrected, options_of
from kfac_prune.structure.groups import AttentionHeads, Group, Member, consumers_of
from kfac_prune.structure.removal import ColumnProblem, compensated
from kfac_prune.structure.shrink import Cut, accepted_heads, ffn_kind

#: How many passes over the windows all measurements of curves together may take (but one has at least 4 windows).
MEASURING_PASSES = 64
#: What an option saves, in the unit of the target: weights, or milliseconds.
Saving = Callable[[Group, Option], float]


@dataclass(frozen=True)
class Problem:
    """Groups of one model with their curvature.

    Attributes:
        model: to be cut; its weights are changed only while a size is measured.
        groups: all that may lose units.
        factors: with the consumers' curvature; an expert that no token reached has none.
        method: which curvature they give.
        damping: of the factors.
        objective: what the model computes.
    """

    model: PreTrainedModel
    groups: Sequence[Group]
    factors: Factors
    method: Method
    damping: Damping
    objective: Objective = CAUSAL

    @property
    def unseen(self) -> list[str]:
        """Names of the consumers that no token reached."""
        return [layer.name for layer in consumers_of(self.groups) if layer.name not in self.factors.layers]

    def curvature(self, member: Member) -> Curvature | None:
        """Of the consumer; None for an expert that no token reached."""
        name = member.consumer.name
        factors = self.factors.layers.get(name)
        return None if factors is None else factors.operator(self.method, self.damping, where=name)[0]

    def removal(self, member: Member) -> ColumnProblem:
        """Of the columns of the consumer."""
        weight, curvature = member.consumer.weight.float(), self.curvature(member)
        return ColumnProblem.unseen(weight) if curvature is None else ColumnProblem.of(weight, curvature)

    def cuts(self, group: Group, option: Option) -> list[Cut]:
        """One size of a group: the consumers' compensated weights and biases."""
        return [self._cut(member, kept) for member, kept in group.members(option.kept)]

    def _cut(self, member: Member, kept: Tensor) -> Cut:
        weight, consumer = member.consumer.weight.float(), member.consumer
        columns, curvature = member.columns(kept).to(weight.device), self.curvature(member)
        x = weight[:, columns] if curvature is None else compensated(weight, curvature, columns)
        bias = consumer.bias
        if bias is not None and self.method in ("kfac", "layerwise"):
            change = -weight
            change[:, columns] += x
            bias = bias.float() + self.factors.layers[consumer.name].bias_update(change)
        return Cut(member, kept, x, bias)

    def measured(self, group: Group, option: Option, probe: Probe) -> float:
        """KL(model‖model with this group alone cut), nats per token."""
        with self.masked(self.cuts(group, option)) as whole:
            return probe.kl(consumers_of([group]), whole)

    @contextmanager
    def masked(self, cuts: Sequence[Cut]) -> Iterator[WeightSwap]:
        """Within the block the model has the cuts' weights, with zeros for what goes; yields what it had before."""
        whole = WeightSwap([cut.group.consumer for cut in cuts])
        try:
            for cut in cuts:
                weight = cut.group.consumer.weight.new_zeros(cut.group.consumer.shape)
                weight[:, cut.group.columns(cut.kept).to(weight.device)] = cut.weight.to(weight.dtype)
                cut.group.consumer.assign(weight, cut.bias)
            yield whole
        finally:
            whole.restore()

    def curves(
        self, windows: Windows | None, *, multiple: int, batch_size: int = 4, quiet: bool = True
    ) -> dict[str, list[Option]]:
        """Per group all the sizes that it can have, with their costs, by increasing saving; the first keeps everything.

        Args:
            windows: to measure a few sizes of every group on, which corrects the rest; on the last of them where they
                are long or groups many. None trusts the predictions, which do not compare across groups unless the
                method is kfac.
            multiple: of FFN widths.
            batch_size: windows per pass.
            quiet: show no progress bar.
        """
        probe = None
        if windows is not None:
            few = last_few(windows, len(MEASURED) * len(self.groups), MEASURING_PASSES)
            probe = Probe(self.model, few, batch_size, self.objective)
        found = {}
        for group in progress(ranks.share(self.groups), desc="cost curves", unit="group", disable=quiet):
            options = options_of(group, self.removal, multiple)
            if probe is not None:
                options = corrected(options, partial(self.measured, group, probe=probe))
            found[group.name] = options
        curves = {name: options for part in ranks.gathered(found) for name, options in part.items()}
        return {group.name: curves[group.name] for group in self.groups}


def own_sizes(
    groups: Sequence[Group], curves: Mapping[str, Sequence[Option]], saving: Saving, target: float
) -> dict[str, Option] | None:
    """The size of every group such that the target is reached at the least total cost; None if it cannot be reached."""
    taken = choose([[(saving(g, o), o.cost) for o in curves[g.name]] for g in groups], target)
    return None if taken is None else {g.name: curves[g.name][i] for g, i in zip(groups, taken, strict=True)}


def one_size(
    model: PreTrainedModel,
    groups: Sequence[Group],
    curves: Mapping[str, Sequence[Option]],
    saving: Saving,
    target: float,
) -> dict[str, Option] | None:
    """The best plan in which all FFNs of a kind have one width and all attentions the same heads; None without one.

    Only numbers of heads that a plain configuration of the model can hold are considered.
    """
    kinds: dict[str, list[Group]] = {}
    for group in groups:
        kinds.setdefault("heads" if isinstance(group, AttentionHeads) else ffn_kind(group), []).append(group)
    common = {kind: _common(members, curves) for kind, members in kinds.items()}
    attentions = [g for g in groups if isinstance(g, AttentionHeads)]
    if attentions:
        whole = attentions[0].size(attentions[0].everything())
        held = accepted_heads(model, attentions[0])
        common["heads"] = {size: taken for size, taken in common["heads"].items() if size == whole or size in held}
    choices = []  # per kind: what is saved, the cost, and the options
    for kind in sorted(kinds, key=lambda kind: (kind != "heads", len(common[kind]))):
        members, rows = kinds[kind], []
        for taken in common[kind].values():
            saved = sum(saving(group, option) for group, option in zip(members, taken, strict=True))
            plan = {group.name: option for group, option in zip(members, taken, strict=True)}
            rows.append((saved, sum(option.cost for option in taken), plan))
        choices.append(rows)
    return _cheapest(choices, target * (1 - 1e-9))


def _cheapest(
    choices: Sequence[Sequence[tuple[float, float, dict[str, Option]]]], target: float
) -> dict[str, Option] | None:
    """One (saving, cost, plan) of every sequence such that the savings reach the target at the least total cost."""
    *others, last = choices
    best: tuple[float, dict[str, Option]] | None = None
    for some in product(*others):
        needed = target - sum(saving for saving, _, _ in some)
        one = min((row for row in last if row[0] >= needed), key=lambda row: row[1], default=None)
        if one is not None:
            taken = (*some, one)
            cost = sum(cost for _, cost, _ in taken)
            if best is None or cost < best[0]:
                best = cost, {name: option for _, _, plan in taken for name, option in plan.items()}
    return None if best is None else best[1]


def _common(
    groups: Sequence[Group], curves: Mapping[str, Sequence[Option]]
) -> dict[tuple[int, ...], tuple[Option, ...]]:
    """The sizes that all groups offer, each with the groups' options."""
    tables = [{group.size(option.kept): option for option in curves[group.name]} for group in groups]
    return {shape: tuple(t[shape] for t in tables) for shape in tables[0] if all(shape in t for t in tables)}
