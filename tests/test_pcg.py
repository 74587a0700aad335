"""A step of conjugate gradients: the twin against algebra, the kernel against the twin, compensation by either."""

import sys

import pytest
import torch
from kernels_harness import assert_equal, assert_fits, compile_kernels, interpret, needs_gpu
from oracles import assert_close, normal, spd

from kfac_prune import backend, reference_pcg
from kfac_prune.obs import compensate
from kfac_prune.operators import Kronecker
from kfac_prune.reference_pcg import WINDOW, Row, pcg_step

NAN = float("nan")
MODULE = sys.modules[compensate.__module__]
SHAPES = [(1, 1), (1, 7), (23, 65), (50, 3), (0, 5)]
#: What the log and the vectors say: (iteration, rows of the log before it, how much of ⟨P, HP⟩ there is, tolerance).
KINDS = {
    "first": (1, 1, 1.0, 0.5),
    "fourth": (4, 1, 1.0, 1e9),
    "settled": (5, 1, 1.0, 1e9),
    "on": (9, 1, 1.0, 0.0),
    "over": (9, 0, 1.0, 0.0),
    "flat": (3, 1, 0.0, 0.0),
    "indefinite": (7, 1, -1.0, 0.0),
    "nan": (2, 1, NAN, 0.0),
    "lost": (3, 1, NAN, 0.0),
}
CASES = [(shape, kind) for shape in SHAPES for kind in (KINDS if shape == (23, 65) else ("on", "over"))]
NAMES = ("x", "gradient", "direction", "z", "curved", "inverse", "log")
#: Registers a thread by alignment: four programs of eight warps on a multiprocessor. Sizes that 16 does not divide take
#: an address and a condition for each weight.
REGISTERS = {True: 64, False: 64}
#: Beyond the table: several tiles per program.
EXTRA = [{"block": 64, "programs": 3, "num_warps": 1}]


def make_case(shape, kind):
    """Arguments of pcg_step; Z and the rows to come are poisoned."""
    iteration, running, share, tolerance = KINDS[kind]
    x, gradient, direction = (normal(*shape, seed=seed, dtype=torch.float32) for seed in range(3))
    curved = share * direction * (1 + normal(*shape, seed=3, dtype=torch.float32).abs())
    inverse = (normal(*shape, seed=4, dtype=torch.float32) - 0.3).clamp_min(0)
    log = torch.full((12, 5), NAN, dtype=torch.float64)
    log[:iteration] = torch.tensor([3.0, 7.0, 0.25, 0.0, 1.0])
    log[:iteration, 3] = torch.arange(iteration)
    log[iteration - 1, 4] = running
    if kind == "lost":  # what such vectors begin with
        log[iteration - 1, :2] = torch.inf
    return x, gradient, direction, torch.full(shape, NAN), curved, inverse, log, iteration, tolerance


def outcome(function, arguments, device="cpu"):
    copies = [a.to(device, copy=True) if isinstance(a, torch.Tensor) else a for a in arguments]
    function(*copies)
    return [copy.cpu() for copy in copies[:7]]


def doubled(arguments):
    return [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]


def assert_same_step(found, arguments):
    """As the twin's in float64; where that changes nothing but the log, not a bit of the vectors has changed."""
    expected = outcome(pcg_step, doubled(arguments))
    iteration = arguments[7]
    goes = expected[6][iteration, 3] > expected[6][iteration - 1, 3]
    for name, got, wanted, given in zip(NAMES[:6], found, expected, arguments, strict=False):
        if goes and name not in ("curved", "inverse"):
            assert_close(got, wanted, size=max(given.numel(), 1))
        else:
            assert_equal(got, given, name)
    finite = expected[6][: iteration + 1].nan_to_num(nan=NAN, posinf=0)
    assert_close(found[6][: iteration + 1].nan_to_num(nan=NAN, posinf=0).float(), finite, size=max(found[0].numel(), 1))
    assert_equal(found[6][:, 3:], expected[6][:, 3:], "log")  # iterations and whether to go on, and the rows to come
    assert_equal(found[6][:iteration], arguments[6][:iteration], "log")


# --- the twin


