"""The exact k-th largest by histogram: the twin against sorting, the kernel against the twin."""

import math

import pytest
import torch
from kernels_harness import assert_equal, assert_fits, compile_kernels, interpret, needs_gpu, run_python

from kfac_prune import backend, reference

INF, NAN = float("inf"), float("nan")
#: Registers a thread by alignment, so that two programs of eight warps fit on a multiprocessor.
REGISTERS = {True: 96, False: 128}
#: Beyond the table: several tiles per program, several programs.
EXTRA = [{"block": 256, "programs": 2, "num_warps": 4}]
SPECIAL = [0.0, -0.0, 1e-45, 1.1754944e-38, 1.0, 1.0, 1.0000001, 3.4028235e38, INF, INF, 0.25, 0.0]
PLAIN = {
    "one": [torch.tensor([3.0])],
    "special": [torch.tensor(SPECIAL)],
    "nan": [torch.tensor([*SPECIAL, NAN, NAN])],
    "all-nan": [torch.full((5,), NAN)],
    "negative": [torch.tensor([-1.0, 2.0, -INF, 0.0, -0.0, -3.5])],
    "equal": [torch.full((37, 3), 0.1)],
    "layers": [torch.rand(7, 65), torch.rand(0, 3), torch.rand(1300) ** 4, torch.rand(2, 3, 5) * 1e-3],
    "ties": [torch.rand(33, 50).mul(8).round()],
}
RHO = 0.37


