"""The exact k-th largest by histogram: the twin against sorting, the kernel against the twin."""

import math

import pytest
import torch
from kernels_harness import assert_equal, assert_fits, compile_kernels, interpret, needs_gpu

from kfac_prune import backend, reference

INF, NAN = float("inf"), float("nan")
#: Registers a thread by alignment: 64 let a multiprocessor hold four programs of eight warps, 112 two.
REGISTERS = {True: 64, False: 112}
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


CASES = list(cases())


def scores_of(function, arguments):
    """All scores, formed with other operations than the twin's."""
    if function == "kth_largest":
        return [float(v) for part in arguments[0] for v in part.reshape(-1)]
    x, dual, rho, _ = arguments
    y = x + dual / torch.tensor(rho)
    return (y * y).reshape(-1).tolist()


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
}


@pytest.mark.parametrize(("function", "arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_arguments_are_checked(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)


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
from kfac_prune_kernels.kth_largest import CONFIGS, SHIFTS, choose_kernel, histogram_kernel
count = dict(x_ptr="*fp32", dual_ptr="*fp32", counts_ptr="*i64", state_ptr="*i64", rho="fp32", n_scores="i32",
             tiles="i32")
choose = dict(counts_ptr="*i64", state_ptr="*i64", result_ptr="*fp32", k="i32")
for shift in (SHIFTS[0], SHIFTS[-1]):
    options = dict(num_warps=8, enable_fp_fusion=False)
    rows += machine_code(choose_kernel, choose, dict(SHIFT=shift), options, str(shift))
    for config, dual in [(config, dual) for _, config in CONFIGS for dual in (False, True)]:
        options = dict(num_warps=config.num_warps, enable_fp_fusion=False)
        constants = dict(DUAL=dual, SHIFT=shift, BLOCK=config.block)
        label = f"{'dual' if dual else 'plain'} {shift} {config}"
        rows += machine_code(histogram_kernel, count, constants, options, label)
types = count | dict(n_scores="i64")
rows += machine_code(histogram_kernel, types, constants, options, f"{label} of more than 32 bits count")
"""


def test_kernels_compile_without_spills(tmp_path):
    rows = compile_kernels(tmp_path, SPECIFICATIONS)
    assert len(rows) == 4 * (2 * (1 + 2 * 2) + 1)
    assert_fits(rows, REGISTERS)
    for row in rows:
        if "dual" in row["label"]:  # rounded as in the twin
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


@pytest.mark.parametrize("function", ["kth_largest", "kth_largest_dual"])
def test_operator_is_well_formed(function):
    arguments = [arguments for name, arguments in CASES if name == function][-1]
    torch.library.opcheck(getattr(backend, function), arguments)


def test_operators_compile_into_one_graph():
    def largest(x, dual):
        plain = backend.kth_largest([x * 1, dual * dual], 3)
        return plain + backend.kth_largest_dual(x, dual, RHO, 5)

    torch.compiler.reset()
    x, dual = torch.randn(4, 9), torch.rand(4, 9)
    compiled = torch.compile(largest, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(x, dual), largest(x, dual))
