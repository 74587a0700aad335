"""Which size every group gets, so that the wanted saving costs least: one size for all blocks, or one for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from tqdm import tqdm
from transformers import PreTrainedModel

from kfac_prune.allocate import choose
from kfac_prune.curvature.factors import Factors, Method
from kfac_prune.data import Windows
from kfac_prune.models import WeightSwap
from kfac_prune.objective import CAUSAL, Objective
from kfac_prune.operators import Curvature, Damping
from kfac_prune.quality import evaluate
from kfac_prune.structure.curves import Option, corrected, options_of
from kfac_prune.structure.groups import AttentionHeads, FfnUnits, Group
from kfac_prune.structure.removal import compensated
from kfac_prune.structure.shrink import Cut, accepted_heads

#: What an option saves, in the unit of the target: weights, or milliseconds.
Saving = Callable[[Group, Option], float]


@dataclass(frozen=True)
class Problem:
    """Groups of one model with their curvature.

    Attributes:
        model: to be cut; its weights are changed only while a size is measured.
        groups: all that may lose units.
        factors: with the consumers' curvature.
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

    def curvature(self, group: Group) -> Curvature:
        """Of the group's consumer."""
        name = group.consumer.name
        return self.factors.layers[name].operator(self.method, self.damping, where=name)[0]

    def cut(self, group: Group, option: Option) -> Cut:
        """The consumer's compensated weights and bias at one size."""
        weight, consumer = group.consumer.weight.float(), group.consumer
        columns = group.columns(option.kept).to(weight.device)
        x = compensated(weight, self.curvature(group), columns)
        bias = consumer.bias
        if bias is not None and self.method in ("kfac", "layerwise"):
            change = -weight
            change[:, columns] += x
            bias = bias.float() + self.factors.layers[consumer.name].bias_update(change)
        return Cut(group, option.kept, x, bias)

    def measured(self, group: Group, option: Option, windows: Windows, batch_size: int) -> float:
        """KL(model‖model with this group alone cut), nats per token."""
        with self.masked([self.cut(group, option)]) as whole:
            kl = evaluate(
                self.model, windows, objective=self.objective, dense=whole.swapped_in, batch_size=batch_size
            ).kl
        assert kl is not None
        return kl

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
            windows: to measure a few sizes of every group on, which corrects the rest; None trusts the predictions,
                which do not compare across groups unless the method is kfac.
            multiple: of FFN widths.
            batch_size: windows per pass.
            quiet: show no progress bar.
        """
        curves = {}
        for group in tqdm(self.groups, desc="cost curves", unit="group", disable=quiet):
            options = options_of(group, group.consumer.weight.float(), self.curvature(group), multiple)
            if windows is not None:
                options = corrected(options, partial(self.measured, group, windows=windows, batch_size=batch_size))
            curves[group.name] = options
        return curves


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
    """The best plan in which all FFNs have one width and all attentions the same heads; None if there is none.

    Only numbers of heads that a plain configuration of the model can hold are considered.
    """
    ffns: list[Group] = [g for g in groups if isinstance(g, FfnUnits)]
    attentions = [g for g in groups if isinstance(g, AttentionHeads)]
    widths = _common(ffns, curves)
    counts = _common(attentions, curves)
    if attentions:
        whole = attentions[0].everything().shape
        held = accepted_heads(model, attentions[0])
        counts = {shape: options for shape, options in counts.items() if shape == whole or shape in held}
    best: tuple[float, dict[str, Option]] | None = None
    for heads in counts.values():
        for hidden in widths.values():  # by increasing saving
            plan = dict(zip((g.name for g in (*ffns, *attentions)), (*hidden, *heads), strict=True))
            if sum(saving(g, plan[g.name]) for g in groups) >= target * (1 - 1e-9):
                cost = sum(option.cost for option in plan.values())
                if best is None or cost < best[0]:
                    best = cost, plan
                break
    return None if best is None else best[1]


def _common(
    groups: Sequence[Group], curves: Mapping[str, Sequence[Option]]
) -> dict[tuple[int, ...], tuple[Option, ...]]:
    """The shapes of selections that all groups offer, each with the groups' options; one empty entry for no groups."""
    if not groups:
        return {(): ()}
    tables = [{tuple(option.kept.shape): option for option in curves[group.name]} for group in groups]
    return {shape: tuple(t[shape] for t in tables) for shape in tables[0] if all(shape in t for t in tables)}
