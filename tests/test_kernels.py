"""The folder kernels/: no package, imported from anywhere, and only when a kernel is called."""

from pathlib import Path

import pytest
from kernels_harness import ROOT, needs_triton, run_python

KERNELS = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))


def test_import_does_not_load_triton():
    run_python("import kfac_prune, kfac_prune.backend; import sys; assert 'triton' not in sys.modules")


def test_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    found = run_python("from importlib.util import find_spec; print(getattr(find_spec('kernels'), 'origin', None))")
    assert found.strip() == "None" or not Path(found.strip()).is_relative_to(ROOT / "kernels")


@needs_triton
def test_kernels_import_from_anywhere(tmp_path):
    code = "import sys\nfor n in sys.argv[1:]: print(__import__('kfac_prune_kernels.' + n, fromlist=['x']).__file__)"
    found = run_python(code, *KERNELS, cwd=tmp_path)
    assert [Path(line).stem for line in found.split()] == KERNELS


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_has_a_test_and_addresses_of_64_bits(name):
    assert (ROOT / "tests" / f"test_{name}.py").exists()
    source = (ROOT / "kernels" / f"{name}.py").read_text(encoding="utf-8")
    kernels = source.split("@triton.jit")[1:]
    addressed = [part for part in kernels if "tl.program_id" in part]
    assert addressed
    assert all(".to(tl.int64)" in part.split("tl.store")[0] for part in addressed)