def plain(weight, curvature, mask, start, tolerance, max_iterations):
    """Conjugate gradients on the kept weights as a textbook writes them: X, iterations, objective, ⟨R, M⁻¹R⟩."""
    x = (weight if start is None else start) * mask
    residual = curvature.apply(weight - x) * mask
    z = residual / curvature.diagonal()
    direction, losses = z, [0.5 * float(((weight - x) * curvature.apply(weight - x)).sum())]
    while len(losses) <= max_iterations and float((residual * z).sum()) > 0:
        curved, rz = curvature.apply(direction) * mask, (residual * z).sum()
        step = rz / (direction * curved).sum()
        x, residual = x + step * direction, residual - step * curved
        z = residual / curvature.diagonal()
        direction = z + (residual * z).sum() / rz * direction
        losses.append(0.5 * float(((weight - x) * curvature.apply(weight - x)).sum()))
        if len(losses) > WINDOW and losses[-1 - WINDOW] - losses[-1] <= tolerance * losses[-1]:
            break
    return x, len(losses) - 1, losses[-1], float((residual * z).sum())


def problem(shape=(13, 17), condition=10.0, dtype=torch.float64):
    a, g = (spd(n, condition=condition, seed=n, dtype=dtype) for n in (shape[1], shape[0]))
    mask = normal(*shape, seed=5).abs() > 0.7
    return normal(*shape, seed=6, dtype=dtype), Kronecker(a, g), mask


@pytest.mark.parametrize("begin", ["cold", "warm"])
@pytest.mark.parametrize("tolerance", [0.0, 3e-4, 1e-2, 1.0])
@pytest.mark.parametrize("max_iterations", [0, 1, 7, 30])
def test_compensation_is_the_textbook_one(begin, tolerance, max_iterations):
    w, h, mask = problem()
    start = None if begin == "cold" else normal(13, 17, seed=7)
    x, iterations, loss, rz = plain(w, h, mask, start, tolerance, max_iterations)
    found = compensate(w, h, mask, start, tolerance=tolerance, max_iterations=max_iterations)
    assert found.iterations == iterations
    torch.testing.assert_close(found.weight, x, rtol=0, atol=1e-9)
    assert not found.weight[~mask].any()
    assert found.loss == pytest.approx(loss, rel=1e-9)
    total = float((h.apply(w - x).square() / h.diagonal()).sum())
    assert found.kkt == pytest.approx((rz / total) ** 0.5, rel=1e-6, abs=1e-12)


def test_twin_by_hand():
    """H = diag(2, 1, 4) from X = 0 to W = (3, 5, 1), the second weight removed: one step is enough if M = H."""
    x, z, log = torch.zeros(1, 3), torch.full((1, 3), NAN), torch.full((2, 5), NAN, dtype=torch.float64)
    gradient, inverse = torch.tensor([[6.0, 5.0, 4.0]]), torch.tensor([[0.5, 0.0, 0.25]])
    direction = gradient * inverse
    log[0] = torch.tensor([22.0, 23.5, 0.0, 0.0, 1.0])  # 6²/2 + 4²/4; ½(2·9 + 25 + 4)
    curved = torch.tensor([[2.0, 1.0, 4.0]]) * direction
    pcg_step(x, gradient, direction, z, curved, inverse, log, 1, 0.0)
    assert x.tolist() == [[3, 0, 1]]
    assert gradient.tolist() == [[0, 5, 0]]
    assert z.tolist() == direction.tolist() == [[0, 0, 0]]
    assert Row(*log[1].tolist()) == Row(rz=0, loss=12.5, decrease=11, iterations=1, running=0)


@pytest.mark.parametrize("part", [1, 64, 1 << 17])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_twin_in_float32_is_the_one_in_float64(shape, kind, part, monkeypatch):
    monkeypatch.setattr(reference_pcg, "PART", part)
    assert_same_step(outcome(pcg_step, make_case(shape, kind)), make_case(shape, kind))


def test_what_the_cases_are_for():
    ends = {kind: outcome(pcg_step, make_case((23, 65), kind))[6][KINDS[kind][0]].tolist() for kind in KINDS}
    assert {kind for kind, row in ends.items() if row[4]} == {"first", "fourth", "on"}
    assert {kind for kind, row in ends.items() if row[3] == KINDS[kind][0]} == {"first", "fourth", "settled", "on"}


