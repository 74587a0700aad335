"""The kernels: numerics in Triton's interpreter, compilation for GPUs that need not be here, dispatch, layout.

The interpreter is switched on when a kernel is decorated, so it runs in a process of its own; so does the compiler.
"""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from kfac_prune import backend, reference
from kfac_prune.linalg import kth_largest
from kfac_prune.obs.patterns import Unstructured

ROOT = Path(__file__).resolve().parents[1]
RHO = 0.37
SHAPES = [(1, 1), (1, 7), (63, 65), (500, 3), (16, 64), (0, 5)]
KINDS = ["random", "ties", "all-kept", "none-kept", "nan"]
CASES = [(shape, kind) for shape in SHAPES for kind in KINDS]
#: Registers a thread by alignment. 48 let a multiprocessor hold five of the large blocks; sizes that 16 does not divide
#: may take more: up to 64 with triton 3.6 and 3.9.
REGISTERS = {True: 48, False: 80}

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")

INTERPRET = """
import sys
import torch
from kfac_prune_kernels import admm_tail as module

cases, out = sys.argv[1:]
empty = torch.empty

def poisoned(*args, **kwargs):
    result = empty(*args, **kwargs)
    return result.fill_(float("nan") if result.is_floating_point() else -77777)

def guarded(tensor):
    '''A contiguous copy inside a larger buffer, and the buffer's margins.'''
    buffer = torch.full((tensor.numel() + 2048,), 1, dtype=tensor.dtype)
    view = buffer[1024 : 1024 + tensor.numel()].view(tensor.shape).copy_(tensor)
    return view, [buffer[:1024], buffer[1024 + tensor.numel() :]]

torch.empty = poisoned
configs = [config for _, config in module.CONFIGS]
results = []
for x, dual, mask, z, threshold, rho in torch.load(cases):
    results.append([])
    for config in configs:
        module.CONFIGS = ((0, config),)
        tensors, margins = zip(*map(guarded, (x, dual, mask, z)))
        churn = module.admm_tail(*tensors, threshold, rho)
        intact = all(bool((margin == 1).all()) for pair in margins for margin in pair)
        results[-1].append((*(tensor.clone() for tensor in tensors), churn, intact))
try:
    module.admm_tail(torch.ones(4, 4).T[:2], *tensors[1:], threshold, rho)
    refusal = ""
except ValueError as error:
    refusal = str(error)
torch.save((results, refusal), out)
"""

COMPILE = """
import json
import subprocess
import sys
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kfac_prune_kernels.admm_tail import CONFIGS, admm_tail_kernel

folder = Path(sys.argv[1])
pointers = dict(x="fp32", dual="fp32", mask="u8", z="fp32", churn="i32", threshold="fp32")
signature = {f"{name}_ptr": f"*{dtype}" for name, dtype in pointers.items()}
signature |= dict(rho="fp32", n_weights="i32", BLOCK="constexpr")
sixteen = [["tt.divisibility", 16]]
rows = []
for capability in (80, 90):
    for _, config in CONFIGS:
        for aligned in (True, False):
            attrs = {(i,): sixteen for i in (0, 1, 2, 3, 4, 5, 7)} if aligned else {}
            source = ASTSource(admm_tail_kernel, signature, {"BLOCK": config.block}, attrs)
            options = dict(num_warps=config.num_warps, enable_fp_fusion=False)
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            cubin = folder / "kernel.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            fields = [field.split(":") for field in usage.split() if field.startswith(("REG:", "STACK:", "LOCAL:"))]
            row = dict(capability=capability, config=str(config), aligned=aligned, ptx=compiled.asm["ptx"])
            rows.append(row | {name: int(number) for name, number in fields})
print(json.dumps(rows))
"""


def run_python(code, *arguments, cwd=ROOT, **environment):
    """The standard output of a fresh Python in which warnings are errors."""
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        cwd=cwd,
        env=inherited | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


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


def outcome(function, arguments, device="cpu"):
    """X, V, M, Z and the churn after a call on copies of the arguments."""
    tensors = [a.to(device, copy=True) if isinstance(a, torch.Tensor) else a for a in arguments]
    churn = function(*tensors)
    return *tensors[:4], churn


