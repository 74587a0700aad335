"""How fast a machine does each kind of operation: measured on the spot, or from a table of public figures."""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from kfac_prune.costs.work import (
    Call,
    Exponential,
    Factorisation,
    Move,
    Operation,
    Precision,
    Product,
    Rank,
    Transfer,
    Work,
)
from kfac_prune.errors import InputError, shown
from kfac_prune.linalg import approximate_products, kth_largest, product

#: (size, operations per second) at a few sizes, in their order.
Rates = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Machine:
    """What operations cost.

    Attributes:
        name: for people.
        gpu: the device is a GPU, with memory of its own.
        memory: bytes of the device.
        host: bytes of main memory; the same where the device is a CPU; None = not known.
        products: per precision, FLOP/s by the smallest dimension.
        factorisations: per precision, FLOP/s by the width.
        bandwidth: bytes per second by the bytes of one operation.
        call: seconds that an operation takes at least.
        exponential: seconds per number.
        rank: seconds per number for the k-th largest.
        channels: bytes per second of each.
        base: bytes of main memory that the process has before a model is loaded.
        busy: share of the processor that others used when it was measured.
    """

    name: str
    gpu: bool
    memory: float
    host: float | None
    products: Mapping[Precision, Rates]
    factorisations: Mapping[Precision, Rates]
    bandwidth: Rates
    call: float
    exponential: float
    rank: float
    channels: Mapping[str, float]
    base: float
    busy: float = 0.0

    def seconds(self, work: Work) -> float:
        """That a piece of work takes."""
        return float(sum(times * self._one(operation) for operation, times in work.counts.items()))

    def _one(self, operation: Operation) -> float:
        """Seconds of one operation; of one byte through a channel."""
        if isinstance(operation, Product):
            smallest = min(operation.rows, operation.inner, operation.columns)
            return operation.flops / rate(self.products[operation.precision], smallest)
        if isinstance(operation, Factorisation):
            return operation.flops / rate(self.factorisations[operation.precision], operation.width)
        if isinstance(operation, Move):
            return operation.size / rate(self.bandwidth, operation.size)
        if isinstance(operation, Exponential):
            return operation.numbers * self.exponential
        if isinstance(operation, Rank):
            return operation.numbers * self.rank
        if isinstance(operation, Transfer):
            return 1 / self.channels[operation.channel]
        assert isinstance(operation, Call)
        return self.call


def rate(rates: Rates, size: float) -> float:
    """Interpolated in the logarithms; the last one beyond the largest size, and proportional below the smallest."""
    sizes = [at for at, _ in rates]
    if size <= sizes[0]:
        return float(rates[0][1] * min(size / sizes[0], 1.0) ** 0.5)
    if size >= sizes[-1]:
        return rates[-1][1]
    i = bisect.bisect_right(sizes, size)
    (x0, y0), (x1, y1) = rates[i - 1], rates[i]
    part = math.log(size / x0) / math.log(x1 / x0)
    return math.exp((1 - part) * math.log(y0) + part * math.log(y1))


@dataclass(frozen=True)
class Card:
    """Public figures of a GPU: memory in GB, bandwidth in TB/s, dense TFLOP/s per precision.

    ``float64`` is what factorisations reach units of; TF32 is what approximate products are there.
    """

    memory: float
    bandwidth: float
    float32: float
    tf32: float
    bfloat16: float
    float64: float


