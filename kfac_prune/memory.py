"""The peak memory of this process, so far or within a block; tensors that wait in files or off the device."""

from __future__ import annotations

import resource
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


def peak_memory_bytes() -> int:
    """The largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_cuda_peaks() -> None:
    """Count the peaks of all GPUs anew."""
    for device in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
        torch.cuda.reset_peak_memory_stats(device)


def cuda_peak() -> int | None:
    """Bytes that torch had allocated at the peak, on the GPU where that was most; None without CUDA."""
    return max(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())), default=None)


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
    reset_cuda_peaks()
    yield peak
    peak.resident = peak_memory_bytes()
    if began:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
        peak.resident = int(status["VmHWM"].split()[0]) * 1024
    peak.cuda = cuda_peak()


def mapped(tensor: Tensor) -> Tensor:
    """A copy in main memory that is a mapped file (in the folder for temporary files) and vanishes with the tensor."""
    with tempfile.NamedTemporaryFile(prefix="kfac-prune-") as file:
        copy = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    return copy.view(tensor.shape).copy_(tensor)


def arriving(batches: Iterable[tuple[Tensor, ...]], device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """Every batch of tensors on a device; the next one is read and sent while the one before is worked on."""
    sender = _Sender(device)
    with ThreadPoolExecutor(1) as pool:
        coming: Future[_Sent] | None = None
        for batch in batches:
            now, coming = coming, pool.submit(sender.send, batch)
            if now is not None:
                yield sender.received(now.result())
        if coming is not None:
            yield sender.received(coming.result())


@dataclass(frozen=True)
class _Sent:
    """Tensors on a device, and on a GPU what ends when their copies have."""

    tensors: tuple[Tensor, ...]
    copied: torch.cuda.Event | None = None


class _Sender:
    """Sends tensors to a device by a thread of its own; on a GPU by a stream of its own, from pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, tensors: tuple[Tensor, ...]) -> _Sent:
        """In the thread."""
        if self._stream is None:
            for tensor in tensors:
                tensor.flatten()[:: 4096 // tensor.element_size()].sum()  # of a mapped file, this reads every page
            return _Sent(tuple(tensor.to(self._device) for tensor in tensors))
        with torch.cuda.stream(self._stream):
            pinned = (tensor if tensor.is_cuda else tensor.pin_memory() for tensor in tensors)
            sent = tuple(tensor.to(self._device, non_blocking=True) for tensor in pinned)
            return _Sent(sent, self._stream.record_event())

    def received(self, sent: _Sent) -> tuple[Tensor, ...]:
        """Where the tensors are used."""
        if sent.copied is not None:
            here = torch.cuda.current_stream(self._device)
            here.wait_event(sent.copied)
            for tensor in sent.tensors:
                tensor.record_stream(here)
        return sent.tensors
