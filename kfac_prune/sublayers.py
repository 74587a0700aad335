"""The parts of a block that are reconstructed one after the other: all of it, or its sub-layers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from kfac_prune.models import Layer
from kfac_prune.refitting import dense_pass
from kfac_prune.stream import BlockStack, Writer, find_writers

logger = logging.getLogger("kfac_prune")

Unit = Literal["block", "sublayer"]


@dataclass(frozen=True)
class Part:
    """One block or sub-layer: what is trained, the dense stream after it per batch, and the metric there.

    ``writers`` are all of the block up to the end of the sub-layer, or None where it ends with the block.
    """

    name: str
    trained: list[Layer]
    goals: Sequence[Tensor]
    metric: Tensor
    writers: list[Writer] | None


def sublayers(
    dense_stack: BlockStack,
    stack: BlockStack,
    index: int,
    streams: Sequence[Tensor],
    metric: Mapping[str, Tensor],
    unit: Unit,
) -> tuple[list[Part], list[Tensor]]:
    """A block, or its sub-layers: each ends with a writer and holds the layers that run since the one before.

    Also returns the dense stream after the block.
    """
    block, inside = stack.names[index], dense_stack.inside(index)
    writers = find_writers(dense_stack, index, streams[0], inside) if unit == "sublayer" else []
    if unit == "sublayer" and inside and not writers:
        logger.warning("reconstruct: no sum of the layers of %s gives what it adds; it is trained as one", block)
    ends = [i for i, writer in enumerate(writers[:-1]) if writer.layer.name in metric]
    order, goals, after = dense_pass(dense_stack, index, inside, writers[: ends[-1] + 1] if ends else [], streams)
    parts, start = [], 0
    for end in ends:
        name = writers[end].layer.name
        stop = order.index(name) + 1
        before = [replace(w, layer=stack.layers[w.layer.name]) for w in writers[: end + 1]]
        parts.append(Part(name, [stack.layers[n] for n in order[start:stop]], goals[end], metric[name], before))
        start = stop
    last = Part(block, [stack.layers[n] for n in order[start:]], after, metric[block], None)
    return [*parts, last], after