REFUSED = {
    "vector": ("x", torch.ones(6), r"x is torch.float32 \(6,\); pcg_step needs torch.float32 or torch.float64 \[out"),
    "dtype": ("x", torch.ones(2, 3, dtype=torch.bfloat16), r"x is torch.bfloat16 \(2, 3\)"),
    "mixed": ("z", torch.ones(2, 3).double(), r"z is torch.float64 .* needs torch.float32 \(2, 3\)"),
    "shape": ("curved", torch.ones(3, 2), r"curved is torch.float32 \(3, 2\)"),
    "strides": ("direction", torch.ones(3, 2).T, r"direction has strides \(1, 2\)"),
    "device": ("inverse", torch.ones(2, 3, device="meta"), r"inverse is .* on meta; .* on cpu"),
    "log": ("log", torch.ones(12, 5), r"log is torch.float32 \(12, 5\) on cpu; .* torch.float64 \(12, 5\)"),
    "columns": ("log", torch.ones(12, 4).double(), r"log is torch.float64 \(12, 4\)"),
    "zeroth": ("iteration", 0, "iteration is 0; the log has rows for 1 to 11"),
    "beyond": ("iteration", 12, "iteration is 12; the log has rows for 1 to 11"),
}


@pytest.mark.parametrize(("name", "value", "message"), REFUSED.values(), ids=REFUSED)
def test_arguments_are_checked(name, value, message):
    arguments = dict(zip((*NAMES, "iteration", "tolerance"), make_case((2, 3), "on"), strict=True)) | {name: value}
    with pytest.raises(ValueError, match=message):
        pcg_step(**arguments)


# --- the kernel


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    calls = [("pcg_step", make_case(*case), EXTRA if case[0] == (23, 65) else []) for case in CASES]
    calls += [("pcg_step", doubled(make_case((2, 3), "on")), [])]
    *results, refusal = interpret(tmp_path_factory.mktemp("interpreted"), "pcg", calls)
    return dict(zip(CASES, results, strict=True)), refusal


@pytest.mark.parametrize(("shape", "kind"), CASES, ids=str)
def test_kernel_equals_the_twin(interpreted, shape, kind):
    results = interpreted[0][shape, kind]
    assert len(results) == 2 + (shape == (23, 65))  # the configurations of the table, and one more
    for arguments, _, margins_intact in results:
        assert_same_step(arguments[:7], make_case(shape, kind))
        assert margins_intact


def test_kernel_takes_float32_alone(interpreted):
    assert interpreted[1][0].startswith("x is torch.float64 (2, 3); pcg_step needs torch.float32 [out, in]")


SPECIFICATIONS = """
import triton
from kfac_prune_kernels.pcg import CONFIGS, direction_kernel, energy_kernel, gradient_kernel
names = "x gradient direction z curved inverse energy rz".split()
types = {f"{name}_ptr": "*fp32" for name in names} | dict(log_ptr="*fp64", tolerance="fp32")
sizes = dict(n_weights="i32", tiles="i32", programs="i32", iteration="i32")
kernels = energy_kernel, gradient_kernel, direction_kernel
for config, kernel in [(config, kernel) for _, config in CONFIGS for kernel in kernels]:
    options = dict(num_warps=config.num_warps, enable_fp_fusion=True)
    parts = {} if kernel is energy_kernel else dict(PARTS=triton.next_power_of_2(config.programs))
    rows += machine_code(kernel, types | sizes, parts | dict(BLOCK=config.block), options, str(config))
"""


def test_kernels_compile_without_spills(tmp_path):
    rows = compile_kernels(tmp_path, SPECIFICATIONS)
    assert len(rows) == 4 * 2 * 3
    assert_fits(rows, REGISTERS)
    assert not [row["kernel"] for row in rows if "atom" in row["ptx"] or "red.global" in row["ptx"]]


