"""Residual refit: every layer that writes into the residual stream repairs, in closed form, what went wrong before it.

After pruning, a block's input already differs from the dense model's. With t = (dense stream after the writer) −
(pruned stream before it) and h the input that the writer really receives in the pruned model, the writer's weights are
chosen anew to minimise ``½ E‖t − X h‖²_G`` over the weights that may stay, G being the Fisher metric at its output
(DESIGN §7). That is the Optimal Brain Surgeon's problem again, with W replaced by the least-squares solution
``E[t hᵀ] E[h hᵀ]⁻¹`` and A by ``E[h hᵀ]``: the same selection and compensation solve it. Forward passes only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kfac_prune import ranks
from kfac_prune.curvature.capture import add_gram
from kfac_prune.curvature.factors import Factors
from kfac_prune.data import Windows
from kfac_prune.experts import ExpertLinear
from kfac_prune.linalg import exact_products, inverse_from_cholesky, shifted
from kfac_prune.models import Layer
from kfac_prune.obs import Pattern, Unstructured, compensate, select
from kfac_prune.operators import Damping, Kronecker
from kfac_prune.plan import Plan
from kfac_prune.problems import PlannedLayer, agreed
from kfac_prune.progress import progress
from kfac_prune.stream import BlockStack, Writer, find_writers, observed

logger = logging.getLogger("kfac_prune")

#: E[h hᵀ] + RIDGE · mean diagonal · I, which also draws the solution towards the present weights.
RIDGE = 0.1


@dataclass(frozen=True)
class Refitted:
    """What the refit did to one layer.

    Attributes:
        name: of the layer.
        before: ½ E‖t − X h‖²_G with the weights as pruned, nats per token.
        after: the same with the weights as refitted.
    """

    name: str
    before: float
    after: float


@dataclass
class Moments:
    """Sums over tokens of a writer's input h, its target t, and their products, in float32.

    Attributes:
        hh: Σ h hᵀ [in, in].
        th: Σ t hᵀ [out, in].
        tt: Σ t tᵀ [out, out].
        h: Σ h [in].
        t: Σ t [out].
        tokens: number of summands.
    """

    hh: Tensor
    th: Tensor
    tt: Tensor
    h: Tensor
    t: Tensor
    tokens: int = 0

    @classmethod
    def zeros(cls, shape: tuple[int, int], device: torch.device) -> Moments:
        """Of a layer [out, in]."""
        o, i = shape
        hh, th, tt, h, t = (torch.zeros(size, device=device) for size in ((i, i), (o, i), (o, o), (i,), (o,)))
        return cls(hh, th, tt, h, t)

    @exact_products()
    def add(self, h: Tensor, t: Tensor) -> None:
        """Add rows h [tokens, in] and t [tokens, out]."""
        add_gram(self.hh, h)
        add_gram(self.tt, t)
        h, t = h.float(), t.float()
        self.th.addmm_(t.T, h)
        self.h += h.sum(0)
        self.t += t.sum(0)
        self.tokens += h.shape[0]

    def add_up(self) -> Moments:
        """With what all processes have seen; each has the sums then."""
        self.tokens = ranks.counted(self.tokens, self.hh, self.th, self.tt, self.h, self.t)
        return self

    def means(self, *, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
        """E[h hᵀ], E[t hᵀ], E[t tᵀ], about the means where a bias takes those up."""
        if not centred:
            return self.hh / self.tokens, self.th / self.tokens, self.tt / self.tokens
        h, t = self.h.double() / self.tokens, self.t.double() / self.tokens
        # in float64: the difference is small where a mean is large
        hh = self.hh.double() / self.tokens - torch.outer(h, h)
        th = self.th.double() / self.tokens - torch.outer(t, h)
        tt = self.tt.double() / self.tokens - torch.outer(t, t)
        return hh.float(), th.float(), tt.float()


def refit(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    plan: Plan,
    factors: Factors,
    windows: Windows,
    dense: Callable[[], AbstractContextManager[None]],
    *,
    pattern: Pattern | None = None,
    damping: Damping | None = None,
    batch_size: int = 4,
    quiet: bool = True,
) -> tuple[Plan, list[Refitted]]:
    """Refit the writers of every block in order, in place; one pass through the model.

    Several processes share out the windows; all end with the same weights.

    Args:
        model: pruned by the plan.
        layers: its prunable layers.
        plan: that was applied.
        factors: whose G is the metric.
        windows: calibration tokens [N, T]; masked positions are left out.
        dense: a context in which the model has its dense weights (``WeightSwap.swapped_in``).
        pattern: an n:m pattern, or None to keep every layer's number of weights. The mask is chosen anew within it, but
            for layers that the plan leaves dense.
        damping: of G; None is ``Damping()``.
        batch_size: windows per pass.
        quiet: show no progress bar.

    Returns:
        The plan with the new weights and masks, and what happened to each writer.
    """
    damping = damping or Damping()
    with dense():
        stack = BlockStack(model, windows.every(ranks.count(), ranks.index()), batch_size)
    stack.check_calls("the refit sees the first alone; use --no-refit")
    planned = {layer.name: layer for layer in plan.layers}
    records: list[Refitted] = []
    for layer, moments in refit_moments(stack, stack.entered_anew(planned), set(planned), dense=dense, quiet=quiet):
        g, _ = damping(factors.layers[layer.name].g, name="G", where=layer.name)
        solved, record = _solve(planned[layer.name], layer, moments, g, pattern)
        planned[layer.name] = agreed(solved, layer)
        layer.assign(planned[layer.name].weight, planned[layer.name].bias)
        records.append(record)
    return replace(plan, layers=tuple(planned[layer.name] for layer in plan.layers)), records


def refit_moments(
    dense_stack: BlockStack,
    stack: BlockStack,
    wanted: Mapping[str, Tensor] | set[str],
    *,
    dense: Callable[[], AbstractContextManager[None]] = nullcontext,
    quiet: bool = True,
) -> Iterator[tuple[Layer, Moments]]:
    """Every wanted layer of the pruned model with the moments of its input and target, in the order of execution.

    The target of a writer is what brings the residual stream back to the dense model's; that of any other layer (only
    asked for where ``wanted`` is a mapping) is what the dense one puts out. The consumer assigns a layer's new weights
    before it asks for the next one, whose moments depend on them.

    Args:
        dense_stack: blocks of the dense model.
        stack: blocks of the pruned model; the same object where ``dense`` makes one model the other and what enters the
            blocks is the same.
        wanted: names of the writers to refit; or a mapping from the names of all layers to refit to the rows of the
            dense layer that the pruned one still has.
        dense: a context in which ``dense_stack`` is dense.
        quiet: show no progress bar.
    """
    dense_stream, pruned_stream = list(dense_stack.entries), list(stack.entries)
    for index, block in enumerate(progress(stack.names, desc="refit", unit="block", disable=quiet)):
        inside = dense_stack.inside(index)
        with dense():
            writers = find_writers(dense_stack, index, dense_stream[0], inside)
            order, goals, after = dense_pass(dense_stack, index, inside, writers, dense_stream)
        if inside and not writers:
            logger.warning(
                "refit: %s adds to the residual stream what no sum of its layers gives; left as it is", block
            )
        writers = [replace(writer, layer=stack.layers[writer.layer.name]) for writer in writers]
        positions = {writer.layer.name: position for position, writer in enumerate(writers)}
        for name in order:
            if name not in wanted:
                continue
            if name in positions:
                position = positions[name]
                moments = _moments(stack, index, writers[: position + 1], goals[position], pruned_stream)
                yield stack.layers[name], moments
            elif isinstance(wanted, Mapping) and writers:
                sides = (dense_stack, dense_stream), (stack, pruned_stream)
                yield stack.layers[name], _reader_moments(index, name, *sides, wanted[name])
        dense_stream = after
        with torch.no_grad():
            pruned_stream = [stack.keep(stack.run(index, batch, stream)) for batch, stream in enumerate(pruned_stream)]


def dense_pass(
    stack: BlockStack, index: int, layers: Sequence[Layer], writers: Sequence[Writer], streams: Sequence[Tensor]
) -> tuple[list[str], list[list[Tensor]], list[Tensor]]:
    """One pass through a dense block.

    Returns:
        Names of the layers in the order of execution, with all experts at the end; the stream after every writer,
        [writer][batch] of [B, T, d], and after the block, all on the shelf of the stack.
    """
    goals: list[list[Tensor]] = [[] for _ in writers]
    after = []
    with torch.no_grad(), observed(layers) as seen:
        for batch, stream in enumerate(streams):
            after.append(stack.keep(stack.run(index, batch, stream)))
            for goal, writer in zip(goals, writers, strict=True):
                written = seen[writer.layer.name][1].to(stream.device)
                stream = stream + writer.factor * written.reshape(stream.shape)
                goal.append(stack.keep(stream))
    experts = [layer.name for layer in layers if isinstance(layer.module, ExpertLinear)]  # run or not, by the batch
    return [name for name in seen if name not in experts] + experts, goals, after


def _moments(
    stack: BlockStack, index: int, writers: Sequence[Writer], goals: Sequence[Tensor], streams: Sequence[Tensor]
) -> Moments:
    """Moments over all batches of the last writer's input, and of its target: goal − pruned stream before it."""
    *earlier, writer = writers
    layer = writer.layer
    moments = Moments.zeros(layer.shape, stack.device)
    with torch.no_grad(), observed([w.layer for w in writers]) as seen:
        for batch, (goal, stream) in enumerate(zip(goals, streams, strict=True)):
            stack.run(index, batch, stream, until=layer)
            target = (goal - stream).flatten(0, 1).to(stack.device, torch.float32)  # [B T, d]
            for w in earlier:
                target -= w.factor * seen[w.layer.name][1].reshape(target.shape)
            moments.add(*_counted(stack.masks[batch], seen[layer.name][0], target / writer.factor))
    return moments.add_up()


