"""Channel permutations for n:m: the same function, with other weights sharing a group of m.

Three spaces of a transformer can be permuted freely: the hidden units of an FFN, the dimensions that the values of one
KV head share with the output projection, and the residual stream. Only layers whose *columns* are permuted gain; each
belongs to one space, so the spaces are searched one by one. The objective is what the pattern's projection would keep
of the scores, as in Pool & Yu (2021, "Channel Permutations for N:M Sparsity"); the dealt-out start is that of RIA
(Zhang et al. 2024, §4.2). Deviation: our scores are the squared weights in the curvature's equilibrated coordinates,
which compare across layers, and swaps are tried for all groups at once, paired as in a round-robin tournament.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kfac_prune import ranks
from kfac_prune.curvature.factors import Factors, Method
from kfac_prune.data import Windows
from kfac_prune.models import Layer
from kfac_prune.objective import CAUSAL, Objective
from kfac_prune.obs import NM, saliency
from kfac_prune.operators import Damping
from kfac_prune.structure.spaces import KINDS, Space, find_spaces

logger = logging.getLogger("kfac_prune")

#: Rows of scores that the search of one space looks at; more are thinned evenly.
ROWS = 8192
#: Scalar comparisons that the search of one space may make; enough for a local optimum up to widths of several hundred.
#: Of an FFN of 1536 units it finds 96 % of what 5e9 would gain.
WORK = 2e9


@dataclass(frozen=True)
class Permuted:
    """One space that was permuted.

    Attributes:
        kind: of the space.
        name: of the module.
        permutation: [width]; channel i is now what permutation[i] was.
        before: share of the readers' scores that the pattern's projection kept, on at most ``ROWS`` rows.
        after: the same now; never less.
        score: total of these scores.
    """

    kind: str
    name: str
    permutation: Tensor
    before: float
    after: float
    score: float


def find_permutation(scores: Sequence[Tensor], pattern: NM, *, seed: int = 0, work: float = WORK) -> Tensor:
    """Order the columns so that the pattern keeps much: the better of two starts, then swaps that gain.

    Of the swaps between two groups the best is made. All groups are paired with all others in turn, until a whole
    tournament brings no gain (then no single swap would) or the work is spent. A last group of fewer than m columns
    stays.

    Args:
        scores: each [out, in], at least 0, with the same columns.
        pattern: n:m.
        seed: of the order of the pairings.
        work: comparisons of two scores to make at most, about.

    Returns:
        [in] int64: the new column i is the old column result[i]. ``kept_score`` of the result is never less.
    """
    table = torch.cat(list(scores)).T.contiguous()  # [in, rows]
    n, m, width, rows = pattern.n, pattern.m, *table.shape
    groups = width // m
    unchanged = torch.arange(width, device=table.device)
    if groups < 2:
        return unchanged.cpu()
    dealt = table[: groups * m].sum(1).argsort(descending=True, stable=True).view(m, groups).T.reshape(-1)
    dealt = torch.cat([dealt, unchanged[groups * m :]])
    start = max(unchanged, dealt, key=lambda order: kept_score(table[order].T, pattern))
    place = start[: groups * m].view(groups, m).clone()
    x = table[place]  # [groups, m, rows]
    threshold, held = _entry(x, n)
    teams = torch.randperm(groups, generator=torch.Generator().manual_seed(seed)).to(table.device)
    teams = teams if groups % 2 == 0 else torch.cat([teams.new_tensor([-1]), teams])  # who meets -1 rests
    half, idle = len(teams) // 2, 0
    for _ in range(max(int(work / (width * m * rows)), 1)):
        left, right = teams[:half], teams[half:].flip(0)
        left, right = (side[left >= 0] for side in (left, right))
        gain = _gain(threshold[left], held[left], x[right]) + _gain(threshold[right], held[right], x[left]).mT
        best, at = gain.flatten(1).max(1)  # [pairs], over m · m swaps
        worth = best > 100 * torch.finfo(x.dtype).eps * (held[left] + held[right]).amax(1)  # not rounding
        if worth.any():
            (g, h), (i, j) = (left[worth], right[worth]), (at[worth] // m, at[worth] % m)
            x[g, i], x[h, j] = x[h, j], x[g, i]
            place[g, i], place[h, j] = place[h, j], place[g, i]
            changed = torch.cat([g, h])
            threshold[changed], held[changed] = _entry(x[changed], n)
        idle = 0 if worth.any() else idle + 1
        if idle == len(teams) - 1:
            break
        teams = torch.cat([teams[:1], teams[-1:], teams[1:-1]])
    found = torch.cat([place.view(-1), unchanged[groups * m :]])
    return max(unchanged, found, key=lambda order: kept_score(table[order].T, pattern)).cpu()


def kept_score(scores: Tensor, pattern: NM) -> float:
    """Sum of the scores [out, in] that the pattern's projection keeps."""
    return float((scores * pattern.project(scores)).sum(dtype=torch.float64))


