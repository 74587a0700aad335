"""What removing units of one group costs, at every size it can be given, corrected by measurements."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product

import torch
from torch import Tensor

from kfac_prune.structure.groups import AttentionHeads, ExpertUnits, FfnUnits, Group, Member, saving
from kfac_prune.structure.removal import ColumnProblem, cheapest, cheapest_each, removal_order

#: Choices of heads that are all compared at most; beyond it they are removed greedily.
EXHAUSTIVE = 512
#: Fractions of a group's weights, removed, at which a curve is measured.
MEASURED = (0.15, 0.3, 0.5, 0.7, 0.85)
#: Grouped products of experts want rows of whole 16 bytes; in 16 bits these are so many numbers.
EXPERTS_MULTIPLE = 8
#: Nats per token; a smaller measured cost is rounding.
LEAST = 1e-9


@dataclass(frozen=True)
class Option:
    """One size of a group.

    Attributes:
        kept: the selection of its units that costs least at this size.
        saving: weights that go.
        cost: nats per token.
    """

    kept: Tensor
    saving: int
    cost: float


def ffn_options(group: FfnUnits, problem: ColumnProblem, multiple: int) -> list[Option]:
    """All widths that are multiples of ``multiple``, from the present one down; greedy removal in one pass."""
    order, costs = removal_order(problem)
    n = group.units
    options = [Option(group.everything(), 0, 0.0)]
    for width in range((n - 1) // multiple * multiple, 0, -multiple):
        kept = order[n - width :].sort().values
        options.append(Option(kept, saving(group, kept), float(costs[n - width - 1])))
    return options


def expert_options(each: Sequence[Sequence[Option]]) -> list[Option]:
    """All widths, from the options of every expert at the same widths."""
    options = []
    for same in zip(*each, strict=True):
        kept = torch.stack([option.kept for option in same])
        options.append(Option(kept, sum(option.saving for option in same), sum(option.cost for option in same)))
    return options


def head_options(group: AttentionHeads, problem: ColumnProblem) -> list[Option]:
    """Every number of KV groups with every number of query heads in each, at least one of both."""
    heads = group.everything()
    units = [group.columns(heads[i : i + 1]) for i in range(group.groups)]
    options: list[Option] = []
    rest, gone = problem, tuple[int, ...]()
    for removed in range(group.groups):
        if removed and math.comb(group.groups, group.groups // 2) <= EXHAUSTIVE:
            gone = cheapest(problem, units, combinations(range(group.groups), removed))
            rest = problem.without(torch.cat([units[i] for i in gone]))
        elif removed:
            rest, one = cheapest_each(rest, units, [[i for i in range(group.groups) if i not in gone]])
            gone = (*gone, *one)
        present = heads[[i for i in range(group.groups) if i not in gone]]
        options += [
            Option(kept, saving(group, kept), problem.cost(_others(group, kept)))
            for kept in _fewer_queries(group, rest, present)
        ]
    return sorted(options, key=lambda option: option.saving)


def _fewer_queries(group: AttentionHeads, problem: ColumnProblem, heads: Tensor) -> Iterator[Tensor]:
    """The best selections with ever fewer query heads per KV group, from the given [groups, per group] down to one."""
    units = [group.columns(head.view(1, 1)) for head in group.everything().reshape(-1)]
    kept, rest, gone = heads, problem, tuple[int, ...]()
    yield kept
    for removed in range(1, heads.shape[1]):
        if math.comb(heads.shape[1], removed) ** len(heads) <= EXHAUSTIVE:
            picks = product(*(combinations(row, removed) for row in heads.tolist()))
            gone = cheapest(problem, units, ([head for row in choice for head in row] for choice in picks))
            rest = problem.without(torch.cat([units[i] for i in gone]))
        else:
            rest, more = cheapest_each(rest, units, kept.tolist())
            gone = (*gone, *more)
        kept = heads[~torch.isin(heads, torch.tensor(gone))].view(len(heads), -1)
        yield kept


def _others(group: Member, kept: Tensor) -> Tensor:
    """The consumer's columns that go."""
    columns = group.columns(group.everything())
    return columns[~torch.isin(columns, group.columns(kept))]


def multiple_of(group: Group, multiple: int) -> int:
    """Of which the widths of an FFN or of experts are, where the user wants multiples of ``multiple``."""
    return math.lcm(multiple, EXPERTS_MULTIPLE) if isinstance(group, ExpertUnits) else multiple


def options_of(group: Group, problem: Callable[[Member], ColumnProblem], multiple: int) -> list[Option]:
    """All sizes that a group can have, by increasing saving; the first keeps everything.

    Args:
        group: of any kind.
        problem: the removal of the columns of a member's consumer.
        multiple: of FFN widths.
    """
    multiple = multiple_of(group, multiple)
    if isinstance(group, ExpertUnits):
        return expert_options([ffn_options(one, problem(one), multiple) for one in group.experts])
    if isinstance(group, FfnUnits):
        return ffn_options(group, problem(group), multiple)
    return head_options(group, problem(group))


def corrected(options: Sequence[Option], measure: Callable[[Option], float]) -> list[Option]:
    """The options with costs that pass through measured ones.

    A few sizes are measured; the ratio of measured to predicted cost is interpolated in its logarithm over the saving
    and continued as a constant at both ends.
    """
    largest = options[-1].saving
    nearest = [min(options[1:], key=lambda o: abs(o.saving - f * largest), default=None) for f in MEASURED]
    points: dict[int, float] = {}
    for option in nearest:
        if option is not None and option.saving not in points and option.cost > 0:
            points[option.saving] = math.log(max(measure(option), LEAST) / option.cost)
    if not points:
        return list(options)
    xs, ys = zip(*sorted(points.items()), strict=True)
    return [replace(o, cost=o.cost * math.exp(interpolated(xs, ys, o.saving))) for o in options]


def interpolated(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """Piecewise linear through (xs, ys), xs increasing, constant outside."""
    i = bisect_left(xs, x)
    if i in (0, len(xs)):
        return ys[min(i, len(xs) - 1)]
    t = (x - xs[i - 1]) / (xs[i] - xs[i - 1])
    return (1 - t) * ys[i - 1] + t * ys[i]