def _reader_moments(
    index: int,
    name: str,
    dense: tuple[BlockStack, Sequence[Tensor]],
    pruned: tuple[BlockStack, Sequence[Tensor]],
    rows: Tensor,
) -> Moments:
    """Moments over all batches of a layer's input in the pruned model, and of the dense layer's output rows."""
    (dense_stack, dense_streams), (stack, streams) = dense, pruned
    dense_layer, layer = dense_stack.layers[name], stack.layers[name]
    moments = Moments.zeros(layer.shape, stack.device)
    with torch.no_grad(), observed([dense_layer]) as wanted, observed([layer]) as seen:
        for batch, (dense_stream, stream) in enumerate(zip(dense_streams, streams, strict=True)):
            dense_stack.run(index, batch, dense_stream, until=dense_layer)
            stack.run(index, batch, stream, until=layer)
            output = wanted[name][1][..., rows.to(stack.device)]
            moments.add(*_counted(stack.masks[batch], seen[name][0], output))
    return moments.add_up()


def _counted(mask: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    """Tensors [..., features] as rows [tokens, features], without masked positions."""
    flat = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
    return flat if mask is None else [rows[mask.reshape(-1)] for rows in flat]


def _solve(
    planned: PlannedLayer, layer: Layer, moments: Moments, g: Tensor, pattern: Pattern | None
) -> tuple[PlannedLayer, Refitted]:
    """The new weights, mask and bias of one writer under the metric G [out, out]."""
    hh, th, tt = moments.means(centred=layer.bias is not None)
    present = layer.weight.to(hh)
    ridge = RIDGE * hh.diagonal().mean()
    if not ridge > 0:  # nothing enters it
        loss = 0.5 * float((g * tt).sum())
        return planned, Refitted(layer.name, loss, loss)
    a = shifted(hh, ridge)
    wanted = (th + ridge * present) @ inverse_from_cholesky(a)
    curvature = Kronecker(a, g)
    if pattern is None or planned.mask.all():  # a layer that the plan leaves dense stays dense
        pattern = Unstructured(planned.sparsity)
    selection = select(wanted, curvature, pattern)
    weight = compensate(wanted, curvature, selection.mask, selection.start).weight.to(layer.weight.dtype)
    bias = layer.bias
    if bias is not None:
        bias = ((moments.t - weight.float() @ moments.h) / moments.tokens).to(bias)

    @exact_products()
    def error(x: Tensor) -> float:
        return 0.5 * float((g * (tt - 2 * x @ th.T + x @ hh @ x.T)).sum())

    record = Refitted(layer.name, error(present), error(weight.float()))
    home = layer.weight.device
    return replace(planned, weight=weight.to(home), bias=bias, mask=selection.mask.to(home)), record
