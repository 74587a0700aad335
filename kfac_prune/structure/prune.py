"""Structured pruning from end to end: plan, cut, refit, in one shot or several; both kinds of plans, the better one."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from kfac_prune.curvature.estimate import estimate_factors
from kfac_prune.curvature.factors import Method
from kfac_prune.data import Windows
from kfac_prune.errors import InputError
from kfac_prune.experts import ExpertLinear
from kfac_prune.fisher import FisherType
from kfac_prune.models import Layer
from kfac_prune.objective import CAUSAL, Objective
from kfac_prune.operators import Damping
from kfac_prune.quality import evaluate
from kfac_prune.structure.curves import Option, multiple_of
from kfac_prune.structure.groups import AttentionHeads, Group, consumers_of, find_heads, find_widths, same_kinds, saving
from kfac_prune.structure.plan import Problem, Saving, one_size, own_sizes
from kfac_prune.structure.repair import repair
from kfac_prune.structure.shrink import CannotBeStored, Cut, auto_class, base_class, shrink

logger = logging.getLogger("kfac_prune")

Kind = Literal["ffn", "heads"]
Widths = Literal["uniform", "per-layer"]

#: Added to A, as a fraction of its mean diagonal.
DAMPING = Damping(1e-3)
#: A plan whose predicted loss exceeds this many nats per token is tried in several shots as well.
LARGE_LOSS = 0.05
SHOTS = 3
#: Several shots are kept unless the held-out windows find them worse by this fraction: few windows cannot tell less,
#: and on other text they are better by 3-10 %.
TOLERANCE = 0.05
#: Calibration windows, a quarter at most, that curves are measured and plans compared on; nothing is fitted to them.
HELD_OUT = 16


@dataclass(frozen=True)
class Target:
    """What a plan must save.

    Attributes:
        amount: in the unit of ``saving``, from the dense model.
        saving: what giving a group a size saves.
        saved: what a model, itself cut from the dense one, has saved so far.
        unit: of all three, for messages.
        limit: what may be asked for at most where so much can be saved, in the user's own terms.
    """

    amount: float
    saving: Saving
    saved: Callable[[PreTrainedModel], float]
    unit: str
    limit: Callable[[float], str]


@dataclass(frozen=True)
class Settings:
    """How structured pruning goes about it.

    Attributes:
        method: curvature by which units are chosen and consumers compensated.
        shots: cuts on the way to the target, with the curvature estimated anew before each; None: 1, and where the
            predicted loss is large the better kind of plan is carried out again in 3, to keep what lost less.
        refit: repair each cut model, layer by layer.
        multiple: of FFN widths; None: 64 for widths from 2048, else 8.
        damping: of the factors.
        objective: what the model computes; losses are in nats per its unit.
        fisher: labels of the Fisher.
        seed: of sampled labels.
        batch_size: windows per pass.
        max_memory: bytes of factors at a time; see ``estimate_factors``.
        quiet: show no progress bars.
    """

    method: Method = "kfac"
    shots: int | None = None
    refit: bool = True
    multiple: int | None = None
    damping: Damping = DAMPING
    objective: Objective = CAUSAL
    fisher: FisherType = "sampled"
    seed: int = 0
    batch_size: int = 4
    max_memory: int | None = None
    quiet: bool = True


@dataclass(frozen=True)
class Shrunk:
    """A finished plan.

    Attributes:
        model: the smaller model.
        widths: "uniform" (plain configuration) or "per-layer".
        sizes: per group its size before and after: (units,) or (KV groups, query heads per group).
        unseen: the consumers of experts that no token reached in the dense model; their units went by magnitude.
        predicted: summed costs of all cuts before their refit, nats per unit of the objective.
        kl: KL(dense‖model) on the held-out calibration windows, nats per unit.
        shots: that were taken.
    """

    model: PreTrainedModel
    widths: Widths
    sizes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    unseen: tuple[str, ...]
    predicted: float
    kl: float
    shots: int

    def table(self) -> str:
        """Group by group: size before and after, as aligned text."""
        width = max(len("group"), *(len(name) for name in self.sizes))
        lines = [f"{'group':{width}}  {'units':>14}  -> kept"]
        for name, (before, after) in self.sizes.items():
            lines.append(f"{name:{width}}  {_size(before):>14}  -> {_size(after)}")
        return "\n".join(lines)


def _size(shape: tuple[int, ...]) -> str:
    return str(shape[0]) if len(shape) == 1 else f"{shape[0]} x {shape[1]} heads"


def find_groups(model: PreTrainedModel, layers: Sequence[Layer], kinds: Sequence[Kind]) -> list[Group]:
    """The groups of the wanted kinds whose layers are all to be pruned.

    Raises:
        InputError: there is none of a kind; says why.
    """
    groups: list[Group] = []
    if "ffn" in kinds:
        groups += find_widths(model, layers)
        if not groups:
            raise InputError(
                f"no FFN of {type(model).__name__} has a known layout with all of its layers to be pruned; "
                "`kfac-prune inspect` lists what there is"
            )
    if "heads" in kinds:
        heads = find_heads(model, layers)
        if not heads:
            raise InputError(
                f"the heads of {type(model).__name__} cannot be removed: its attention has a layout in which heads "
                "cannot be told apart or fewer heads cannot be stored; use --structured ffn"
            )
        groups += heads
    return groups


def weights_target(model: PreTrainedModel, layers: Sequence[Layer], sparsity: float) -> Target:
    """Remove a fraction of the weights of ``layers``."""
    names = [layer.name for layer in layers]
    total = sum(layer.weight.numel() for layer in layers)

    def saved(smaller: PreTrainedModel) -> float:
        return total - sum(Layer(name, smaller.get_submodule(name)).weight.numel() for name in names)

    def limit(most: float) -> str:
        return f"--sparsity can be {math.floor(1e4 * most / total) / 1e4:g} at most"

    return Target(sparsity * total, lambda group, option: option.saving, saved, "weights", limit)


def parameters_target(model: PreTrainedModel, layers: Sequence[Layer], wanted: int) -> Target:
    """Bring the whole model down to a number of parameters.

    Raises:
        InputError: the model has no more than that.
    """
    present = model.num_parameters()
    if wanted >= present:
        raise InputError(f"--target-params is {wanted:,}, and the model has {present:,} parameters; ask for fewer")
    total = sum(layer.weight.numel() for layer in layers)
    target = weights_target(model, layers, (present - wanted) / total)
    return replace(target, limit=lambda most: f"--target-params must be {present - int(most):,} at least")


def prune_structured(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    calibration: Windows,
    target: Target,
    *,
    kinds: Sequence[Kind] = ("ffn", "heads"),
    widths: Widths | None = None,
    settings: Settings | None = None,
    echo: Callable[[str], None] = logger.info,
) -> tuple[Shrunk, list[Shrunk]]:
    """Remove FFN units and attention heads; the model itself stays as it is.

    Args:
        model: dense.
        layers: that may be cut; a group takes part only with all of its layers.
        calibration: tokens [N, T]; the last few windows are only measured on.
        target: what must be saved, e.g. from ``weights_target``.
        kinds: of groups.
        widths: None builds a uniform and a per-layer plan and keeps the better.
        settings: None is ``Settings()``.
        echo: receives a line per finished step.

    Returns:
        The best plan and the others.

    Raises:
        InputError: nothing can be removed, or the target is out of reach; says what is within it.
    """
    settings = settings or Settings()
    groups = find_groups(model, layers, kinds)
    fit, held_out = calibration, calibration
    if len(calibration) > 1:
        fit, held_out = calibration.split(max(min(len(calibration) // 4, HELD_OUT), 1))
    else:
        echo("  the one calibration window is both fitted to and measured on; add --samples")
    width = max((g.units for g in groups if not isinstance(g, AttentionHeads)), default=0)
    multiple = settings.multiple or (64 if width >= 2048 else 8)
    settings = replace(settings, multiple=multiple)
    _check_reach(groups, target, multiple)
    wanted: list[Widths] = [widths] if widths else ["uniform", "per-layer"]
    refused = _refused(model, groups)
    for one in [one for one in wanted if one in refused]:
        if len(refused) >= len(wanted):
            raise InputError(f"no {one} plan: {refused[one]}; {_INSTEAD[one]}")
        echo(f"  no {one} plan: {refused[one]}")
        wanted.remove(one)
    job = _Job(model, [layer.name for layer in layers], kinds, fit, held_out, target, settings, echo)
    first = job.problem(model)
    curves = job.curves(first)
    finished = []
    for one in wanted:
        try:
            done = job.run(one, first, curves, settings.shots or 1)
        except CannotBeStored as error:
            if widths == one:
                raise
            echo(f"  no {one} plan: {error}")
            continue
        if done is not None:
            finished.append(done)
    if not finished:
        raise InputError(
            f"no {widths or 'uniform'} plan reaches the target of {target.amount:,.6g} {target.unit}: a plain "
            "configuration holds one width for all blocks, and not every number of heads; use --widths per-layer, or "
            "include all blocks and both ffn and heads"
        )
    best = min(finished, key=lambda done: done.kl)  # the first, plain one among equals
    if settings.shots is None and best.predicted > LARGE_LOSS:
        again = job.run(best.widths, first, curves, SHOTS)
        if again is not None:
            finished.append(again)
            best = again if again.kl < best.kl * (1 + TOLERANCE) else best
    return best, [done for done in finished if done is not best]


@dataclass(frozen=True)
class _Job:
    """What all plans of one call share."""

    dense: PreTrainedModel
    names: Sequence[str]
    kinds: Sequence[Kind]
    fit: Windows
    held_out: Windows
    target: Target
    settings: Settings
    echo: Callable[[str], None]

    def problem(self, model: PreTrainedModel) -> Problem:
        """Groups and curvature of a model that is cut from the dense one."""
        s = self.settings
        layers = [Layer(name, model.get_submodule(name)) for name in self.names]
        groups = find_groups(model, layers, self.kinds)
        consumers = consumers_of(groups)
        options: Any = {"seed": s.seed, "batch_size": s.batch_size, "max_memory": s.max_memory, "quiet": s.quiet}
        factors = estimate_factors(model, consumers, self.fit, objective=s.objective, fisher=s.fisher, **options)
        problem = Problem(model, groups, factors, s.method, s.damping, s.objective)
        if count := len(problem.unseen):
            self.echo(f"  no calibration token reaches {count} experts: their units go by magnitude; add --samples")
        return problem

    def curves(self, problem: Problem) -> dict[str, list[Option]]:
        """Cost curves, measured on the held-out windows."""
        s = self.settings
        assert s.multiple is not None
        return problem.curves(self.held_out, multiple=s.multiple, batch_size=s.batch_size, quiet=s.quiet)

    def plan(
        self, widths: Widths, problem: Problem, curves: Mapping[str, Sequence[Option]], share: float
    ) -> dict[str, Option] | None:
        """Sizes that bring a model to this share of the target."""
        amount = share * self.target.amount - self.target.saved(problem.model)
        if amount <= 0:
            return {name: options[0] for name, options in curves.items()}
        if widths == "uniform":
            return one_size(problem.model, problem.groups, curves, self.target.saving, amount)
        return own_sizes(problem.groups, curves, self.target.saving, amount)

    def run(
        self, widths: Widths, problem: Problem, curves: Mapping[str, Sequence[Option]], shots: int
    ) -> Shrunk | None:
        """Carry out one kind of plan in so many shots; None if there is none that reaches the target.

        Args:
            widths: kind of plan.
            problem: of the dense model.
            curves: of its groups.
            shots: cuts, with curvature and curves of the present model before each but the first.
        """
        s = self.settings
        before = {group.name: group.size(group.everything()) for group in problem.groups}
        rows = {name: torch.arange(Layer(name, self.dense.get_submodule(name)).shape[0]) for name in self.names}
        sizes, predicted, model, unseen = before, 0.0, self.dense, tuple(problem.unseen)
        for shot in range(1, shots + 1):
            if shot > 1:
                problem = self.problem(model)
                curves = self.curves(problem)
            plan = self.plan(widths, problem, curves, shot / shots)
            if plan is None:  # out of reach for one width for all
                return None
            predicted += sum(option.cost for option in plan.values())
            cuts = [cut for group in problem.groups for cut in problem.cuts(group, plan[group.name])]
            for cut in cuts:
                for layer, kept in cut.group.rows(cut.kept):
                    rows[layer.name] = rows[layer.name][kept]
            sizes = {group.name: group.size(plan[group.name].kept) for group in problem.groups}
            model = shrink(problem.model, cuts, plain=widths == "uniform")
            _check_same(problem, cuts, model, self.held_out)
            if s.refit:
                repair(self.dense, model, rows, self.fit, batch_size=s.batch_size, quiet=s.quiet)
        options: Any = {"objective": s.objective, "batch_size": s.batch_size, "quiet": s.quiet}
        kl = evaluate(model, self.held_out, dense=self.dense, **options).kl
        assert kl is not None
        self.echo(f"  {widths} widths in {shots} shot{'s' * (shots > 1)}: KL {kl:.4f} on held-out calibration windows")
        both = {name: (before[name], sizes[name]) for name in sizes}
        return Shrunk(model, widths, both, unseen, predicted, kl, shots)


def _check_same(problem: Problem, cuts: Sequence[Cut], smaller: PreTrainedModel, windows: Windows) -> None:
    """The smaller model computes what the model with zeros does; nothing else in the architecture knew of the units."""
    mixture = any(isinstance(cut.group.consumer.module, ExpertLinear) for cut in cuts)
    ids, mask = next(windows.batches(8 if mixture else 1)).on(smaller.device)
    with torch.inference_mode():
        with problem.masked(cuts):
            wanted = problem.objective.output(problem.model, ids, mask).float()
        try:
            got = problem.objective.output(smaller, ids, mask).float()
        except RuntimeError as error:  # shapes that do not fit together
            raise InputError(f"{_DIFFERS}: {str(error).splitlines()[0]}") from error
    per_token = (got - wanted).abs().amax(-1)
    largest = per_token.median() if mixture else per_token.max()  # rounding may send a token to another expert
    difference = float(largest / wanted.abs().max())
    if not difference < (1e-4 if smaller.dtype == torch.float32 else 5e-2):
        raise InputError(f"{_DIFFERS} by {difference:.2g} of the largest output")


_DIFFERS = (
    "this architecture ties units together in a way that is not known here: after the cut the smaller model and the "
    "one with zeros differ"
)


def _refused(model: PreTrainedModel, groups: Sequence[Group]) -> dict[Widths, str]:
    """The kinds of plans that no checkpoint could hold, and why."""
    refused: dict[Widths, str] = {}
    if {group.name for group in groups} != {group.name for group in same_kinds(groups, model)}:
        refused["uniform"] = "a plain configuration holds one width for all blocks, and some would stay as they are"
    try:
        auto_class(base_class(model))
    except CannotBeStored as error:
        refused["per-layer"] = str(error)
    return refused


_INSTEAD: dict[Widths, str] = {
    "uniform": "use --widths per-layer, or include all blocks",
    "per-layer": "use --widths uniform",
}


def _check_reach(groups: Sequence[Group], target: Target, multiple: int) -> None:
    """Every group cut to its least size saves what is asked for; before any long work."""
    most = 0.0
    for group in groups:
        everything = group.everything()
        heads = isinstance(group, AttentionHeads)
        least = everything[:1, :1] if heads else everything[..., : multiple_of(group, multiple)]
        most += target.saving(group, Option(least, saving(group, least), 0.0))
    if most < target.amount * (1 - 1e-9):
        raise InputError(
            f"to save {target.amount:,.6g} {target.unit} would leave nothing of {groups[0].name} and its kind: the "
            f"{len(groups)} groups, each cut to the least, save {most:,.6g}, so {target.limit(most)}; ask for that, "
            "lower --multiple, or add groups to --structured"
        )
