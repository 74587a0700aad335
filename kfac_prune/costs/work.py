"""Work: operations counted, of any code that runs on the meta device, where tensors have shapes and no numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: How a product is multiplied: exactly in float32, by the device's matrix units from float32
#: (``approximate_products``), in bfloat16 or float16, in float64.
Precision = Literal["float32", "approximate", "bfloat16", "float64"]


class Product(NamedTuple):
    """A matrix product [rows, inner] · [inner, columns]."""

    precision: Precision
    rows: int
    inner: int
    columns: int

    @property
    def flops(self) -> float:
        """A multiplication and an addition each."""
        return 2.0 * self.rows * self.inner * self.columns


class Factorisation(NamedTuple):
    """A Cholesky factorisation [width, width], with the inverse from it or alone."""

    precision: Precision
    width: int
    inverse: bool

    @property
    def flops(self) -> float:
        """n³/3, and two thirds of n³ more for the inverse (Golub & Van Loan, §4.2)."""
        return (1.0 if self.inverse else 1 / 3) * self.width**3


class Move(NamedTuple):
    """One operation that is limited by memory, which it reads and writes so many bytes of."""

    size: int


class Exponential(NamedTuple):
    """Exponentials and their like (sigmoid, tanh, error function), of so many numbers."""

    numbers: int


class Call(NamedTuple):
    """One operation's fixed cost: Python, dispatch, and on a GPU the launch."""


class Rank(NamedTuple):
    """A k-th largest of so many numbers."""

    numbers: int


class Transfer(NamedTuple):
    """Bytes through a channel: between main memory and the device, to or from disk, through a hash, a tokenizer."""

    channel: Literal["link", "disk", "hash", "text"]


Operation = Product | Factorisation | Move | Exponential | Call | Rank | Transfer


class Work:
    """How often each operation is done (for ``Transfer``, the bytes)."""

    def __init__(self, counts: dict[Operation, float] | None = None) -> None:
        self.counts: Counter[Operation] = Counter()
        for operation, times in (counts or {}).items():
            self.add(operation, times)

    def add(self, operation: Operation, times: float = 1) -> None:
        """Count an operation so many times more."""
        self.counts[operation] += times  # type: ignore[assignment]  # fractions are meant

    def move(self, size: float, times: float = 1) -> None:
        """Count a memory-limited operation of so many bytes; sizes are rounded to a power of two, their sum is not."""
        if size > 0:
            whole = 2 ** round(math.log2(size))
            self.add(Move(whole), times * size / whole)

    def __add__(self, other: Work) -> Work:
        result = Work()
        for part in (self, other):
            for operation, times in part.counts.items():
                result.add(operation, times)
        return result

    def __mul__(self, times: float) -> Work:
        return Work({operation: times * count for operation, count in self.counts.items()})

    @property
    def flops(self) -> float:
        """Floating point operations of products and factorisations."""
        return sum(o.flops * n for o, n in self.counts.items() if isinstance(o, Product | Factorisation))

    @property
    def moved(self) -> float:
        """Bytes read and written by operations that memory limits."""
        return sum(o.size * n for o, n in self.counts.items() if isinstance(o, Move))

    def through(self, channel: str) -> float:
        """Bytes through a channel."""
        return sum(n for o, n in self.counts.items() if isinstance(o, Transfer) and o.channel == channel)


def total(parts: Iterable[Work]) -> Work:
    """The sum."""
    result = Work()
    for part in parts:
        result = result + part
    return result


@contextmanager
def counted() -> Iterator[Work]:
    """Within the block operations on the meta device are counted into the result, those of backward passes too."""
    work = Work()
    with _FusedAttention(), _Counting(work):
        yield work


class _Counting(TorchDispatchMode):
    def __init__(self, work: Work) -> None:
        super().__init__()
        self._work = work

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True  # a number is asked for where there is none; 1 in arithmetic
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func is not torch.ops.aten.detach.default:
            self._count(func.overloadpacket, args, result)
        return result

    def _count(self, operator: Any, args: Any, result: Any) -> None:
        aten, work = torch.ops.aten, self._work
        work.add(Call())
        tensors = [t for t in tree_leaves((args, result)) if isinstance(t, Tensor)]
        size = sum(t.numel() * t.element_size() for t in tensors)
        if operator in (aten.mm, aten.bmm, aten.addmm, aten.addmm_, aten.baddbmm):
            a, b = [t for t in args if isinstance(t, Tensor)][-2:]
            work.add(Product(precision_of(a), a.shape[-2], a.shape[-1], b.shape[-1]), a.shape[0] if a.ndim > 2 else 1)
        elif operator in (_ATTENTION, _ATTENTION_BACKWARD):
            q, k = (args[0], args[1]) if operator is _ATTENTION else (args[1], args[2])
            forward = operator is _ATTENTION
            causal = len(args) > (4 if forward else 7) and args[4 if forward else 7]
            self._attention(q, k, 1 if forward else 2.5, bool(causal))
            work.move(size)
        else:
            if operator in _EXPONENTIALS:
                work.add(Exponential(1), tensors[-1].numel())
            work.move(size)

    def _attention(self, q: Tensor, k: Tensor, passes: float, causal: bool) -> None:
        """Two products per pass and the scores' exponentials; of causal ones the half that is masked is left out."""
        batch, heads, rows, width = q.shape
        columns = k.shape[2]
        times = batch * heads * passes * (0.5 if causal else 1)
        for shape in ((rows, width, columns), (rows, columns, width)):
            self._work.add(Product(precision_of(q), *shape), times)
        self._work.add(Exponential(1), SCORE * batch * heads * passes * rows * columns)


#: Exponentials that a score of attention is worth, with its sums and the mask.
SCORE = 1.8
_EXPONENTIALS = frozenset(
    getattr(torch.ops.aten, name)
    for name in (
        *("exp", "exp_", "silu", "silu_", "silu_backward", "gelu", "gelu_backward", "tanh", "sigmoid", "softplus"),
        *("_softmax", "_log_softmax", "log", "erf"),
    )
)
_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _FusedAttention(TorchFunctionMode):
    """Attention as devices do it, without a matrix of scores in memory; the meta device would write it out."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
        q, k, v = given["query"], given["key"], given["value"]
        if q.ndim != 4 or q.shape[-1] != v.shape[-1]:
            return func(*args, **(kwargs or {}))
        if k.shape[1] != q.shape[1]:
            k, v = (t[:, :, None].expand(-1, -1, q.shape[1] // k.shape[1], -1, -1).flatten(1, 2) for t in (k, v))
        return _ATTENTION(q, k, v, 0.0, bool(given.get("is_causal")))[0]


def precision_of(tensor: Tensor) -> Precision:
    """How products of a tensor are multiplied at this moment."""
    if tensor.dtype == torch.float64:
        return "float64"
    if tensor.dtype in (torch.bfloat16, torch.float16):
        return "bfloat16"
    approximate = torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # type: ignore[attr-defined]
    return "approximate" if approximate else "float32"
