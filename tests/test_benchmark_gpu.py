"""The GPU benchmark runs everywhere at toy sizes, and says so where no GPU is."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
from kernels_harness import ROOT

from kfac_prune import backend, reference


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
            "kth_largest",
            "kth_largest_dual",
            "block_sweep",
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
    exact = [row for row in rows if "mask_differs" in row and row["what"] != "sweep"]  # the twin is the kernel here
    assert {row["what"] for row in exact} == {"admm_tail", "admm_tail_nm", "block_sweep"}
    assert all(row["mask_differs"] == row["relative_error"] == row.get("churn_differs", 0) == 0 for row in exact)
    code = "import json, sys; from performance_table import gpu_table; print(gpu_table(json.loads(sys.stdin.read())))"
    path = os.environ | {"PYTHONPATH": str(ROOT / "scripts")}
    command = [sys.executable, "-c", code]
    table = subprocess.run(command, input=json.dumps(rows), env=path, capture_output=True, text=True, check=True).stdout
    told = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert told == ["what", *(row["what"] for row in rows)]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("benchmark_gpu")


@pytest.mark.parametrize("fault", ["mask", "dual", "churn"])
def test_a_kernel_that_is_wrong_is_seen(fault, script, monkeypatch):
    def wrong(x, dual, mask, z, n, m, rho):
        churn = reference.admm_tail_nm(x, before := dual.clone(), mask, z, n, m, rho)
        if fault == "mask":
            mask.logical_not_()
        if fault != "dual":
            dual.copy_(before)
        return churn + (fault == "churn")

    generator = torch.Generator().manual_seed(0)
    x, dual = (torch.randn(8, 12, generator=generator) for _ in range(2))
    given = (x, dual, x > 0, torch.empty_like(x), 2, 4, 0.5)
    right = script.disagreement("admm_tail_nm", given, (1, 2, 3))
    assert set(right.values()) == {0.0}
    monkeypatch.setattr(backend, "admm_tail_nm", wrong)
    found = script.disagreement("admm_tail_nm", given, (1, 2, 3))
    name = {"mask": "mask_differs", "dual": "relative_error", "churn": "churn_differs"}[fault]
    assert {key for key, value in found.items() if value > 0} == {name}


def test_what_fails_is_a_row_and_the_rest_goes_on(script, tmp_path):
    bench = script.Bench(tmp_path / "rows", "cpu", 100)

    def fails():
        raise RuntimeError("out of registers")

    bench.attempt("first", fails)
    bench.stage("second", lambda: None)
    first, second = map(json.loads, (tmp_path / "rows").read_text().splitlines())
    assert (first["what"], first["error"]) == ("first", "RuntimeError: out of registers")
    assert second["what"] == "second"
    assert bench.failed == ["first"]
