"""The fused tail of an ADMM iteration: the twins by hand, the kernels against the twins, the solver with them."""

import sys

import pytest
import torch
from kernels_harness import assert_equal, assert_fits, compile_kernels, interpret, needs_gpu
from oracles import normal, spd

from kfac_prune import backend, reference
from kfac_prune.linalg import kth_largest
from kfac_prune.obs import NM, Pattern, Unstructured, project, select
from kfac_prune.operators import Kronecker

RHO = 0.37
SHAPES = [(1, 1), (1, 7), (63, 65), (500, 3), (16, 64), (0, 5)]
KINDS = ["random", "ties", "all-kept", "none-kept", "nan"]
CASES = [(shape, kind) for shape in SHAPES for kind in KINDS]
NM_CASES = [
    (shape, kind, pattern)
    for shape in [(1, 1), (9, 65), (4, 64), (0, 5)]
    for kind in ["random", "ties", "nan"]
    for pattern in [(2, 4), (3, 7), (4, 8), (40, 64)]
]
#: Registers a thread by alignment. 48 let a multiprocessor hold five of the large blocks; sizes that 16 does not divide
#: may take more: up to 64 with triton 3.6 and 3.9.
REGISTERS = {True: 48, False: 80}
NM_REGISTERS = {True: 64, False: 80}
EXTRA = [{"block": 64, "num_warps": 1}]


def make_case(shape, kind):
    """Arguments of admm_tail; Z is poisoned."""
    generator = torch.Generator().manual_seed(len(kind) + 1000 * shape[0] + shape[1])
    x = torch.randn(shape, generator=generator)
    dual = torch.randn(shape, generator=generator) * 0.3
    mask = torch.rand(shape, generator=generator) < 0.5
    threshold = torch.tensor(0.5)
    if kind == "ties":  # Y is a multiple of 1/2 in [-3/2, 3/2], and |Y| = 1/2 is at the threshold
        x, dual, threshold = (x * 2).round().clamp(-3, 3) / 2, torch.zeros(shape), torch.tensor(0.25)
    elif kind == "all-kept":
        threshold = torch.tensor(-1.0)
    elif kind == "none-kept":
        threshold = torch.tensor(float("inf"))
    elif kind == "nan":
        x.view(-1)[::3], dual.view(-1)[1::5] = float("nan"), float("nan")
    return x, dual, mask, torch.full(shape, float("nan")), threshold, RHO


def make_nm_case(shape, kind, pattern):
    x, dual, mask, z, _, rho = make_case(shape, kind)
    return x, dual, mask, z, *pattern, rho


def outcome(function, arguments, device="cpu"):
    """X, V, M, Z and the churn after a call on copies of the arguments."""
    tensors = [a.to(device, copy=True) if isinstance(a, torch.Tensor) else a for a in arguments]
    churn = function(*tensors)
    return *tensors[:4], churn


def assert_same(found, expected):
    for name, a, b in zip(("x", "dual", "mask", "z", "churn"), found, expected, strict=True):
        assert_equal(a, b, name)


# --- the twin


@pytest.mark.parametrize("shape", SHAPES[1:-1], ids=str)
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.9])
def test_twin_is_the_tail_of_an_iteration(shape, sparsity):
    x, dual, mask, z, _, rho = make_case(shape, "random")
    pattern = Unstructured(sparsity)
    y = x + dual / rho
    kept = pattern.project(y.square())
    expected_z = y * kept
    expected = x.clone(), dual + rho * (x - expected_z), kept, expected_z, (kept ^ mask).sum()
    threshold = kth_largest(y.square(), int(kept.sum()) + 1)
    assert_same(outcome(reference.admm_tail, (x, dual, mask, z, threshold, rho)), expected)


def test_twin_by_hand():
    x, dual, mask = torch.tensor([[3.0, -1.0, 0.0, 2.0]]), torch.tensor([[0.0, -1.0, 1.0, -2.0]]), torch.ones(1, 4) > 0
    z, threshold = torch.full((1, 4), float("nan")), torch.tensor(4.0)
    churn = reference.admm_tail(x, dual, mask, z, threshold, 0.5)  # Y = 3, -3, 2, -2
    assert mask.tolist() == [[True, True, False, False]]  # 2² = 4 is not above the threshold
    assert z.tolist() == [[3, -3, 0, 0]]
    assert dual.tolist() == [[0, 0, 1, -1]]  # 0 where kept, rho·Y elsewhere
    assert churn.item() == 2


def test_nan_is_dropped_and_stays_visible():
    arguments = make_case((63, 65), "nan")
    lost = (arguments[0] + arguments[1]).isnan()
    _, dual, mask, z, _ = outcome(reference.admm_tail, arguments)
    assert not mask[lost].any()
    assert torch.equal(z.isnan(), lost)
    assert torch.equal(dual.isnan(), lost)


