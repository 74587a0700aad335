"""Sums over the processes of a run; with one process, or none set up by ``torch.distributed``, nothing happens."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def summed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The sum of each tensor over all processes, in place; all must bring the same shapes in the same order."""
    if _several():
        for tensor in tensors:
            dist.all_reduce(tensor)
    return tensors


def largest(number: int, device: torch.device) -> int:
    """The largest of the numbers that the processes bring, exchanged between devices."""
    if not _several():
        return number
    tensor = torch.tensor(number, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)
