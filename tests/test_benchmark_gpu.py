"""The GPU benchmark runs everywhere at toy sizes, and says so where no GPU is."""

import json
import os
import subprocess
import sys

from kernels_harness import ROOT


def run(*arguments):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "scripts" / "benchmark_gpu.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_without_a_gpu_it_says_so(tmp_path):
    done = run("--out", tmp_path / "rows")
    assert done.returncode == 1
    assert "no GPU is visible" in done.stderr
    assert not (tmp_path / "rows").exists()


def test_tiny_run_writes_every_row(tmp_path):
    done = run("--out", tmp_path / "rows", "--tiny")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert {row["what"] for row in rows} == {
        *(
            "floor",
            "kth_largest_dual",
            "admm_tail",
            "admm_tail_nm",
            "pcg_step",
            "covariance",
            "cholesky",
            "admm",
            "pcg",
            "sweep",
        ),
        *("model curvature", "model prune"),
    }
    assert all(row["device"] == "cpu" for row in rows)
    assert all(row["repeatable"] and row["went_on"] for row in rows if row["what"] == "pcg_step")
    assert all(row["relative_error"] < 1e-3 for row in rows if "relative_error" in row)
    code = "import json, sys; from performance_table import gpu_table; print(gpu_table(json.loads(sys.stdin.read())))"
    path = os.environ | {"PYTHONPATH": str(ROOT / "scripts")}
    command = [sys.executable, "-c", code]
    table = subprocess.run(command, input=json.dumps(rows), env=path, capture_output=True, text=True, check=True).stdout
    told = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert told == ["what", *(row["what"] for row in rows)]