@needs_gpu
@pytest.mark.parametrize(("shape", "kind"), [*CASES, ((1031, 1021), "on")], ids=str)  # the last takes the large blocks
def test_kernel_on_the_gpu(shape, kind):
    first, second = (outcome(backend.pcg_step, make_case(shape, kind), "cuda") for _ in range(2))
    assert_same_step(first, make_case(shape, kind))
    for name, a, b in zip(NAMES, first, second, strict=True):
        assert_equal(a, b, name)


@needs_gpu
def test_compensation_on_the_gpu():
    w, h, mask = problem((131, 77), dtype=torch.float32)
    expected = compensate(w, h, mask)
    runs = [compensate(w.cuda(), Kronecker(h.a.cuda(), h.g.cuda()), mask.cuda()) for _ in range(2)]
    assert torch.equal(runs[0].weight, runs[1].weight)
    assert abs(runs[0].iterations - expected.iterations) <= 1
    assert runs[0].loss == pytest.approx(expected.loss, rel=1e-3)


# --- dispatch


@pytest.mark.parametrize(("shape", "kind"), [((23, 65), "on"), ((1, 7), "over"), ((0, 5), "on")], ids=str)
def test_operator_is_well_formed(shape, kind):
    torch.library.opcheck(backend.pcg_step, make_case(shape, kind))


def test_operator_compiles_into_one_graph():
    def step(x, gradient, direction, z, curved, *rest):
        backend.pcg_step(x, gradient, direction, z, curved * 1, *rest)

    torch.compiler.reset()
    arguments = make_case((23, 65), "on")
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for name, a, b in zip(NAMES, outcome(compiled, arguments), outcome(pcg_step, arguments), strict=True):
        assert_equal(a, b, name)


# --- compensation as on a GPU, by the twin


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("tolerance", [0.0, 1e-3, 1e-2, 1.0])
@pytest.mark.parametrize("max_iterations", [0, 1, 4, 5, 6, 13, 400])
def test_looking_now_and_then_changes_nothing(max_iterations, tolerance, dtype, monkeypatch):
    w, h, mask = problem(dtype=dtype)
    every = compensate(w, h, mask, tolerance=tolerance, max_iterations=max_iterations)
    monkeypatch.setattr(MODULE, "_watched", MODULE._queued)
    for look_every in (1, 5, 7):
        monkeypatch.setattr(MODULE, "LOOK_EVERY", ((0, look_every),))
        found = compensate(w, h, mask, tolerance=tolerance, max_iterations=max_iterations)
        assert torch.equal(found.weight, every.weight)
        assert (found.loss, found.kkt, found.iterations) == (every.loss, every.kkt, every.iterations)


@pytest.mark.parametrize(("look_every", "often"), [(((0, 1),), 1), (((221, 1), (0, 5)), 1), (((222, 1), (0, 5)), 5)])
def test_the_host_looks_only_now_and_then(look_every, often, monkeypatch):
    """What is queued beyond the stop is less than one interval, and so the loop did not look in between.

    Two products more are those at the start and at the end.
    """
    w, h, mask = problem()
    applied, apply = [], Kronecker.apply
    monkeypatch.setattr(Kronecker, "apply", lambda self, x: applied.append(0) or apply(self, x))
    monkeypatch.setattr(MODULE, "_watched", MODULE._queued)
    monkeypatch.setattr(MODULE, "LOOK_EVERY", look_every)
    iterations = compensate(w, h, mask, tolerance=1e-2).iterations
    assert len(applied) - 2 == -(-iterations // often) * often


@pytest.mark.parametrize("loop", ["_watched", "_queued"])
@pytest.mark.parametrize("max_iterations", [5, 12, 400])
def test_residuals_that_were_right_are_replaced_without_a_trace(max_iterations, loop, monkeypatch):
    """Rounds of approximate iterations make one sequence: the direction and the window of the stop go on."""
    w, h, mask = problem(condition=20.0)
    monkeypatch.setattr(MODULE, "_watched", getattr(MODULE, loop))
    monkeypatch.setattr(MODULE, "ROUND", 400)
    once = compensate(w, h, mask, max_iterations=max_iterations)
    monkeypatch.setattr(MODULE, "ROUND", 4)
    found = compensate(w, h, mask, max_iterations=max_iterations)
    assert found.iterations == once.iterations == min(max_iterations, 18)
    assert_close(found.weight, once.weight, condition=400.0)
