"""The peak memory of this process, so far or within a block; tensors in files instead of memory."""

from __future__ import annotations

import resource
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


def peak_memory_bytes() -> int:
    """The largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass
class Peak:
    """What a block of code took.

    Attributes:
        resident: bytes of main memory at the peak; where the system cannot begin anew (not Linux), of the process so
            far.
        cuda: bytes that torch had allocated at the peak; None without CUDA.
    """

    resident: int = 0
    cuda: int | None = None


@contextmanager
def peak_within() -> Iterator[Peak]:
    """Within the block peaks are counted anew; the result is filled in at its end."""
    peak, began = Peak(), False
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        began = True
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    yield peak
    peak.resident = peak_memory_bytes()
    if began:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
        peak.resident = int(status["VmHWM"].split()[0]) * 1024
    if torch.cuda.is_available():
        peak.cuda = torch.cuda.max_memory_allocated()


def mapped(tensor: Tensor) -> Tensor:
    """A copy in main memory that is a mapped file (in the folder for temporary files) and vanishes with the tensor."""
    with tempfile.NamedTemporaryFile(prefix="kfac-prune-") as file:
        copy = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    return copy.view(tensor.shape).copy_(tensor)