def _entry(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """What a newcomer in the place of each channel must exceed to be kept, and what leaves with that channel.

    A group without channel i keeps, of a newcomer y, ``max(y, t)`` beside n − 1 others, t being the n-th largest of
    the m − 1 that stay. With i itself as the newcomer, this is ``max(x_i, n-th largest of all m)``.

    Args:
        x: scores [groups, m, rows].
        n: kept per group.

    Returns:
        t [groups, m, rows]; and Σ_rows max(x_i, t_i) [groups, m].
    """
    rest, top = list(x.unbind(1)), []
    for _ in range(n + 1):  # bubble sort of whole rows: many times faster than a sort across them
        largest, below = rest[0], []
        for other in rest[1:]:
            below.append(torch.minimum(largest, other))
            largest = torch.maximum(largest, other)
        top.append(largest)
        rest = below
    last, next_one = top[n - 1].unsqueeze(1), top[n].unsqueeze(1)
    return torch.where(x >= last, next_one, last), torch.maximum(x, last).sum(-1)


def _gain(threshold: Tensor, held: Tensor, newcomers: Tensor) -> Tensor:
    """What groups gain if channel i is replaced by newcomer j: [pairs, m (i), m (j)].

    ``Σ max(t, y) = ½ (Σ t + Σ y + ‖t − y‖₁)``.
    """
    distance = torch.cdist(threshold, newcomers, p=1.0)
    return 0.5 * (threshold.sum(-1).unsqueeze(2) + newcomers.sum(-1).unsqueeze(1) + distance) - held.unsqueeze(2)


def permute_model(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    factors: Factors,
    pattern: NM,
    windows: Windows,
    *,
    objective: Objective = CAUSAL,
    method: Method = "kfac",
    damping: Damping | None = None,
    kinds: Sequence[str] = KINDS,
    seed: int = 0,
    known: Sequence[Permuted] | None = None,
) -> list[Permuted]:
    """Permute the model in place so that the pattern keeps more of the given layers, and their factors with it.

    The outputs on a window are compared before and after each kind; where they differ by more than rounding, the kind
    is undone with a warning.

    Args:
        model: dense; the function that it computes stays the same.
        layers: that will be pruned; spaces that none of them reads stay.
        factors: of these layers; ``factors.layers`` afterwards holds those of the permuted model.
        pattern: n:m.
        windows: tokens to compare on.
        objective: what the model computes.
        method: curvature that scores the weights.
        damping: of the factors; None is ``Damping()``.
        kinds: of spaces.
        seed: of the search.
        known: what an earlier call with the same model and pattern gave, which is done again; None searches.

    Returns:
        The spaces that were permuted.
    """
    if known is not None:
        spaces = {(kind, space.name): space for kind in kinds for space in find_spaces(model, kind, pattern.m)}
        for one in known:
            _apply(spaces[one.kind, one.name], one.permutation, factors)
        return list(known)
    names = {layer.name for layer in layers}
    expected = _output(model, windows, objective)
    rounding = max(torch.finfo(d).eps for d in (expected.dtype, torch.float32)) ** 0.5  # norms compute in float32
    done: list[Permuted] = []
    for kind in kinds:
        # several spaces of a kind may be columns of one layer; to permute some leaves the scores of all others
        scores = lru_cache(1)(partial(_scores, factors=factors, method=method, damping=damping or Damping()))
        made: list[tuple[Space, Permuted]] = []
        for space in find_spaces(model, kind, pattern.m):
            readers = [(layer, starts) for layer, starts in space.readers() if layer.name in names]
            if not readers:
                continue
            table = _table(readers, space.width, scores)
            total = float(table.sum(dtype=torch.float64))
            if total == 0:
                continue  # nothing to keep
            permutation = ranks.sent(find_permutation([table], pattern, seed=seed))
            before, after = (kept_score(t, pattern) / total for t in (table, table[:, permutation.to(table.device)]))
            _apply(space, permutation, factors)
            made.append((space, Permuted(kind, space.name, permutation, before, after, total)))
        off = float((_output(model, windows, objective) - expected).norm() / (expected - expected.mean()).norm())
        if not off <= rounding:
            for space, one in reversed(made):
                _apply(space, one.permutation.argsort(), factors)
            logger.warning("permute: %s is left as it was: its output would change by %.2g of their size", kind, off)
            continue
        done += [one for _, one in made]
    return done


def _table(readers: Sequence[tuple[Layer, tuple[int, ...]]], width: int, scores: Callable[[Layer], Tensor]) -> Tensor:
    """The scores of a space's columns in all that reads it: [at most about ROWS, width]."""
    step = -(-sum(layer.shape[0] * len(starts) for layer, starts in readers) // ROWS)
    return torch.cat(
        [scores(layer)[::step, start : start + width].clone() for layer, starts in readers for start in starts]
    )


def _scores(layer: Layer, factors: Factors, method: Method, damping: Damping) -> Tensor:
    """Squared weights [out, in] in equilibrated coordinates; saliencies, where H is separable."""
    operator, _ = factors.layers[layer.name].operator(method, damping, where=layer.name)
    weight = layer.weight.to(factors.layers[layer.name].a.device, torch.float32)
    return saliency(weight, operator) if operator.separable else (weight * operator.equilibrated()[1]).square()


def _apply(space: Space, permutation: Tensor, factors: Factors) -> None:
    """Permute every axis of a space, and the factors of its layers and of the stream."""
    shared: tuple[Tensor, Tensor, Tensor] | None = None  # the last A, its order, A in it: other layers may read it
    if space.kind == "stream":
        for name, g in factors.streams.items():
            index = permutation.to(g.device)
            factors.streams[name] = g[index][:, index]
    for axis in space.axes:
        target = axis.target
        index = axis.index(permutation)
        if isinstance(target, nn.Parameter):
            target.data = target.data.index_select(axis.dim, index.to(target.device))
            continue
        on_device = index.to(target.weight.device)
        bias = target.bias[on_device] if target.bias is not None and axis.dim == 0 else None
        target.assign(target.weight.index_select(axis.dim, on_device), bias)
        if target.name in factors.layers:
            old = factors.layers[target.name]
            index = index.to(old.a.device)
            if axis.dim == 0:
                factors.layers[target.name] = replace(old, g=old.g[index][:, index])
                continue
            if shared is None or shared[0] is not old.a or not torch.equal(shared[1], index):
                shared = old.a, index, old.a[index][:, index]
            factors.layers[target.name] = replace(old, a=shared[2], mean=old.mean[index])


@torch.no_grad()
def _output(model: PreTrainedModel, windows: Windows, objective: Objective) -> Tensor:
    """Of the first window."""
    return objective.output(model, *next(windows.batches(1)).on(model.device))