def ranks(entries):
    return sorted({1, entries // 3, entries} - {0})


def cases():
    """(function, arguments)."""
    torch.manual_seed(0)
    for tensors in PLAIN.values():
        for k in ranks(sum(t.numel() for t in tensors)):
            yield "kth_largest", (tensors, k)
    for shape in [(1, 1), (63, 65), (500, 3)]:
        x, dual = torch.randn(shape), torch.randn(shape) * 0.3
        x[shape[0] // 2 :: 7] = 0
        for k in ranks(x.numel()):
            yield "kth_largest_dual", (x, dual, RHO, k)
    x[::2] = NAN
    yield "kth_largest_dual", (x, dual, RHO, 600)
    yield "kth_largest_dual", (x, dual, RHO, 900)
    for shape in [(1, 1), (19, 128), (70, 37), (5, 300)]:
        w, scale = torch.randn(shape), torch.rand(shape[1]) + 0.1
        block = torch.randn(shape[0], shape[1] + 11)[:, 3 : 3 + shape[1]]
        for k in ranks(2 * w.numel()):
            yield "kth_largest_scaled", ([w, block], [scale, scale * 2], k)


CASES = list(cases())


def scores_of(function, arguments):
    """All scores, formed with other operations than the twin's."""
    if function == "kth_largest":
        return [float(v) for part in arguments[0] for v in part.reshape(-1)]
    if function == "kth_largest_dual":
        x, dual, rho, _ = arguments
        y = x + dual / torch.tensor(rho)
        return (y * y).reshape(-1).tolist()
    return [v for w, s in zip(*arguments[:2], strict=True) for v in (w * w / s.expand_as(w)).reshape(-1).tolist()]


def test_twin_is_what_sorting_finds():
    for function, arguments in CASES:
        scores = scores_of(function, arguments)
        ordered = sorted(scores, key=lambda v: -INF if math.isnan(v) else -v)  # NaN with the infinities
        ordered = [NAN] * sum(map(math.isnan, scores)) + [v for v in ordered if not math.isnan(v)]
        found = getattr(reference, function)(*arguments)
        assert_equal(found, torch.tensor(ordered[arguments[-1] - 1]), function)


REFUSED = {
    "none": (reference.kth_largest, ([], 1), "at least one tensor"),
    "k-0": (reference.kth_largest, ([torch.ones(3)], 0), r"k is 0; kth_largest has 3 entries, .* from 1 to 3"),
    "k-big": (reference.kth_largest, ([torch.ones(3), torch.ones(2)], 6), r"k is 6; .* has 5 entries"),
    "float64": (reference.kth_largest, ([torch.ones(3).double()], 1), r"scores\[0\] is torch.float64 \(3,\)"),
    "strides": (reference.kth_largest, ([torch.ones(3), torch.ones(2, 3).T], 1), r"scores\[1\] has strides \(1, 3\)"),
    "dual": (reference.kth_largest_dual, (torch.ones(2, 3), torch.ones(3, 2), 1.0, 1), r"dual is .* \(3, 2\)"),
    "rho": (reference.kth_largest_dual, (torch.ones(2, 3), torch.ones(2, 3), -1.0, 1), r"rho is -1.0"),
    "vector": (reference.kth_largest_scaled, ([torch.ones(3)], [torch.ones(3)], 1), r"weights\[0\] has shape \(3,\)"),
    "columns": (reference.kth_largest_scaled, ([torch.ones(2, 3).T], [torch.ones(2)], 1), r"has strides \(1, 3\)"),
    "scale": (reference.kth_largest_scaled, ([torch.ones(2, 3)], [torch.ones(2)], 1), r"scales\[0\] .*needs .* \(3,\)"),
    "number": (reference.kth_largest_scaled, ([torch.ones(2, 3)], [], 1), r"one scale per layer, not 1 and 0"),
}


@pytest.mark.parametrize(("function", "arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_arguments_are_checked(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)


FAR_APART = """
import sys
import torch
from kfac_prune_kernels.kth_largest import kth_largest_scaled

rows = torch.from_file(sys.argv[1], shared=True, size=3 * (2**31 + 8), dtype=torch.float32)
weight = rows.view(3, -1)[:, :5]
weight.copy_(torch.arange(15).view(3, 5))
found = [float(kth_largest_scaled([weight], [torch.ones(5)], k)) for k in (1, 7, 15)]
assert found == [14.0**2, 8.0**2, 0.0], found
"""


def test_rows_may_lie_further_apart_than_32_bits_count(tmp_path):
    """A sparse file of 24 GiB, of which three pages exist."""
    run_python(FAR_APART, tmp_path / "sparse", TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    marked = [(function, arguments, EXTRA) for function, arguments in CASES]
    strided = ("kth_largest", ([torch.ones(4, 4).T[:2]], 1), [])
    return interpret(tmp_path_factory.mktemp("interpreted"), "kth_largest", [*marked, strided])


def test_kernel_equals_the_twin(interpreted):
    for (function, arguments), results in zip(CASES, interpreted[:-1], strict=True):
        assert len(results) == 3  # two configurations of the table and one more
        expected = getattr(reference, function)(*arguments)
        for _, found, margins_intact in results:
            assert_equal(found, expected, f"{function}, k = {arguments[-1]}")
            assert margins_intact


def test_kernel_refuses_strides(interpreted):
    assert interpreted[-1][0].startswith("scores[0] has strides (1, 4)")


SPECIFICATIONS = """
from kfac_prune_kernels.kth_largest import COLUMNS, CONFIGS, PASSES, choose_kernel, histogram_kernel
count = dict(x_ptr="*fp32", other_ptr="*fp32", counts_ptr="*i64", state_ptr="*i64", rho="fp32", n_scores="i32",
             n_cols="i32", row_stride="i32", tiles="i32")
options = dict(num_warps=8, enable_fp_fusion=False)
for shift, bits in PASSES[::2]:
    choose = dict(counts_ptr="*i64", state_ptr="*i64", result_ptr="*fp32", k="i32")
    rows += machine_code(choose_kernel, choose, dict(SHIFT=shift, BITS=bits), options, str(shift))
runs = [(config, form, 21, 11, "i32") for _, config in CONFIGS for form in ("plain", "dual", "scaled")]
for config, form, shift, bits, index in [*runs, (CONFIGS[-1][1], "scaled", 0, 10, "i64")]:
    constants = dict(FORM=form, SHIFT=shift, BITS=bits, BLOCK=config.block, COLS=COLUMNS)
    options = dict(num_warps=config.num_warps, enable_fp_fusion=False)
    types = count | dict(n_scores=index, row_stride=index)
    rows += machine_code(histogram_kernel, types, constants, options, f"{form} {shift} {config}")
"""


def test_kernels_compile_without_spills(tmp_path):
    rows = compile_kernels(tmp_path, SPECIFICATIONS)
    assert len(rows) == 4 * (2 + 2 * 3 + 1)
    assert_fits(rows, REGISTERS)
    for row in rows:
        if "dual" in row["label"] or "scaled" in row["label"]:  # rounded as in the twin
            assert "div.rn.f32" in row["ptx"]
            assert "div.full" not in row["ptx"]


@needs_gpu
@pytest.mark.parametrize("case", range(len(CASES)))
def test_kernel_on_the_gpu(case):
    function, arguments = CASES[case]
    moved = [
        [t.cuda() for t in a] if isinstance(a, list) else a.cuda() if isinstance(a, torch.Tensor) else a
        for a in arguments
    ]
    assert_equal(getattr(backend, function)(*moved), getattr(reference, function)(*arguments), function)


@pytest.mark.parametrize("function", ["kth_largest", "kth_largest_dual", "kth_largest_scaled"])
def test_operator_is_well_formed(function):
    arguments = [arguments for name, arguments in CASES if name == function][-1]
    torch.library.opcheck(getattr(backend, function), arguments)


def test_operators_compile_into_one_graph():
    def largest(x, dual):
        plain = backend.kth_largest([x * 1, dual * dual], 3)
        return plain + backend.kth_largest_dual(x, dual, RHO, 5) + backend.kth_largest_scaled([x], [dual[0] + 2], 4)

    torch.compiler.reset()
    x, dual = torch.randn(4, 9), torch.rand(4, 9)
    compiled = torch.compile(largest, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(x, dual), largest(x, dual))