REFUSED = {
    "vector": ("x", torch.ones(6), r"x has shape \(6,\); admm_tail needs \[out, in\]"),
    "float64": ("x", torch.ones(2, 3).double(), r"x is torch.float64 \(2, 3\) on cpu; .* needs torch.float32"),
    "shape": ("dual", torch.ones(3, 2), r"dual is torch.float32 \(3, 2\) on cpu; .* needs torch.float32 \(2, 3\)"),
    "float-mask": ("mask", torch.ones(2, 3), r"mask is torch.float32 .* needs torch.bool"),
    "device": ("z", torch.ones(2, 3, device="meta"), r"z is .* on meta; .* on cpu"),
    "strides": ("z", torch.ones(3, 2).T, r"z has strides \(1, 2\)"),
    "one-threshold": ("threshold", torch.ones(1), r"threshold is torch.float32 \(1,\) on cpu; .* scalar tensor"),
    "rho-0": ("rho", 0.0, r"rho is 0.0; it must be above 0"),
    "rho-nan": ("rho", float("nan"), r"rho is nan"),
}


@pytest.mark.parametrize(("name", "value", "message"), REFUSED.values(), ids=REFUSED)
def test_arguments_are_checked(name, value, message):
    names = ("x", "dual", "mask", "z", "threshold", "rho")
    arguments = dict(zip(names, make_case((2, 3), "random"), strict=True)) | {name: value}
    with pytest.raises(ValueError, match=message):
        reference.admm_tail(**arguments)


def test_n_of_m_by_hand():
    x = torch.tensor([[3.0, -1.0, 1.0, 1.0, 0.0, 2.0, 0.0]])
    dual, mask, z = torch.zeros(1, 7), torch.ones(1, 7) > 0, torch.full((1, 7), float("nan"))
    churn = reference.admm_tail_nm(x, dual, mask, z, 2, 4, 0.5)
    assert mask.int().tolist() == [[1, 1, 0, 0, 1, 1, 0]]  # of equals the earlier; a short group keeps two as well
    assert z.tolist() == [[3, -1, 0, 0, 0, 2, 0]]
    assert dual.tolist() == [[0, 0, 0.5, 0.5, 0, 0, 0]]
    assert churn.item() == 3


@pytest.mark.parametrize("pattern", [(2, 4), (3, 7), (40, 64)], ids=str)
def test_n_of_m_is_the_tail_of_an_iteration(pattern):
    x, dual, mask, z, _, rho = make_case((63, 65), "random")
    y = x + dual / rho
    kept = NM(*pattern).project(y.square())
    expected_z = y * kept
    expected = x.clone(), dual + rho * (x - expected_z), kept, expected_z, (kept ^ mask).sum()
    assert_same(outcome(reference.admm_tail_nm, (x, dual, mask, z, *pattern, rho)), expected)


@pytest.mark.parametrize("pattern", [(0, 4), (4, 4), (-1, 2)], ids=str)
def test_n_of_m_is_checked(pattern):
    with pytest.raises(ValueError, match=rf"pattern is {pattern[0]}:{pattern[1]}; admm_tail_nm needs 1 <= n < m"):
        reference.admm_tail_nm(*make_nm_case((2, 8), "random", pattern))


# --- the kernels


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Results of the kernels in the interpreter by case, and what they said to a strided X."""
    strided = torch.ones(4, 4).T[:2]
    calls = [("admm_tail", make_case(*case), EXTRA) for case in CASES]
    calls += [("admm_tail_nm", make_nm_case(*case), []) for case in NM_CASES]
    calls += [("admm_tail", (strided, *make_case((2, 4), "random")[1:]), [])]
    calls += [("admm_tail_nm", (strided, *make_nm_case((2, 4), "random", (2, 4))[1:]), [])]
    *results, first, second = interpret(tmp_path_factory.mktemp("interpreted"), "admm_tail", calls)
    return dict(zip([*CASES, *NM_CASES], results, strict=True)), (first[0], second[0])


def assert_interpreted(results, expected, configurations):
    assert len(results) == configurations
    for arguments, churn, margins_intact in results:
        assert_same((*arguments[:4], churn), expected)
        assert margins_intact


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_equals_the_twin(interpreted, shape, kind):
    assert_interpreted(interpreted[0][shape, kind], outcome(reference.admm_tail, make_case(shape, kind)), 3)


def test_n_of_m_kernel_equals_the_twin(interpreted):
    for case in NM_CASES:
        assert_interpreted(interpreted[0][case], outcome(reference.admm_tail_nm, make_nm_case(*case)), 2)


def test_kernels_refuse_strides(interpreted):
    assert all(message.startswith("x has strides (1, 4)") for message in interpreted[1])


SPECIFICATIONS = """
from kfac_prune_kernels.admm_tail import CONFIGS, admm_tail_kernel, admm_tail_nm_kernel
types = dict(x_ptr="*fp32", dual_ptr="*fp32", mask_ptr="*u8", z_ptr="*fp32", churn_ptr="*i32", rho="fp32")
plain = types | dict(threshold_ptr="*fp32", n_weights="i32")
groups = types | dict(n_groups="i32", n_cols="i32", groups_per_row="i32")
for _, config in CONFIGS:
    options = dict(num_warps=config.num_warps, enable_fp_fusion=False)
    rows += machine_code(admm_tail_kernel, plain, dict(BLOCK=config.block), options, str(config))
    for n, m, width, whole in [(2, 4, 4, True), (4, 8, 8, True), (3, 7, 8, False)]:
        constants = dict(N=n, M=m, WIDTH=width, WHOLE=whole, BLOCK=config.block)
        rows += machine_code(admm_tail_nm_kernel, groups, constants, options, f"{n}:{m} {config}")
