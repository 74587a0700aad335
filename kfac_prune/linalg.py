"""Small pieces of dense linear algebra that several curvatures share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from kfac_prune import backend

#: Small matrices that are factorised at a time, for the sake of memory.
AT_A_TIME = 1024
#: Multiplications from which a product is worth rounding its factors for: 1.7 times as fast there on a core of Zen 4,
#: twice at 1024³; below 128³ slower.
WORTH_ROUNDING = 192**3


@contextmanager
def approximate_products() -> Iterator[None]:
    """Within the block ``product`` multiplies float32 matrices by units for shorter numbers, where the device has any.

    On a GPU, and on a CPU with matrix units (AMX), torch's own switches do it, and ``@`` follows too: entries are
    rounded to TF32 or bfloat16 (a relative error of the product of about 3e-4 and 2e-3), sums are float32. On a CPU
    that has bfloat16 in its vector units alone (AVX512-BF16), the result is rounded to bfloat16 once more. Everywhere
    else, and for other dtypes, nothing changes. For iterations that correct themselves; never for a factorisation.
    """
    with _multiplying("tf32", "bf16", rounds=bfloat16_units() == "vector"):
        yield


@contextmanager
def exact_products() -> Iterator[None]:
    """Within the block float32 matrices are multiplied as IEEE wants, whatever the process has set (a decorator too).

    For covariances, and for whatever is told or checks what came of ``approximate_products``.
    """
    with _multiplying("ieee", "ieee", rounds=False):
        yield


@contextmanager
def _multiplying(gpu: str, cpu: str, *, rounds: bool) -> Iterator[None]:
    """Torch's switches for products of float32 and our own, until the end of the block."""
    global _rounding
    switches = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, rounding = [switch.fp32_precision for switch in switches], _rounding
    try:
        for switch, precision in zip(switches, (gpu, cpu), strict=True):
            switch.fp32_precision = precision
        _rounding = rounds
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = "none"  # as the switches above it, which a switch that is read resolves to
            if switch.fp32_precision != precision:
                switch.fp32_precision = precision
        _rounding = rounding


#: Whether ``product`` rounds its factors itself.
_rounding = False


@cache
def bfloat16_units() -> Literal["matrix", "vector"] | None:
    """Which units of this CPU multiply bfloat16, the faster where it has both; None: neither, or torch cannot tell."""
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return "matrix" if able.get("amx_bf16") else "vector" if able.get("avx512_bf16") else None


def product(a: Tensor, b: Tensor) -> Tensor:
    """``A B`` [m, n] of A [m, k] and B [k, n]; within ``approximate_products`` as that describes."""
    if _rounding and a.dtype == torch.float32 and a.is_cpu and a.numel() * b.shape[-1] >= WORTH_ROUNDING:
        return (a.bfloat16() @ b.bfloat16()).float()
    return a @ b


def shifted(matrix: Tensor, shift: float | Tensor) -> Tensor:
    """``M + shift·I`` as a new matrix [n, n], or of several [k, n, n]."""
    result = matrix.clone()
    result.diagonal(dim1=-2, dim2=-1).add_(shift)
    return result


def packed_triangle(matrix: Tensor) -> Tensor:
    """One triangle of a symmetric matrix [n, n] as a vector [n (n + 1) / 2]; see ``unpacked_triangle``.

    The lower triangle of the upper left quarter and the upper one of the lower right quarter fill a rectangle
    (Gustavson et al. 2010, "rectangular full packed format"), the lower left quarter follows.
    """
    half = len(matrix) // 2
    rest = len(matrix) - half
    rectangle = matrix.new_zeros(half + 1, rest)
    rectangle[:rest] = matrix[half:, half:].triu()
    rectangle[1:, :half] += matrix[:half, :half].tril()
    return torch.cat([rectangle.flatten(), matrix[half:, :half].flatten()])


def unpacked_triangle(packed: Tensor) -> Tensor:
    """The symmetric matrix [n, n] that ``packed_triangle`` made a vector of."""
    size = (math.isqrt(8 * packed.numel() + 1) - 1) // 2
    half = size // 2
    rest = size - half
    rectangle, quarter = packed.split([(half + 1) * rest, half * rest])
    rectangle, quarter = rectangle.view(half + 1, rest), quarter.view(rest, half)
    matrix = packed.new_empty(size, size)
    matrix[half:, :half], matrix[:half, half:] = quarter, quarter.T
    upper, lower = rectangle[:rest], rectangle[1:, :half]
    matrix[half:, half:] = upper.triu() + upper.triu(1).T
    matrix[:half, :half] = lower.tril() + lower.tril(-1).T
    return matrix


def is_definite(matrix: Tensor) -> bool:
    """Whether a symmetric matrix [n, n], or each of several [k, n, n], has a Cholesky factor in float64."""
    parts = matrix.reshape(-1, *matrix.shape[-2:]).split(AT_A_TIME)
    return all(int(torch.linalg.cholesky_ex(part.double()).info.abs().max()) == 0 for part in parts)


def inverse_from_cholesky(matrix: Tensor) -> Tensor:
    """``M⁻¹`` of a symmetric positive definite matrix [n, n], or of several [k, n, n], in M's dtype.

    Factorised in float64, several a thousand at a time.

    Raises:
        torch.linalg.LinAlgError: M is not positive definite.
    """
    if matrix.ndim > 2 and len(matrix) > AT_A_TIME:
        return torch.cat([inverse_from_cholesky(part) for part in matrix.split(AT_A_TIME)])
    factor = torch.linalg.cholesky(matrix.double())
    return torch.cholesky_inverse(factor).to(matrix.dtype)


def inverse_of_shifted(matrix: Tensor, shift: float) -> Tensor:
    """``(M + shift·I)⁻¹`` [n, n] of a symmetric positive semidefinite matrix, in M's dtype throughout.

    For shifts that keep the condition number far from the dtype's limit, as those of ADMM's penalty do.
    """
    return torch.cholesky_inverse(torch.linalg.cholesky(shifted(matrix, shift)))


def inverse_upper_cholesky(matrix: Tensor) -> Tensor:
    """The upper triangular U [n, n] with ``M⁻¹ = Uᵀ U``, factorised in float64, returned in M's dtype.

    Raises:
        torch.linalg.LinAlgError: M is not positive definite.
    """
    upper = torch.linalg.cholesky(matrix.double().flip(0, 1)).flip(0, 1)  # M = V Vᵀ with V upper, so U = V⁻¹
    eye = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    inverse: Tensor = torch.linalg.solve_triangular(upper, eye, upper=True)
    return inverse.to(matrix.dtype)


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest entry (1 <= k <= numel) of a tensor, as a scalar tensor."""
    flat = values.reshape(-1)
    if flat.is_cuda and flat.dtype == torch.float32:
        found: Tensor = backend.kth_largest([flat], k)
        return found
    if flat.device.type == "cpu" and flat.dtype in (torch.float32, torch.float64):  # ten times as fast as torch
        rank = flat.numel() - k
        return torch.as_tensor(np.partition(flat.detach().numpy(), rank)[rank])
    return flat.sort().values[-k]  # CUDA's kthvalue gives a tensor to one block of threads
