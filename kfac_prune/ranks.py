"""The processes of a run: what each of them does, and how all come to the same result.

Every process has the whole model and all of the text. Sums over windows are shared out by windows, layers are solved by
one process each and sent to the others, and everything else all of them do alike. With one process, or none set up by
``torch.distributed``, nothing here happens.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from datetime import timedelta
from heapq import heapify, heapreplace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from kfac_prune.errors import InputError

T = TypeVar("T")

#: How long a process waits for the others: as long as they may take for the largest layers. The launcher ends those
#: that wait for one that has died.
PATIENCE = timedelta(hours=2)
#: How several processes are started.
STARTED_BY = (
    "`torchrun --nproc-per-node N -m kfac_prune prune ...`, or `accelerate launch --multi_gpu --num_processes N -m "
    "kfac_prune prune ...`; `accelerate launch --cpu` starts a single one, whatever it is asked for"
)


def join(device: str, expected: int | None = None) -> None:
    """Find the other processes of this run, where a launcher has started several.

    Args:
        device: that the run is to use; "cpu", or "auto" where there is no GPU, lets the processes talk by gloo.
        expected: how many the user wants; None takes what there is.

    Raises:
        InputError: they are not as many.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and not _several():
        from accelerate import PartialState

        on_cpu = device == "cpu" or not torch.cuda.is_available()
        PartialState(cpu=on_cpu, timeout=PATIENCE)  # without ``cpu`` every process would take itself for the only one
        atexit.register(_leave)
    found = count()
    if found != launched:
        raise InputError(f"{launched} processes were launched, and this one sees {found}; start them by {STARTED_BY}")
    if expected is not None and found != expected:
        raise InputError(
            f"--processes is {expected}, and the number of processes is {found}; start them by {STARTED_BY}"
        )


def _leave() -> None:
    """Close gloo's connections to the others before the interpreter ends the threads that serve them."""
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def count() -> int:
    """Processes of this run."""
    return dist.get_world_size() if _several() else 1


def neighbours() -> int:
    """Processes of this run on this machine, which share its main memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", count())) if _several() else 1


def index() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if _several() else 0


def leads() -> bool:
    """Whether this is the process that writes and speaks."""
    return index() == 0


def device_of_process(name: str) -> str:
    """The GPU of this process, where all were given "cuda"; any other device as it is.

    Raises:
        InputError: several processes were given one GPU.
    """
    if not _several() or not name.startswith("cuda"):
        return name
    if name != "cuda":
        raise InputError(
            f"device is {name}, and there are {count()} processes, which need a GPU each; use cuda or auto"
        )
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def share(items: Sequence[T]) -> list[T]:
    """This process's part: every n-th item."""
    return list(items[index() :: count()])


def owners(costs: Sequence[float]) -> list[int]:
    """Which process does which item, so that all take about as long: the dearest first, to whoever has least to do."""
    busy = [(0.0, process) for process in range(count())]
    heapify(busy)
    owner = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
        time, process = busy[0]
        owner[item] = process
        heapreplace(busy, (time + costs[item], process))
    return owner


def summed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The sum of each tensor over all processes, in place; all must bring the same shapes in the same order."""
    if _several():
        for tensor in tensors:
            dist.all_reduce(tensor)
    return tensors


def counted(number: int, *tensors: Tensor) -> int:
    """Tensors become their sums over all processes, as by ``summed``; returns the sum of what they count."""
    if not _several():
        return number
    (total, *_) = summed(torch.tensor(number, device=tensors[0].device), *tensors)
    return int(total)


def sent(tensor: Tensor, source: int = 0) -> Tensor:
    """What one process has, in all of them; the others bring a tensor like it."""
    if not _several():
        return tensor
    device = torch.device("cpu" if dist.get_backend() == "gloo" else "cuda")
    travels = tensor.to(device).contiguous()
    dist.broadcast(travels, source)
    return travels.to(tensor.device)


def told(value: T, source: int = 0) -> T:
    """What one process says, to all others; small things, without tensors."""
    if not _several():
        return value
    box = [value]
    dist.broadcast_object_list(box, source)
    return box[0]


def wait() -> None:
    """Until all processes have come here."""
    if _several():
        dist.barrier()


def gathered(value: T) -> list[T]:
    """What every process says, in their order; tensors must be in main memory."""
    if not _several():
        return [value]
    values: list[T] = [value] * count()
    dist.all_gather_object(values, value)
    return values


def largest(number: int, device: torch.device) -> int:
    """The largest of the numbers that the processes bring, exchanged between devices."""
    if not _several():
        return number
    tensor = torch.tensor(number, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)