CARDS = {
    "h100": Card(80, 3.35, 67, 494, 989, 34),
    "h100-pcie": Card(80, 2.0, 51, 378, 756, 26),
    "h200": Card(141, 4.8, 67, 494, 989, 34),
    "b200": Card(180, 8.0, 80, 1100, 2250, 40),
    "a100-40gb": Card(40, 1.56, 19.5, 156, 312, 9.7),
    "a100-80gb": Card(80, 2.04, 19.5, 156, 312, 9.7),
    "l40s": Card(48, 0.864, 91.6, 183, 362, 1.43),
    "a6000": Card(48, 0.768, 38.7, 77.4, 155, 0.6),
    "rtx-3090": Card(24, 0.936, 35.6, 35.6, 71, 0.56),
    "rtx-4090": Card(24, 1.01, 82.6, 82.6, 165, 1.29),
}
#: Share of the public figure that is reached, by the smallest dimension of a product and the width of a factorisation;
#: of the bandwidth. Assumed, not measured: no GPU was at hand.
PRODUCT_SHARE = ((128, 0.1), (512, 0.3), (2048, 0.6))
FACTOR_SHARE = ((256, 0.01), (1024, 0.08), (4096, 0.25))
BANDWIDTH_SHARE = 0.75
#: Of the computer around a named GPU: seconds per operation, bytes per second of each channel, bytes of main memory
#: that Python and torch take. Assumed, too.
GPU_CALL = 1e-5
GPU_CHANNELS = {"link": 2e10, "disk": 1.5e9, "hash": 1e9, "text": 1.5e6}
GPU_BASE = 2e9


def named(name: str) -> Machine:
    """A GPU of the table.

    Raises:
        InputError: it is not in it.
    """
    card = CARDS.get(name.lower())
    if card is None:
        raise InputError(f"for is {shown(name)}; choose one of {', '.join(CARDS)}, or leave it out for this device")

    def rates(share: Rates, tera: float) -> Rates:
        return [(size, part * tera * 1e12) for size, part in share]

    speed = card.bandwidth * 1e12 * BANDWIDTH_SHARE
    return Machine(
        name=name.lower(),
        gpu=True,
        memory=card.memory * 1e9,
        host=None,
        products={
            "float32": rates(PRODUCT_SHARE, card.float32),
            "approximate": rates(PRODUCT_SHARE, card.tf32),
            "bfloat16": rates(PRODUCT_SHARE, card.bfloat16),
            "float64": rates(PRODUCT_SHARE, card.float64),
        },
        factorisations={
            "float32": rates(FACTOR_SHARE, card.float32),
            "float64": rates(FACTOR_SHARE, card.float64),
        },
        bandwidth=[(1, speed)],
        call=GPU_CALL,
        exponential=2e-13,
        rank=16 / speed,  # four passes of the histogram
        channels=GPU_CHANNELS,
        base=GPU_BASE,
    )


#: Sizes at which this device is measured: widths of products and factorisations, bytes moved.
WIDTHS = {"cpu": (64, 256, 768), "cuda": (128, 512, 2048, 4096)}
FACTOR_WIDTHS = {"cpu": (64, 256, 768), "cuda": (256, 1024, 4096)}
MOVED = {"cpu": (2**16, 2**20, 2**24, 2**27), "cuda": (2**22, 2**30)}
#: Rows of a product that is measured.
ROWS = 1024
#: Of a CPU: bytes per second to and from disk and through SHA-256, and of text through a tokenizer.
CPU_CHANNELS = {"link": 1e10, "disk": 1e9, "hash": 1e9, "text": 9e5}
#: How much longer an operation takes on a CPU among others than alone in a loop, its operands in the caches.
AMONG_OTHERS = 1.2
#: A model's operation by its modules and autograd, in operations of torch on a tensor of eight numbers.
CALL_FACTOR = 3.0
#: Seconds that measuring one figure may take, and rounds, of which the fastest counts.
BUDGET, ROUNDS = 0.06, 4


