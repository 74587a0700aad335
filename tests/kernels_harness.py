"""Running kernels without a GPU: numerics in Triton's interpreter, machine code for GPUs that need not be here.

The interpreter is switched on when a kernel is decorated, so it runs in a process of its own; so does the compiler.
"""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

#: The release of Triton, (major, minor).
TRITON = tuple(map(int, version("triton").split(".")[:2])) if find_spec("triton") else None
needs_triton = pytest.mark.skipif(TRITON is None, reason="triton is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")

INTERPRET = """
import sys
from importlib import import_module
import torch

module_name, cases, out = sys.argv[1:]
module = import_module("kfac_prune_kernels." + module_name)
empty = torch.empty
table = [config for _, config in module.CONFIGS]

def poisoned(*args, **kwargs):
    result = empty(*args, **kwargs)
    return result.fill_(float("nan") if result.is_floating_point() else -77777)

def guard(value, margins):
    '''A copy of the same strides inside a larger buffer of NaN or ones, whose edges and gaps go to ``margins``.'''
    if isinstance(value, (list, tuple)):
        return [guard(part, margins) for part in value]
    if not isinstance(value, torch.Tensor):
        return value
    poison = float("nan") if value.is_floating_point() else 1
    extent = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride())) if value.numel() else 0
    buffer = torch.full((extent + 2048,), poison, dtype=value.dtype)
    used = torch.zeros(extent + 2048, dtype=torch.bool)
    used.as_strided(value.shape, value.stride(), 1024).fill_(True)
    margins.append((buffer, used))
    return buffer.as_strided(value.shape, value.stride(), 1024).copy_(value)

def intact(buffer, used):
    rest = buffer[~used]
    return bool((rest.isnan() if rest.is_floating_point() else rest == 1).all())

torch.empty = poisoned
results = []
for function, arguments, extra in torch.load(cases):
    results.append([])
    for config in table + [module.Config(**fields) for fields in extra]:
        module.CONFIGS = ((0, config),)
        margins = []
        copies = guard(arguments, margins)
        try:
            result = getattr(module, function)(*copies)
        except ValueError as error:
            results[-1].append(str(error))
            continue
        copies = [copy.clone() if isinstance(copy, torch.Tensor) else copy for copy in copies]
        results[-1].append((copies, result, all(intact(*margin) for margin in margins)))
torch.save(results, out)
"""

COMPILE = """
import json
import subprocess
import sys
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def machine_code(kernel, types, constants, options, label):
    '''Registers, stack, local memory and PTX of one kernel, for each target, aligned and not.'''
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    whole = [i for i, name in enumerate(signature) if signature[name][0] in "*i"]
    for capability in (80, 90):
        for aligned in (True, False):
            attrs = {(i,): [["tt.divisibility", 16]] for i in whole} if aligned else {}
            source = ASTSource(kernel, signature, constants, attrs)
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            cubin = Path(sys.argv[1]) / "kernel.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            fields = [field.split(":") for field in usage.split() if field.startswith(("REG:", "STACK:", "LOCAL:"))]
            row = dict(kernel=kernel.__name__, capability=capability, aligned=aligned, label=label)
            row["ptx"] = compiled.asm["ptx"]
            yield row | {name: int(number) for name, number in fields}

rows = []
"""


def run_python(code, *arguments, cwd=ROOT, **environment):
    """The standard output of a fresh Python in which warnings are errors."""
    if TRITON and TRITON < (3, 7) and "TRITON_INTERPRET" in environment:
        pytest.skip("the interpreter of triton 3.6 makes loop bounds of arrays, which NumPy has come to refuse")
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


def interpret(folder, module, cases):
    """Call functions of a kernel's module in the interpreter.

    A case is (function, arguments, further configurations). Per case and configuration of the module's table, then of
    the case: the arguments after the call, its result, whether memory around and between their entries was left alone;
    or the message of a ValueError.
    """
    if TRITON is None:
        pytest.skip("triton is not installed")
    torch.save(cases, folder / "cases")
    run_python(INTERPRET, module, folder / "cases", folder / "results", TRITON_INTERPRET="1")
    return torch.load(folder / "results")


def compile_kernels(folder, specifications):
    """Rows of ``machine_code``; the specifications are lines of Python that extend ``rows`` by calling it."""
    if TRITON is None:
        pytest.skip("triton is not installed")
    triton_home = Path(find_spec("triton").origin).parent
    if not (triton_home / "backends/nvidia/bin/cuobjdump").exists() and shutil.which("cuobjdump") is None:
        pytest.skip("this triton has no cuobjdump to read registers with")
    code = COMPILE + specifications + "\nprint(json.dumps(rows))\n"
    return json.loads(run_python(code, folder, TRITON_CACHE_DIR=str(folder / "cache")))


def assert_fits(rows, registers):
    """No spills, and at most so many registers a thread: {aligned: number}; before triton 3.8 up to four may spill."""
    spilled = 16 if TRITON < (3, 8) else 0
    assert {row["capability"] for row in rows} == {80, 90}
    for row in rows:
        what = f"{row['kernel']} {row['label']} sm_{row['capability']} aligned={row['aligned']}"
        print(what, row["REG"])
        assert max(row["STACK"] - spilled, row["LOCAL"]) <= 0, what
        assert row["REG"] <= registers[row["aligned"]], f"{what}: {row['REG']} registers"


def assert_equal(found, expected, name=""):
    """Bit for bit, up to the sign of zero; NaN equals NaN."""
    torch.testing.assert_close(
        found.cpu(), expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{name}: {text}"
    )
