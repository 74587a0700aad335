"""The source tree's own rules: which module may import which, sizes, docstrings, no paths of one machine."""

import ast
import re
import shutil
import subprocess
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "kfac_prune"
MAX_LINES = 400

#: From the bottom up. A name is a module of the package, one of its sub-packages, or the Triton kernels. What stands
#: in one row does not know its neighbours.
LAYERS = (
    ("errors", "memory", "figures", "reference"),
    ("options", "progress"),
    ("reference_pcg",),
    ("kernels", "ranks"),
    ("backend",),
    ("config", "linalg", "data", "store", "pruned_model", "experts"),
    ("models", "loading", "fisher", "protocol", "recipe_file"),
    ("objective", "products", "masked_training"),
    ("quality", "own_text"),
    ("operators", "stream", "export", "offload"),
    ("obs", "curvature"),
    ("allocate", "baselines"),
    ("problems",),
    ("probe", "curves"),
    ("plan",),
    ("refitting", "shots"),
    ("sublayers",),
    ("block_training",),
    ("reconstruction",),
    ("structure", "recovery"),
    ("permute",),
    ("costs",),
    ("report", "bench", "inspect_model", "inputs", "resume", "theory"),
    ("demo", "compare_report", "job", "estimate"),
    ("pipeline", "measurement", "compare"),
    ("cli",),
    ("__init__", "__main__"),
)
RANK = {name: rank for rank, row in enumerate(LAYERS) for name in row}


def sources():
    return sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").glob("*.py")])


def unit(path):
    """The row entry that a file belongs to."""
    if path.is_relative_to(ROOT / "kernels"):
        return "kernels"
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def dotted(path):
    """The name under which a file is imported."""
    folder, top = (ROOT / "kernels", "kfac_prune_kernels") if unit(path) == "kernels" else (PACKAGE, "kfac_prune")
    parts = path.relative_to(folder).with_suffix("").parts
    return ".".join([top, *(part for part in parts if part != "__init__")])


def imported(path, *, only_at_import=False):
    """(line, dotted name) of everything that a file imports, inside functions too unless ``only_at_import``."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = [tree]
    while nodes:
        node = nodes.pop()
        if only_at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if only_at_import and isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def own_imports(path):
    """(line, file) of the project's own modules that a file imports."""
    files = {dotted(source): source for source in sources()}
    for line, name in imported(path):
        if name.split(".")[0] in ("kfac_prune", "kfac_prune_kernels"):
            module = name if name in files else name.rpartition(".")[0]
            if module in files:
                yield line, files[module]


def test_every_module_has_a_layer():
    without = {unit(path) for path in sources()} - {"assets"} - RANK.keys()
    assert not without, f"give {', '.join(sorted(without))} a place in LAYERS"


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_only_down(path):
    for line, target in own_imports(path):
        here, there = unit(path), unit(target)
        assert here == there or RANK.get(there, 99) < RANK.get(here, -1), (
            f"{path.relative_to(ROOT)}:{line} imports {dotted(target)}, which does not lie below it"
        )


def test_imports_have_no_cycle():
    graph = {path: {target for _, target in own_imports(path)} - {path} for path in sources()}
    list(TopologicalSorter(graph).static_order())


def test_a_wrong_import_would_be_seen(tmp_path, monkeypatch):
    """The rule bites: a bottom module that imports a top one, also from within a function."""
    for folder in ("kfac_prune", "kernels"):
        (tmp_path / folder).mkdir()
    wrong = tmp_path / "kfac_prune" / "linalg.py"
    wrong.write_text("def f():\n    from kfac_prune.plan import Plan\n    return Plan\n")
    (tmp_path / "kfac_prune" / "plan.py").write_text("Plan = 1\n")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path / "kfac_prune")
    with pytest.raises(AssertionError, match=r"linalg\.py:2 imports kfac_prune\.plan"):
        test_imports_go_only_down(wrong)


def test_kernels_is_no_package():
    """transformers probes for a package of that name; ours would shadow it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for path in [*sources(), *(ROOT / "scripts").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        assert not [line for line, name in imported(path) if name.split(".")[0] == "kernels"], path


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_package_imports_without_triton(path):
    names = {name.split(".")[0] for _, name in imported(path, only_at_import=True)}
    assert not names & {"triton", "kfac_prune_kernels", "datasets", "matplotlib"}


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_are_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{path.relative_to(ROOT)} has {lines} lines; split it"


def test_every_file_says_what_it_is():
    files = [*sources(), *(ROOT / "scripts").rglob("*.py")]
    silent = [str(f.relative_to(ROOT)) for f in files if not ast.get_docstring(ast.parse(f.read_text("utf-8")))]
    assert silent == []


def tracked_files():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    files = [ROOT / name for name in done.stdout.decode().split("\0") if name]
    return [path for path in files if path.is_file()]


def test_no_file_names_a_path_of_one_machine():
    place = re.compile(rb"(?<![\w.-])/(?:home|root|tmp)/")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80].decode(errors='replace')}"
        for path in tracked_files()
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1)
        if path.suffix != ".safetensors" and place.search(line)
    ]
    assert found == []