"""


def test_kernels_compile_without_spills(tmp_path):
    rows = compile_kernels(tmp_path, SPECIFICATIONS)
    assert len(rows) == 4 * 2 * 4
    assert_fits([row for row in rows if "nm" not in row["kernel"]], REGISTERS)
    assert_fits([row for row in rows if "nm" in row["kernel"]], NM_REGISTERS)
    for row in rows:  # each operation rounds once, as in the twin
        assert "div.rn.f32" in row["ptx"]
        assert "div.full" not in row["ptx"]


@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [*SHAPES, (1031, 1021)], ids=str)  # the last takes the large blocks
def test_kernel_on_the_gpu(shape, kind):
    arguments = make_case(shape, kind)
    assert_same(outcome(backend.admm_tail, arguments, "cuda"), outcome(reference.admm_tail, arguments))


@needs_gpu
@pytest.mark.parametrize("case", [*NM_CASES, ((1031, 1021), "random", (2, 4))], ids=str)
def test_n_of_m_kernel_on_the_gpu(case):
    arguments = make_nm_case(*case)
    assert_same(outcome(backend.admm_tail_nm, arguments, "cuda"), outcome(reference.admm_tail_nm, arguments))


# --- dispatch


@pytest.mark.parametrize("shape", [(1, 7), (63, 65), (0, 5)], ids=str)
def test_operators_are_well_formed(shape):
    torch.library.opcheck(backend.admm_tail, make_case(shape, "random"))
    torch.library.opcheck(backend.admm_tail_nm, make_nm_case(shape, "random", (2, 4)))


def test_operators_compile_into_one_graph():
    def tail(x, dual, mask, z, threshold, rho):
        churn = backend.admm_tail(x * 1, dual, mask, z, threshold, rho)
        return churn + backend.admm_tail_nm(x, dual, mask, z, 2, 4, rho)

    torch.compiler.reset()
    arguments = make_case((63, 65), "random")
    compiled = torch.compile(tail, fullgraph=True, backend="aot_eager")
    assert_same(outcome(compiled, arguments), outcome(tail, arguments))


# --- the solver


class Foreign(Pattern):
    """A pattern that no kernel knows."""

    def project(self, scores):
        return Unstructured(0.5).project(scores)


@pytest.mark.parametrize("pattern", [Unstructured(0.6), NM(2, 4), NM(3, 7), Foreign()], ids=lambda p: type(p).__name__)
def test_fused_selection_is_the_plain_one(pattern, monkeypatch):
    """Without ties the fused Z step, here by the twins, leaves every bit of the result as it was."""
    w = normal(24, 30, seed=1, dtype=torch.float32)
    h = Kronecker(spd(30, seed=2, condition=100.0).float(), spd(24, seed=3, condition=100.0).float())
    plain = select(w, h, pattern)
    fused = project.fused_z_step(pattern, w)
    assert isinstance(fused, project.ByPattern) == isinstance(pattern, Foreign)
    monkeypatch.setattr(sys.modules[select.__module__], "z_step", project.fused_z_step)
    found = select(w, h, pattern)
    assert found.iterations == plain.iterations > 3
    assert torch.equal(found.mask, plain.mask)
    assert torch.equal(found.start, plain.start)


def test_ties_still_give_the_exact_count(monkeypatch):
    """Half of the weights are zero and a third may go, so zeros that tie must fill the mask up."""
    monkeypatch.setattr(sys.modules[select.__module__], "z_step", project.fused_z_step)
    w = torch.zeros(6, 8)
    w[:, ::2] = normal(6, 4, seed=4, dtype=torch.float32)
    h = Kronecker(spd(8, seed=5).float(), spd(6, seed=6).float())
    found = select(w, h, Unstructured(1 / 3))
    assert int(found.mask.sum()) == 32


def test_only_a_gpu_is_given_fused_steps():
    assert isinstance(project.z_step(Unstructured(0.5), torch.ones(2, 2)), project.ByPattern)