def assert_same(found, expected):
    for name, a, b in zip(("x", "dual", "mask", "z", "churn"), found, expected, strict=True):
        torch.testing.assert_close(
            a.cpu(), b, rtol=0, atol=0, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )


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
    "device": ("z", torch.ones(2, 3, device="meta"), r"z is .* on meta; .* on cpu, where x is"),
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


# --- the kernel


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Results of the kernel in the interpreter by case, and what it said to a strided X."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    folder = tmp_path_factory.mktemp("interpreted")
    torch.save([make_case(*case) for case in CASES], folder / "cases")
    run_python(INTERPRET, folder / "cases", folder / "results", TRITON_INTERPRET="1")
    results, refusal = torch.load(folder / "results")
    return dict(zip(CASES, results, strict=True)), refusal


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_equals_the_twin(interpreted, shape, kind):
    expected = outcome(reference.admm_tail, make_case(shape, kind))
    results = interpreted[0][shape, kind]
    assert len(results) == 2  # one per configuration
    for *found, margins_intact in results:
        assert_same(found, expected)
        assert margins_intact


def test_kernel_refuses_strides(interpreted):
    assert interpreted[1].startswith("x has strides (1, 4)")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What the compiler made of every configuration, for every target."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    triton_home = Path(find_spec("triton").origin).parent
    if not (triton_home / "backends/nvidia/bin/cuobjdump").exists() and shutil.which("cuobjdump") is None:
        pytest.skip("this triton has no cuobjdump to read registers with")
    folder = tmp_path_factory.mktemp("compiled")
    return json.loads(run_python(COMPILE, folder, TRITON_CACHE_DIR=str(folder / "cache")))


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "odd"])
@pytest.mark.parametrize("capability", [80, 90], ids=["sm_80", "sm_90"])
def test_kernel_compiles_without_spills(compiled, capability, aligned):
    rows = [row for row in compiled if (row["capability"], row["aligned"]) == (capability, aligned)]
    assert len({row["config"] for row in rows}) == 2
    for row in rows:
        assert (row["STACK"], row["LOCAL"]) == (0, 0), row["config"]
        assert row["REG"] <= REGISTERS[aligned], row["config"]
        ptx = row["ptx"]
        # Each operation rounds once, as in the twin.
        assert "div.rn.f32" in ptx
        assert "div.full" not in ptx
        assert "fma" not in ptx
        if aligned:  # 16 bytes at a time: X and V in, Z and V out
            assert ptx.count("ld.global.v4.b32") == ptx.count("st.global.v4.b32") == 2


@needs_gpu
@needs_triton
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [*SHAPES, (1031, 517)], ids=str)
def test_gpu_equals_the_twin(shape, kind):
    arguments = make_case(shape, kind)
    assert_same(outcome(backend.admm_tail, arguments, "cuda"), outcome(reference.admm_tail, arguments))


# --- dispatch


@pytest.mark.parametrize("shape", [(1, 7), (63, 65), (0, 5)], ids=str)
def test_operator_is_well_formed(shape):
    torch.library.opcheck(backend.admm_tail, make_case(shape, "random"))


def test_operator_compiles_into_one_graph():
    def tail(x, dual, mask, z, threshold, rho):
        churn = backend.admm_tail(x * 1, dual, mask, z, threshold, rho)
        return churn + 0

    torch.compiler.reset()
    arguments = make_case((63, 65), "random")
    compiled = torch.compile(tail, fullgraph=True, backend="aot_eager")
    assert_same(outcome(compiled, arguments), outcome(reference.admm_tail, arguments))


def test_import_does_not_load_triton():
    run_python("import kfac_prune, kfac_prune.backend; import sys; assert 'triton' not in sys.modules")


# --- the folder kernels/


def test_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    found = run_python("from importlib.util import find_spec; print(getattr(find_spec('kernels'), 'origin', None))")
    assert found.strip() == "None" or not Path(found.strip()).is_relative_to(ROOT / "kernels")


@needs_triton
def test_kernels_import_from_anywhere(tmp_path):
    found = run_python("import kfac_prune_kernels.admm_tail as module; print(module.__file__)", cwd=tmp_path)
    assert Path(found.strip()).name == "admm_tail.py"