def measured(device: str, dtype: torch.dtype) -> Machine:
    """This machine, measured in a second or two.

    Args:
        device: of torch, one that exists.
        dtype: of the model.

    Raises:
        InputError: a device of another kind than CPU or CUDA.
    """
    kind = torch.device(device).type
    if kind not in WIDTHS:
        raise InputError(f"the speed of {device} cannot be measured, only that of a CPU or of a CUDA GPU; name a GPU "
                         "with --for, or use --device cpu")  # fmt: skip
    base, busy = float(psutil.Process().memory_info().rss), psutil.cpu_percent(interval=0.2) / 100
    products: dict[Precision, Rates] = {}
    products["float32"] = [(w, _product(device, torch.float32, w)) for w in WIDTHS[kind]]
    with approximate_products():
        products["approximate"] = [(w, _product(device, torch.float32, w)) for w in WIDTHS[kind]]
    half = dtype if dtype in (torch.bfloat16, torch.float16) else None
    products["bfloat16"] = [(w, _product(device, half, w)) for w in WIDTHS[kind]] if half else products["approximate"]
    products["float64"] = [(w, speed / 2) for w, speed in products["float32"]]
    factorisations: dict[Precision, Rates] = {
        "float32": [(w, _factorisation(device, torch.float32, w)) for w in FACTOR_WIDTHS[kind]],
        "float64": [(w, _factorisation(device, torch.float64, w)) for w in FACTOR_WIDTHS[kind]],
    }
    eight, many = torch.ones(8, device=device), torch.rand(2**18, device=device)
    least = _seconds(device, lambda: eight.add(eight))
    host, threads = float(psutil.virtual_memory().total), torch.get_num_threads()
    memory = host if kind == "cpu" else float(torch.cuda.get_device_properties(device).total_memory)
    return Machine(
        name=f"this CPU ({threads} thread{'s' * (threads > 1)})"
        if kind == "cpu"
        else torch.cuda.get_device_name(device),
        gpu=kind != "cpu",
        memory=memory,
        host=host,
        products=products,
        factorisations=factorisations,
        bandwidth=[(size, _bandwidth(device, size, least)) for size in MOVED[kind]],
        call=least * CALL_FACTOR if kind == "cpu" else GPU_CALL,
        exponential=_seconds(device, lambda: torch.nn.functional.silu(many)) / len(many),
        rank=_seconds(device, lambda: kth_largest(many, 2**17)) / len(many),
        channels=CPU_CHANNELS if kind == "cpu" else GPU_CHANNELS,
        base=base,
        busy=busy,
    )


def _seconds(device: str, run: Callable[[], object]) -> float:
    """Of one run, the least mean of some rounds; on a CPU of this thread. The rest of the machine may be busy."""
    on_gpu = torch.device(device).type == "cuda"
    clock, factor = (time.perf_counter, 1.0) if on_gpu else (time.thread_time, AMONG_OTHERS)
    run()
    least = math.inf
    for _ in range(ROUNDS):
        if on_gpu:
            torch.cuda.synchronize(device)
        runs, begin = 0, clock()
        while runs < 1 or (clock() - begin < BUDGET / ROUNDS and runs < 1000):
            run()
            runs += 1
            if on_gpu:
                torch.cuda.synchronize(device)
        least = min(least, (clock() - begin) / runs)
    return factor * least


def _product(device: str, dtype: torch.dtype, width: int) -> float:
    """FLOP/s of [ROWS, width] · [width, width]."""
    a, b = (torch.ones(rows, width, dtype=dtype, device=device) for rows in (ROWS, width))
    return 2 * ROWS * width**2 / _seconds(device, lambda: product(a, b))


def _factorisation(device: str, dtype: torch.dtype, width: int) -> float:
    """FLOP/s of a Cholesky factorisation and the inverse from it."""
    matrix = torch.eye(width, dtype=dtype, device=device) * 2 + 1 / width

    def run() -> Tensor:
        return torch.cholesky_inverse(torch.linalg.cholesky(matrix))

    return width**3 / _seconds(device, run)


def _bandwidth(device: str, size: int, least: float) -> float:
    """Bytes per second of an addition that reads and writes so many bytes, without the seconds of the call."""
    a, b, out = torch.ones(3, size // 12, device=device)
    seconds = _seconds(device, lambda: torch.add(a, b, out=out))
    return size / max(seconds - least, seconds / 4)
