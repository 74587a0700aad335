"""What the tests compare with: slow, dense and written differently from the library."""

import itertools
import math

import torch

#: Rounding unit per dtype; with the factor and the size it gives every tolerance of the tests.
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
FACTOR = 16

DTYPES = [torch.float64, torch.float32]
DTYPE_IDS = ["float64", "float32"]


def tolerance(dtype, size, condition=1.0, working=None):
    """Relative to the largest entry: rounding of sums of ``size`` terms, times the condition of the problem solved.

    ``working`` is the dtype that the problem was solved in, where the result is in another.
    """
    return FACTOR * math.sqrt(size) * (UNIT[dtype] + condition * UNIT[working or dtype])


def assert_close(actual, expected, *, condition=1.0, working=None, size=None):
    """Every entry agrees to the tolerance of the actual dtype, relative to the largest expected entry."""
    actual = torch.as_tensor(actual)
    if not actual.is_floating_point():
        raise TypeError(f"compare {actual.dtype} with ==")
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert actual.shape == expected.shape, f"shape {list(actual.shape)}, expected {list(expected.shape)}"
    assert torch.isfinite(actual).all(), f"{int((~torch.isfinite(actual)).sum())} entries are not finite"
    if expected.numel() == 0:
        return
    allowed = tolerance(actual.dtype, size or max([1, *expected.shape]), condition, working)
    largest = float(expected.abs().max())
    error = (actual.detach().double() - expected).abs()
    worst = int(error.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), expected.shape))
    got, wanted = float(actual.reshape(-1)[worst]), float(expected.reshape(-1)[worst])
    assert float(error.max()) <= allowed * largest, (
        f"worst at {index}: got {got:.17g}, expected {wanted:.17g}, ratio {got / wanted if wanted else math.inf:.12g}; "
        f"error {float(error.max()):.3g} = {float(error.max()) / (allowed * largest or 1):.3g} x the allowed"
    )


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def eye(n):
    return torch.eye(n, dtype=torch.float64)


def spd(n, *, condition=10.0, seed=0, dtype=torch.float64, largest=1.0):
    """Random symmetric positive definite matrix with eigenvalues from ``largest`` down to ``largest / condition``."""
    q, _ = torch.linalg.qr(normal(n, n, seed=seed))
    values = largest * condition ** -torch.linspace(0, 1, n, dtype=torch.float64)
    matrix = q @ torch.diag(values) @ q.T
    return ((matrix + matrix.T) / 2).to(dtype)


def dense_matrix(function, shape, dtype=torch.float64):
    """The matrix of a linear map on [out, in] matrices, column by column."""
    n = shape[0] * shape[1]
    columns = [function(unit.reshape(shape)).reshape(n) for unit in torch.eye(n, dtype=dtype)]
    return torch.stack(columns, dim=1)


def quadratic(h, change):
    """½ vec(D)ᵀ H vec(D) in float64."""
    d = change.double().reshape(-1)
    return 0.5 * float(torch.einsum("i,ij,j->", d, h.double(), d))


def constrained_minimum(h, w, mask):
    """The minimum of ½ (x - w)ᵀ H (x - w) over x that vanish off the mask, by one dense solve: (x [out, in], value)."""
    h, flat = h.double(), w.double().reshape(-1)
    kept = mask.reshape(-1).nonzero().squeeze(1)
    gone = (~mask).reshape(-1).nonzero().squeeze(1)
    change = torch.zeros_like(flat)
    change[gone] = -flat[gone]
    if len(kept) and len(gone):
        change[kept] = torch.linalg.solve(h[kept][:, kept], h[kept][:, gone] @ flat[gone])
    return (flat + change).reshape(w.shape), quadratic(h, change)


def masks_of_size(shape, kept):
    """Every mask that keeps this many weights."""
    n = shape[0] * shape[1]
    for chosen in itertools.combinations(range(n), kept):
        mask = torch.zeros(n, dtype=torch.bool)
        mask[list(chosen)] = True
        yield mask.reshape(shape)


def masks_n_of_m(shape, n, m):
    """Every mask that keeps min(n, group) of each group of m consecutive inputs of a row; the last may be shorter."""
    rows, columns = shape
    groups = [range(start, min(start + m, columns)) for _ in range(rows) for start in range(0, columns, m)]
    per_row = math.ceil(columns / m)
    choices = [list(itertools.combinations(group, min(n, len(group)))) for group in groups]
    for chosen in itertools.product(*choices):
        mask = torch.zeros(shape, dtype=torch.bool)
        for group, kept in enumerate(chosen):
            mask[group // per_row, list(kept)] = True
        yield mask


def brute_force(h, w, masks):
    """The best of some masks and the minimum under it: (mask, value)."""
    best, least = None, math.inf
    for mask in masks:
        value = constrained_minimum(h, w, mask)[1]
        if value < least:
            best, least = mask, value
    return best, least
